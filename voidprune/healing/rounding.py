"""Matrices rounded to 4 bits so that what layers give changes least: GPTQ (arXiv 2210.17323), on calibration samples.

Rounding to nearest makes every weight as right as it can be. What counts is the product: columns are rounded one by one, and what
one of them loses, those that are still to come make up for, as far as their inputs go together. Minimises |X (W - W')^T|^2.

- Scales and zero points are those of rounding to nearest, so columns can go in any order: largest inputs first, while there are
  most others to make up for them ("act-order", without its cost when the matrix is read).
- From bottom to top, each layer on the stream that the rounded layers below it give.
- A token counts for the matrices that it is multiplied with to some end: in its phase, in a sublayer whose output somebody reads.
  Where prompts have matrices of their own (w8a8-int4), they are multiplied with the unrounded ones, and do not count.

Embedding and head stay rounded to nearest: where they are one matrix, what is right for the one is wrong for the other.

Shapes: B rows, T tokens, M tokens that count, N outputs, K inputs, C columns that are rounded together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers, scheduled
from voidprune.export.block_rounding import Rounded, quantize_rows, restore_numbers
from voidprune.export.quantize import Packing, matrix_format
from voidprune.healing.layer_windows import PhasedBatch, phased_batches, run_window
from voidprune.healing.readers import Branch, Part, next_reads
from voidprune.models.architecture import TensorNames
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.packed import BITS, BlockFormat
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Phase, Schedule

_DAMPING = 0.01
"""What is added to the sum of squares of every input, as a share of their mean: as the paper does, against too little data."""
_SQUARES = 6
"""Matrices [K, K] of float64 that are there at once: sums, their order, factors."""
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
        grams: dict[_SameInputs, Tensor] = {}
        unrounded: dict[nn.Module, Tensor] = {
            one.module: one.module.weight.detach().clone() for one in matrices if one.in_decode_graph_only
        }
        for stream in streams:
            with _watching(matrices, stream.batch, grams):
                _run_layer(model, schedule, stream, layer)
        found |= _round_in_place(grams)
        for stream in streams:
            with _prompts_through(unrounded, stream.batch):
                stream.states_BTH = _run_layer(model, schedule, stream, layer)
        advance(1)
    return found


def _round_in_place(grams: Mapping[_SameInputs, Tensor]) -> dict[str, Rounded]:
    """The matrices of a layer, by what their inputs are; the model's become what was rounded."""
    found = {}
    for same_inputs, gram_KK in grams.items():
        if not torch.isfinite(gram_KK).all():
            raise ModelError(
                "the model's hidden states overflow, so nothing says how to round its matrices",
                hint="leave --rounding out",
            )
        order = order_inputs(gram_KK)
        for matrix in same_inputs:
            weight_NK = matrix.module.weight
            found[matrix.name] = rounded = round_columns(weight_NK.detach().float(), order, matrix.blocks)
            restored_NK = restore_numbers(rounded, matrix.blocks)[:, : matrix.module.in_features]
            with torch.no_grad():
                weight_NK.copy_(torch.from_numpy(restored_NK))
    return found


def rounding_bytes(checkpoint: Checkpoint) -> int:
    """Memory that `round_layers` takes beside the model, about: the numbers, and the sums and factors of the widest matrix."""
    names = checkpoint.architecture.spec.tensors
    shapes = [
        record.shape
        for name, record in checkpoint.tensors.items()
        if len(record.shape) == 2 and names.layer_of(name) is not None
    ]
    widest = max((columns for _, columns in shapes), default=0)
    return sum(rows * columns for rows, columns in shapes) + _SQUARES * 8 * widest**2


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix that decode reads in 4 bits, by its `name` in the slim checkpoint.

    `phases`: those whose tokens it is multiplied with to some end. `in_decode_graph_only`: the prefill graph has another one.
    """

    name: str
    module: nn.Linear
    blocks: BlockFormat
    phases: frozenset[Phase]
    in_decode_graph_only: bool

    def counted_BT(self, batch: PhasedBatch) -> Tensor:  # noqa: N802  the shape of what it gives
        counted_BT = batch.counted_BT(self.phases)
        return counted_BT & batch.fed_back_BT if self.in_decode_graph_only else counted_BT


_SameInputs = tuple[_Matrix, ...]
"""Matrices that are given the same inputs, and for which the same tokens count."""


def _find_matrices(
    checkpoint: Checkpoint, schedule: Schedule, packing: Packing, module: nn.Module, *, layer: int, place: int
) -> Iterator[_Matrix]:
    names = checkpoint.architecture.spec.tensors
    for path, linear in module.named_modules():
        name = names.layer(place, f"{path}.weight")
        blocks = matrix_format(checkpoint, name, packing, Phase.DECODE)
        if not isinstance(linear, nn.Linear) or blocks is None or blocks.bits != min(BITS):
            continue
        phases = frozenset(phase for phase in Phase if _is_used(schedule, phase, layer, path, names))
        other = matrix_format(checkpoint, name, packing, Phase.PREFILL) != blocks
        yield _Matrix(name, linear, blocks, phases, in_decode_graph_only=other)


def _is_used(schedule: Schedule, phase: Phase, layer: int, path: str, names: TensorNames) -> bool:
    """Whether what a matrix makes of the tokens of a phase is read by somebody."""
    if path in names.mlp_matrices:
        return bool(next_reads(schedule, phase, Branch(layer, Part.MLP)))
    if path in (names.query, names.output):
        return bool(next_reads(schedule, phase, Branch(layer, Part.ATTENTION)))
    return schedule.actions(phase)[layer].writes_kv


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
def _watching(matrices: Sequence[_Matrix], batch: PhasedBatch, grams: dict[_SameInputs, Tensor]) -> Iterator[None]:
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
    for group in map(tuple, same.values()):
        inputs_BTK = given[group[0].module]
        counted_BT = group[0].counted_BT(batch).to(inputs_BTK.device)
        grams[group] = grams.get(group, 0.0) + _multiply(inputs_BTK[counted_BT].float())


def _multiply(inputs_MK: Tensor) -> Tensor:
    """x^T x: a product in float32, of inputs that are made to fit it, in float64."""
    device = "cpu" if inputs_MK.device.type == "mps" else inputs_MK.device  # which has no float64
    largest = inputs_MK.abs().amax() if len(inputs_MK) else inputs_MK.new_zeros(())
    if largest == 0:
        return torch.zeros(inputs_MK.shape[1], inputs_MK.shape[1], dtype=torch.float64, device=device)
    fitting_MK = inputs_MK / largest
    return (fitting_MK.mT @ fitting_MK).to(device).double() * largest.to(device).double().square()


@contextmanager
def _prompts_through(weights: Mapping[nn.Module, Tensor], batch: PhasedBatch) -> Iterator[None]:
    """Let what the prefill graph runs of a batch go through other `weights` of some linear layers while the block runs."""

    def correct(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fed_back_BT1 = batch.fed_back_BT.unsqueeze(-1).to(output.device)
        bias = module.bias if isinstance(module.bias, Tensor) else None
        return torch.where(fed_back_BT1, output, functional.linear(args[0], weights[module], bias))

    handles = [module.register_forward_hook(correct) for module in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    smallest = torch.finfo(torch.float32).tiny
    groups_K = order_K // blocks.numbers_in_block(num_columns)
    left_KN = weights_NK.to(device).mT[order_K]
    numbers_KN = torch.empty(num_columns, num_rows, dtype=torch.uint8, device=device)
    for start in range(0, num_columns, _CHUNK):
        stop = min(start + _CHUNK, num_columns)
        chunk_CN, upper_CC = left_KN[start:stop], upper_KK[start:stop, start:stop]
        scales_CN, points_CN = scales_GN[groups_K[start:stop]], points_GN[groups_K[start:stop]]
        divisors_CN = torch.where(scales_CN.abs() < smallest, torch.inf, scales_CN)  # whose numbers are then all 0
        losses_CN = torch.empty_like(chunk_CN)
        for column in range(stop - start):
            number_N = (
                (chunk_CN[column] / divisors_CN[column]).round_().add_(points_CN[column]).clamp_(0, blocks.largest)
            )
            numbers_KN[start + column] = number_N
            meant_N = (number_N - points_CN[column]) * scales_CN[column]
            losses_CN[column] = (chunk_CN[column] - meant_N) / upper_CC[column, column]
            chunk_CN[column + 1 :].addr_(upper_CC[column, column + 1 :], losses_CN[column], alpha=-1)
        left_KN[stop:].addmm_(upper_KK[start:stop, stop:].mT, losses_CN, alpha=-1)
    numbers = nearest.numbers.reshape(num_rows, -1)  # with the padding of the last block
    numbers[:, order_K.cpu().numpy()] = numbers_KN.cpu().numpy().T
    return nearest._replace(numbers=numbers.reshape(nearest.numbers.shape))
