"""Do graphs with packed matrices equal their reference: the source model, run in torch with what these matrices mean?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.execution.manifest import Manifest, Parity, read_manifest
from voidprune.execution.packing_record import Quantization
from voidprune.execution.reference import ScheduledModel, scheduled
from voidprune.execution.reference_by_phase import scheduled_by_phase
from voidprune.execution.session import BundleSession
from voidprune.export.onnx_graph import multiply_exactly
from voidprune.models.checkpoint import Checkpoint, open_packed
from voidprune.models.packed import activation_dtype
from voidprune.quality.driving import (
    TOLERANCE,
    Cached,
    Drive,
    OnePass,
    largest_difference,
    require,
    require_finite,
    require_finite_tolerance,
)
from voidprune.quality.layer_streaming import resident_model, streamed_model
from voidprune.quality.variants import with_graphs
from voidprune.schedule import Phase, Schedule


def check_packed(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str = "cpu",
    seed: int = 0,
    layer_streamed: bool = False,
    on_pass: Callable[[], None] = lambda: None,
) -> Parity:
    """Compare graphs that read packed matrices with the source model, run in float32 with what these matrices mean.

    Graphs without rounding of activations must stay within TOLERANCE, as they are exported. Those that round, as our runner opens
    them, may be twice as far from the reference as the reference is when what its linear layers read is rounded alike; those that
    compute in 16 bits, twice as far as torch is when it runs what the matrices mean in these 16 bits. With
    `layer_streamed`, decoder layers are in memory one at a time, and compared is one pass without a cache, or, where each phase
    has its matrices, two short conversations. `on_pass` is called after each run of a model.
    Raises ParityError, ModelError.
    """
    manifest = read_manifest(folder)
    quantization = manifest.quantization
    assert quantization is not None
    drive = choose_drive(folder, quantization, schedule, seed=seed, layer_streamed=layer_streamed)
    meaning = PackedMeaning(folder, quantization, source, schedule, provider=provider, layer_streamed=layer_streamed)
    with meaning.reference() as (reference, models):
        expected = drive.run_reference(reference)
        require_finite(expected, name=source.name)
        on_pass()
        exact_tolerance, tolerance = TOLERANCE, None
        if quantization.computes_in_16_bits:
            dtype = activation_dtype(quantization.activations)
            with meaning.model(Phase.DECODE, dtype) as model, scheduled(model, schedule) as in_16_bits:
                exact_tolerance = 2 * largest_difference(drive.run_reference(in_16_bits), expected)
            hint = "export with --activations bf16, or on a CPU with --activations int8"
            require_finite_tolerance(exact_tolerance, dtype=dtype, hint=hint)
            on_pass()
        if quantization.activations == "int8":
            with ExitStack() as rounded_by:
                for phase, model in models.items():
                    rounded_by.enter_context(_rounded_activations(model, quantization, phase))
                tolerance = 2 * largest_difference(drive.run_reference(reference), expected)
            on_pass()
    del models, reference
    rounded = None
    if tolerance is not None:
        rounded = largest_difference(drive.run_session(BundleSession(folder, provider=provider)), expected)
        require(rounded, tolerance, what=f"the ONNX graphs on {provider}, which round activations to 8 bits,")
        on_pass()
    with _without_rounding(folder, manifest) as exact:
        session = BundleSession(exact, provider=provider, as_exported=True)
        onnx = largest_difference(drive.run_session(session), expected)
    require(onnx, exact_tolerance, what=f"the ONNX graphs on {provider}")
    on_pass()
    return Parity(
        hf=None, onnx=onnx, tolerance=exact_tolerance, rounded=rounded, rounded_tolerance=tolerance, **drive.counts
    )


def choose_drive(
    folder: Path, quantization: Quantization, schedule: Schedule, *, seed: int, layer_streamed: bool
) -> Drive:
    """What graphs with packed matrices and their reference are driven with."""
    packed = open_packed(folder / quantization.file)
    if not layer_streamed:
        return Cached.choose(packed, seed=seed)
    one_pass = OnePass.choose(packed, schedule.boundary, seed=seed)
    return one_pass.in_phases() if quantization.differs_by_phase else one_pass


@dataclass(frozen=True)
class PackedMeaning:
    """The source model with what the packed matrices of a bundle mean, under its schedule."""

    folder: Path
    quantization: Quantization
    source: Checkpoint
    schedule: Schedule
    provider: str
    layer_streamed: bool

    @contextmanager
    def model(self, phase: Phase, dtype: str = "F32") -> Iterator[PreTrainedModel]:
        """With the matrices of a phase, run in `dtype`."""
        packed = open_packed(self.folder / self.quantization.file, phase=phase)
        meant = _meant_by(packed, self.source, self.schedule)
        device = "cuda" if self.provider == "cuda" else "cpu"
        dropped = set(range(self.schedule.num_layers)) - set(self.schedule.union)
        if self.layer_streamed:
            with streamed_model(meant, through=dtype, dtype=dtype, device=device, dropped=dropped) as streamed:
                yield streamed
        else:
            yield resident_model(meant, dtype=dtype, device=device, dropped=dropped)

    @contextmanager
    def reference(self) -> Iterator[tuple[ScheduledModel, dict[Phase, PreTrainedModel]]]:
        """Run in float32; and the model of each phase that has one."""
        with ExitStack() as opened:
            models = {Phase.DECODE: opened.enter_context(self.model(Phase.DECODE))}
            running = scheduled(models[Phase.DECODE], self.schedule)
            if self.quantization.differs_by_phase:
                models[Phase.PREFILL] = opened.enter_context(self.model(Phase.PREFILL))
                running = scheduled_by_phase(models[Phase.PREFILL], models[Phase.DECODE], self.schedule)
            yield opened.enter_context(running), models


def _meant_by(packed: Checkpoint, source: Checkpoint, schedule: Schedule) -> Checkpoint:
    """The source with the packed matrices, norms and biases of a bundle in the place of its own."""
    names = source.architecture.spec.tensors
    tensors = dict(source.tensors)
    if source.architecture.tied_embeddings:
        tensors.pop(f"{names.head}.weight", None)
    for name, record in packed.tensors.items():
        place = names.layer_of(name)
        tensors[name if place is None else names.layer(schedule.union[place[0]], place[1])] = record
    return replace(source, tensors=tensors)


@contextmanager
def _rounded_activations(model: PreTrainedModel, quantization: Quantization, phase: Phase) -> Iterator[None]:
    """Linear layers read what `MatMulNBits` with accuracy_level 4 multiplies: blocks of 8-bit numbers, the largest at 127.

    As onnxruntime does it: onnxruntime/core/mlas/lib/sqnbitgemm_kernel_avx512_int8_blklen32.h and its like, QuantizeARow.
    Where a phase multiplies rows, a block is all that a token brings to a product; only the head keeps its own.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (value,) = args
        whole = quantization.multiplies_rows(phase) and module is not head
        block_size = value.shape[-1] if whole else quantization.block_size
        padded = nn.functional.pad(value, (0, -value.shape[-1] % block_size))
        blocks = padded.reshape(*padded.shape[:-1], -1, block_size)
        scales = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(scales > 0, (blocks / scales).round() * scales, 0.0)
        return (rounded.flatten(-2)[..., : value.shape[-1]],)

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(round_input) for module in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_rounding(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """The bundle with graphs that do not round activations, while the block runs."""
    if manifest.quantization is None or manifest.quantization.activations != "int8":
        yield folder
        return
    with with_graphs(folder, manifest, multiply_exactly) as exact:
        yield exact
