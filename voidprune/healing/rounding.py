"""Matrices rounded to 4 bits so that what layers give changes least: GPTQ (arXiv 2210.17323), on calibration samples.

Rounding to nearest makes every weight as right as it can be. What counts is the product: columns are rounded one by one, and what
one of them loses, those that are still to come make up for, as far as their inputs go together. Minimises |X (W - W')^T|^2.

- Scales and zero points are those of rounding to nearest, so columns can go in any order: largest inputs first, while there are
  most others to make up for them ("act-order", without its cost when the matrix is read).
- From bottom to top, each layer on the stream that the rounded layers below it really give.
- Each token counts where a matrix is read: in its phase, by a sublayer that runs in it.

Embedding and head stay rounded to nearest: where they are one matrix, what is right for the one is wrong for the other.

Shapes: B rows, T tokens, M tokens that count, N outputs, K inputs, C columns that are rounded together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers, scheduled
from voidprune.export.quantize import Packing, Rounded, matrix_format, quantize_rows, restore_numbers
from voidprune.healing.layer_windows import PhasedBatch, phased_batches, run_window
from voidprune.models.architecture import TensorNames
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.packed import BITS, BlockFormat
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Phase, Schedule

_DAMPING = 0.01
"""What is added to the sum of squares of every input, as a share of their mean: as the paper does, against too little data."""
_CHUNK = 128
"""Columns after which all later ones are changed at once: one product in place of many sums."""


def round_layers(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    schedule: Schedule,
    samples: Sequence[Sample],
    packing: Packing,
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _amount: None,
) -> dict[str, Rounded]:
    """The matrices of the layers that `schedule` keeps, where decode reads them in 4 bits, by their names in the slim checkpoint.

    `model` is the whole model of `checkpoint`; it ends with the rounded matrices. `advance` is told of every kept layer done.
    Streams of all tokens are kept in memory, on the CPU, and the rounded numbers, a byte each; all else is a layer's. Raises
    ModelError where streams overflow.
    """
    layers = decoder_layers(model, checkpoint.architecture.spec.modules)
    streams = [_Stream(batch) for batch in phased_batches(samples, schedule.boundary, batch_size=batch_size)]
    found: dict[str, Rounded] = {}
    for place, layer in enumerate(schedule.union):
        matrices = list(_find_matrices(checkpoint, schedule, packing, layers[layer], layer=layer, place=place))
        grams: dict[_Together, Tensor] = {}
        for stream in streams:
            with _watching(matrices, stream.batch, grams):
                _run_layer(model, schedule, stream, layer)
        for together, gram_KK in grams.items():
            if not torch.isfinite(gram_KK).all():
                raise ModelError("the model's hidden states overflow, so nothing says how to round its matrices")
            order = order_inputs(gram_KK)
            for matrix in together:
                found[matrix.name] = rounded = round_columns(
                    matrix.module.weight.detach().float(), order, matrix.blocks
                )
                restored_NK = restore_numbers(rounded, matrix.blocks)[:, : matrix.module.in_features]
                with torch.no_grad():
                    matrix.module.weight.copy_(torch.from_numpy(restored_NK))
        for stream in streams:
            stream.states_BTH = _run_layer(model, schedule, stream, layer)
        advance(1)
    return found


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix that decode reads in 4 bits: `name` in the slim checkpoint, and the phases whose tokens it is multiplied with."""

    name: str
    module: nn.Linear
    blocks: BlockFormat
    phases: frozenset[Phase]


_Together = tuple[_Matrix, ...]
"""Matrices that are given the same inputs, of the same tokens."""


def _find_matrices(
    checkpoint: Checkpoint, schedule: Schedule, packing: Packing, module: nn.Module, *, layer: int, place: int
) -> Iterator[_Matrix]:
    names = checkpoint.architecture.spec.tensors
    for path, linear in module.named_modules():
        name = names.layer(place, f"{path}.weight")
        blocks = matrix_format(checkpoint, name, packing, Phase.DECODE)
        if not isinstance(linear, nn.Linear) or blocks is None or blocks.bits != min(BITS):
            continue
        phases = frozenset(
            phase
            for phase in Phase
            if _multiplies(schedule.actions(phase)[layer], path, names)
            and matrix_format(checkpoint, name, packing, phase) == blocks
        )
        yield _Matrix(name, linear, blocks, phases)


def _multiplies(action: LayerAction, path: str, names: TensorNames) -> bool:
    """Whether what a layer makes of a token with this matrix is used."""
    if path in names.mlp_matrices:
        return action.runs_mlp
    return action.attends if path == names.output else action.writes_kv


# ---- what matrices are given


@dataclass(eq=False)
class _Stream:
    """A batch, and the residual stream where the walk stands: [B, T, H], None before the first kept layer."""

    batch: PhasedBatch
    states_BTH: Tensor | None = None


def _run_layer(model: PreTrainedModel, schedule: Schedule, stream: _Stream, layer: int) -> Tensor:
    """The stream behind a layer, on the CPU."""
    behind = 2 * layer + 2
    with scheduled(model, schedule) as running:
        seen = run_window(
            running,
            stream.batch,
            first=layer,
            last=layer + 1,
            entry_BTH=stream.states_BTH,
            points={behind},
        )
    return seen.points_BTH[behind].cpu()


@contextmanager
def _watching(matrices: Sequence[_Matrix], batch: PhasedBatch, grams: dict[_Together, Tensor]) -> Iterator[None]:
    """Add to `grams` what the matrices are given while the block runs them on a batch: x^T x over the tokens that count, [K, K]
    in float64, one for all matrices that are given the same x."""
    given: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given[module] = args[0]

    handles = [matrix.module.register_forward_pre_hook(watch) for matrix in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    same: dict[tuple[int, frozenset[Phase]], list[_Matrix]] = {}
    for matrix in matrices:
        same.setdefault((id(given[matrix.module]), matrix.phases), []).append(matrix)
    for (_, phases), together in same.items():
        inputs_BTK = given[together[0].module]
        inputs_MK = inputs_BTK[batch.counted_BT(phases).to(inputs_BTK.device)].float()
        gram_KK = inputs_MK.mT @ inputs_MK
        gram_KK = (gram_KK.cpu() if gram_KK.device.type == "mps" else gram_KK).double()  # which has no float64
        grams[tuple(together)] = grams.get(tuple(together), 0.0) + gram_KK


# ---- rounding


@dataclass(frozen=True, eq=False)
class InputOrder:
    """The order in which columns are rounded, [K], and how later ones make up for earlier ones, upper triangular, [K, K].

    Row k of `upper_KK`, over its diagonal, says how much of the loss of the k-th column each later one takes: the Cholesky factor
    of the inverse of x^T x, damped. None where no token counted.
    """

    order_K: Tensor
    upper_KK: Tensor | None


def order_inputs(gram_KK: Tensor) -> InputOrder:
    """Largest inputs first."""
    squares_K = gram_KK.diagonal()
    order_K = squares_K.argsort(descending=True, stable=True)
    if not squares_K.any():
        return InputOrder(order_K, None)
    damped_KK = gram_KK[order_K][:, order_K]
    damped_KK.diagonal().add_(_DAMPING * squares_K.mean())
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    return InputOrder(order_K, torch.linalg.cholesky(inverse_KK, upper=True).float())


def round_columns(weights_NK: Tensor, order: InputOrder, blocks: BlockFormat) -> Rounded:
    """A matrix rounded column by column, with the scales and zero points that rounding to nearest gives its blocks."""
    nearest = quantize_rows(weights_NK.cpu().numpy(), blocks)
    if order.upper_KK is None:
        return nearest
    device = order.upper_KK.device
    (num_rows, num_columns), order_K, upper_KK = weights_NK.shape, order.order_K, order.upper_KK
    scales_GN = torch.from_numpy(nearest.scales.T).to(device)
    points_GN = torch.full_like(scales_GN, blocks.middle)
    if nearest.zero_points is not None:
        points_GN = torch.from_numpy(nearest.zero_points.T).to(scales_GN)
    groups_K = order_K // blocks.numbers_in_block(num_columns)
    left_KN = weights_NK.to(device).mT[order_K]
    numbers_KN = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=device)
    for start in range(0, num_columns, _CHUNK):
        stop = min(start + _CHUNK, num_columns)
        chunk_CN, upper_CC = left_KN[start:stop], upper_KK[start:stop, start:stop]
        scales_CN, points_CN = scales_GN[groups_K[start:stop]], points_GN[groups_K[start:stop]]
        steps_CN = torch.where(scales_CN == 0, 0.0, 1 / scales_CN)
        losses_CN = torch.empty_like(chunk_CN)
        for column in range(stop - start):
            number_N = (chunk_CN[column] * steps_CN[column]).round_().add_(points_CN[column]).clamp_(0, blocks.largest)
            numbers_KN[start + column] = number_N
            meant_N = (number_N - points_CN[column]) * scales_CN[column]
            losses_CN[column] = (chunk_CN[column] - meant_N) / upper_CC[column, column]
            chunk_CN[column + 1 :].addr_(upper_CC[column, column + 1 :], losses_CN[column], alpha=-1)
        left_KN[stop:].addmm_(upper_KK[start:stop, stop:].mT, losses_CN, alpha=-1)
    numbers = nearest.numbers.reshape(num_rows, -1)  # with the padding of the last block
    numbers[:, order_K.cpu().numpy()] = numbers_KN.cpu().numpy().T
    return nearest._replace(numbers=numbers.reshape(nearest.numbers.shape))
