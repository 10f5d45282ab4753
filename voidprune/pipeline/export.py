"""A model and a schedule become a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from voidprune.errors import ModelError, RuntimeProviderError
from voidprune.execution.manifest import Manifest, Parity, is_bundle, read_manifest
from voidprune.export.bundle import FORMATS, RoundedKv, check_kv_cache, check_packing, export_bundle
from voidprune.export.hf_checkpoint import DEFAULT_SHARD_BYTES, slim_bytes, slim_tensors
from voidprune.export.quantize import Packing, packed_bytes
from voidprune.models.checkpoint import PRECISIONS, Checkpoint
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.packed import activation_dtype, multiplies_rows
from voidprune.models.pretrained import check_quantized_runs
from voidprune.models.tensors import fetch_tensors, missing_bytes
from voidprune.pipeline.models import default_provider
from voidprune.pipeline.plan import Calibrated
from voidprune.pipeline.precision import PackingRequest, choose_rounding, measure_fidelity
from voidprune.pipeline.progress import Track, untracked
from voidprune.quality.parity import count_passes, verify_bundle
from voidprune.schedule import Phase, Schedule


def default_formats(checkpoint: Checkpoint) -> tuple[tuple[str, ...], str | None]:
    """What is written of a model when nobody says it: all formats that it has; and why, where that is not all there are."""
    try:
        describe_graph_architecture(checkpoint.config, checkpoint.architecture.spec)
    except ModelError as error:
        return ("hf",), f"only a slim checkpoint is written (--format hf): {error.message}"
    return FORMATS, None


def export_model(
    checkpoint: Checkpoint,
    schedule: Schedule,
    folder: Path,
    *,
    formats: Iterable[str] = FORMATS,
    layout: str = "pair",
    precision: str = "keep",
    operators: str = "ort",
    packing: PackingRequest | Packing | None = None,
    kv: Calibrated | RoundedKv | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    provider: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    accept: Callable[[Path], None] | None = None,
    unverified: bool = False,
    track: Track = untracked,
) -> Manifest:
    """Export a bundle, verified against the source model before it is published. Raises every VoidpruneError of the way.

    A quantized checkpoint may be published `unverified`, because running it takes packages or devices that are not everywhere;
    its manifest and model card say so.

    With `packing`, the graphs read packed matrices, and `precision` is that of the slim checkpoint, where one is written. What
    packing changes is measured where bits are asked for (PackingRequest), not where they are given. With `kv`, the graphs hold keys
    and values in 8 bits, with steps that are measured on it, or with these steps; what that changes is measured with the former.

    `accept` gets the staged folder once it is verified, and may refuse it by raising: `gates.gate_bundle`. Of a checkpoint that
    was opened on the Hub, only the tensors of kept layers are fetched.

    A bundle under its own schedule, such as a healed model, stays what it is: the schedule and the layer numbers of the original
    model are carried on.
    """
    provider = provider or default_provider()
    schedule.check_model(checkpoint.identity, place="the schedule")
    formats = tuple(formats)
    check_graphs(
        checkpoint,
        formats=formats,
        layout=layout,
        precision=precision,
        operators=operators,
        packing=packing,
        rounds_kv=kv is not None,
        provider=provider,
    )
    _check_verifiable(checkpoint, unverified=unverified)
    needed = slim_tensors(checkpoint, schedule.union)
    if missing := missing_bytes(needed):
        with track("fetching", missing, "bytes") as advance:
            fetch_tensors(needed, advance=advance)
    chosen = choose_rounding(packing, checkpoint, schedule, kv=kv, track=track)
    with ExitStack() as copying:
        total = 0
        if chosen.packing is not None:
            total += packed_bytes(checkpoint, schedule.union, chosen.packing)
        if chosen.packing is None or "hf" in formats:
            total += slim_bytes(checkpoint, schedule.union, precision=precision)
        advance = copying.enter_context(track("copying", total, "bytes"))

        def verify(stage: Path) -> Parity | None:
            copying.close()
            parity = None
            if not unverified:
                with track("verifying", count_passes(stage), "runs") as advance_runs:
                    parity = verify_bundle(
                        stage,
                        source=checkpoint,
                        schedule=schedule,
                        provider=provider,
                        seed=seed,
                        on_pass=lambda: advance_runs(1),
                    )
            if accept is not None:
                accept(stage)
            return parity

        return export_bundle(
            checkpoint,
            schedule,
            folder,
            verify=verify,
            formats=formats,
            layout=layout,
            precision=precision,
            operators=operators,
            packing=chosen.packing,
            rounded=chosen.rounded,
            kv=chosen.kv,
            measure=lambda stage: measure_fidelity(
                checkpoint, schedule, stage, chosen.samples, provider=provider, track=track
            ),
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            advance=advance,
            made_of=_own_manifest(checkpoint, schedule),
        )


def check_graphs(
    checkpoint: Checkpoint,
    *,
    formats: Collection[str],
    precision: str,
    operators: str,
    packing: PackingRequest | Packing | None,
    rounds_kv: bool = False,
    layout: str = "pair",
    provider: str | None = None,
) -> None:
    """Refuse, before layers are chosen or anything is copied, graphs that could not be written or not be run.

    Raises ModelError; RuntimeProviderError for bf16 on the CPU, and for products of rows (w8a8) and for attention in float32
    anywhere else.
    """
    if packing is not None:
        check_packing(packing, formats=formats, operators=operators, layout=layout)
    if rounds_kv:
        check_kv_cache(formats=formats, operators=operators)
    if "onnx" not in formats:
        return
    shape = describe_graph_architecture(checkpoint.config, checkpoint.architecture.spec)
    provider = provider or default_provider()
    if shape.score_softcap and provider == "cuda":
        raise RuntimeProviderError(
            f"{checkpoint.name} caps attention scores, and onnxruntime leaves that out on CUDA",
            hint="use --provider cpu, or --format hf",
        )
    rows = packing is not None and multiplies_rows(packing.precision, Phase.PREFILL)
    if packing is not None and rows and operators == "ort" and provider == "cuda":
        raise RuntimeProviderError(
            f"{packing.precision} multiplies by an operator (QGemm) for which onnxruntime has no kernel on CUDA",
            hint="export with --precision int8 or int4, or use --provider cpu",
        )
    if packing is not None and operators == "standard" and provider == "cuda":
        raise RuntimeProviderError(
            "onnxruntime has no kernel on CUDA for matrices packed as the standard has them (DequantizeLinear of blocks)",
            hint="export with --ops ort, or use --provider cpu",
        )
    dtype = PRECISIONS.get(precision, checkpoint.dtype) if packing is None else activation_dtype(packing.activations)
    if dtype == "BF16" and provider == "cpu":
        raise RuntimeProviderError(
            f"the graphs of {checkpoint.name} would be in bf16, for which onnxruntime has no kernels on the CPU",
            hint="export with --precision fp32, or use --provider cuda or --format hf"
            if packing is None
            else "export with --activations int8, or use --provider cuda",
        )
    if dtype == "F32" and provider == "cuda" and operators == "ort":
        raise RuntimeProviderError(
            f"the graphs of {checkpoint.name} would attend in float32, for which onnxruntime has no kernel on CUDA"
            " (GroupQueryAttention)",
            hint="export with --precision fp16 or bf16, or with --ops standard, or use --provider cpu"
            if packing is None
            else "export with --activations fp16 or bf16, or use --provider cpu",
        )


def own_schedule(checkpoint: Checkpoint) -> Schedule | None:
    """The schedule of a bundle, for its layers as they are numbered there; None where the checkpoint is no bundle."""
    if not is_bundle(checkpoint.folder):
        return None
    return read_manifest(checkpoint.folder).schedule.on_slim_model(checkpoint.identity)


def _own_manifest(checkpoint: Checkpoint, schedule: Schedule) -> Manifest | None:
    own = own_schedule(checkpoint)
    return None if own is None or own != schedule else read_manifest(checkpoint.folder)


def _check_verifiable(checkpoint: Checkpoint, *, unverified: bool) -> None:
    """Refuse before anything is copied what could not be verified after it, and `unverified` where there is no need for it."""
    if not checkpoint.config.get("quantization_config"):
        if unverified:
            raise ModelError(
                f"{checkpoint.name} can be verified; only quantized checkpoints may be published unverified",
                hint="leave --unverified out",
            )
        return
    if unverified:
        return
    hint = "add --unverified to publish it with a model card that says that nobody ran it"
    if checkpoint.revision is not None:  # and so layer by layer, for which its weights would have to be decoded
        raise ModelError(
            f"{checkpoint.name} is quantized: it cannot be verified from the layers that are kept",
            hint=f"{hint}; or download it all and give its folder",
        )
    try:
        check_quantized_runs(checkpoint.config)
    except ModelError as error:
        raise ModelError(
            f"{checkpoint.name} cannot be verified: {error.message}", hint=f"install that; or {hint}"
        ) from error
