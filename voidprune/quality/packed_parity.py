"""Do graphs with packed matrices equal their reference: the source model, run in torch with what these matrices mean?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune import artifacts
from voidprune.execution.manifest import FILE as MANIFEST
from voidprune.execution.manifest import Manifest, Parity, read_manifest
from voidprune.execution.packing_record import Quantization
from voidprune.execution.reference import scheduled
from voidprune.execution.reference_by_phase import scheduled_by_phase
from voidprune.execution.session import BundleSession
from voidprune.export.onnx_graph import multiply_exactly, save_graph
from voidprune.models.checkpoint import INDEX_FILE, Checkpoint, open_packed
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
    packed = open_packed(folder / quantization.file)
    device = "cuda" if provider == "cuda" else "cpu"
    dropped = set(range(schedule.num_layers)) - set(schedule.union)
    drive: Drive = Cached.choose(packed, seed=seed)
    if layer_streamed:
        one_pass = OnePass.choose(packed, schedule.boundary, seed=seed)
        drive = one_pass.in_phases() if quantization.differs_by_phase else one_pass
    with ExitStack() as opened:

        def load(phase: Phase, dtype: str = "F32") -> PreTrainedModel:
            meant = _meant_by(open_packed(folder / quantization.file, phase=phase), source, schedule)
            if layer_streamed:
                streamed = streamed_model(meant, through=dtype, dtype=dtype, device=device, dropped=dropped)
                return opened.enter_context(streamed)
            return resident_model(meant, dtype=dtype, device=device, dropped=dropped)

        models = {Phase.DECODE: load(Phase.DECODE)}
        running = scheduled(models[Phase.DECODE], schedule)
        if quantization.differs_by_phase:
            models[Phase.PREFILL] = load(Phase.PREFILL)
            running = scheduled_by_phase(models[Phase.PREFILL], models[Phase.DECODE], schedule)
        reference = opened.enter_context(running)
        expected = drive.run_reference(reference)
        require_finite(expected, name=source.name)
        on_pass()
        exact_tolerance, tolerance = TOLERANCE, None
        if packed.dtype != "F32":
            with scheduled(load(Phase.DECODE, packed.dtype), schedule) as in_16_bits:
                exact_tolerance = 2 * largest_difference(drive.run_reference(in_16_bits), expected)
            hint = "export with --activations bf16, or on a CPU with --activations int8"
            require_finite_tolerance(exact_tolerance, dtype=packed.dtype, hint=hint)
            on_pass()
        if quantization.activations == "int8":
            with ExitStack() as rounded_by:
                for phase, model in models.items():
                    rounded_by.enter_context(_rounded_activations(model, quantization, phase))
                tolerance = 2 * largest_difference(drive.run_reference(reference), expected)
            on_pass()
    del models, reference, running
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
    """The bundle with graphs that do not round activations, beside the same weights, while the block runs."""
    if manifest.quantization is None or manifest.quantization.activations != "int8":
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        exact = Path(name)
        for file in (*manifest.weight_files, INDEX_FILE):
            if (folder / file).is_file():
                _link(folder / file, exact / file)
        files, sizes = dict(manifest.files), dict(manifest.sizes)
        for graph in manifest.graphs.values():
            model = onnx_ir.load(folder / graph.file)
            multiply_exactly(model)
            save_graph(model, exact / graph.file)
            files[graph.file] = artifacts.file_hash(exact / graph.file)
            sizes[graph.file] = (exact / graph.file).stat().st_size
        document = replace(manifest, files=files, sizes=sizes).to_document()
        artifacts.write_file(exact / MANIFEST, artifacts.canonical_bytes(document))
        yield exact


def _link(file: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has none. onnxruntime refuses links that leave the folder."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)
