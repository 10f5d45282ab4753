"""A bundle is timed beside the whole model."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from voidprune import artifacts
from voidprune.errors import ModelError, NoiseError
from voidprune.execution.manifest import Manifest, is_bundle, read_manifest
from voidprune.execution.providers import size_thread_pool
from voidprune.export.bundle import RoundedKv
from voidprune.export.quantize import LayerBits, Packing
from voidprune.export.rounded_kv import bundle_steps
from voidprune.models.checkpoint import Checkpoint, precision_name
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import default_provider, open_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.quality.bench import run_benchmark
from voidprune.schedule import Schedule, full_schedule


def benchmark_bundle(
    folder: Path,
    *,
    baseline: str,
    provider: str | None = None,
    threads: int | None = None,
    prompt_lengths: Sequence[int] = (128,),
    context_lengths: Sequence[int] = (128,),
    batch_sizes: Sequence[int] = (1,),
    num_new_tokens: int = 32,
    num_rounds: int = 15,
    max_spread: float = math.inf,
    seed: int = 0,
    track: Track = untracked,
) -> artifacts.Document:
    """Benchmark a bundle beside the whole model. What has no graphs yet is exported for the occasion, in the same precision.

    Raises NoiseError where the interval of a ratio is wider than `max_spread` times the ratio; one round has no intervals.
    """
    if threads is not None:
        size_thread_pool(threads)
    provider = provider or default_provider()
    manifest = read_manifest(folder)
    whole = open_model(baseline)
    with tempfile.TemporaryDirectory() as scratch:
        baseline_folder = whole.folder
        if is_bundle(whole.folder):
            _check_baseline(read_manifest(whole.folder), manifest, place=baseline)
        else:
            manifest.schedule.check_model(whole.identity, place=str(folder))
            baseline_folder = Path(scratch) / "baseline"
            schedule = full_schedule(whole.identity, boundary=manifest.schedule.boundary)
            kv = None if manifest.kv_cache is None else _steps_of_all_layers(folder, manifest, schedule)
            _export_baseline(whole, schedule, baseline_folder, manifest, kv=kv, provider=provider)
        pruned_folder = folder
        if not manifest.graphs:
            healed = open_model(str(folder))
            pruned_folder = Path(scratch) / "pruned"
            export_model(healed, manifest.schedule.on_slim_model(healed.identity), pruned_folder, provider=provider)
        with track("timing", num_rounds + 1, "rounds") as advance:
            benchmark = run_benchmark(
                {"whole model": baseline_folder, "pruned": pruned_folder},
                provider=provider,
                threads=threads,
                prompt_lengths=prompt_lengths,
                context_lengths=context_lengths,
                batch_sizes=batch_sizes,
                num_new_tokens=num_new_tokens,
                num_rounds=num_rounds,
                seed=seed,
                on_progress=advance,
            )
    if benchmark.widest is not None and benchmark.widest > max_spread:
        raise NoiseError(
            f"the interval of a ratio is {benchmark.widest:.0%} of the ratio over {num_rounds} rounds; "
            f"{max_spread:.0%} is allowed"
        )
    identity = manifest.schedule.model
    return {
        "schema": artifacts.schema_key("benchmark", 2),
        "model": identity.name,
        "model_fingerprint": identity.fingerprint,
        **benchmark.to_document(),
    }


def _export_baseline(
    whole: Checkpoint,
    schedule: Schedule,
    folder: Path,
    pruned: Manifest,
    *,
    kv: RoundedKv | None = None,
    provider: str,
) -> None:
    """The whole model, exported as a pruned one was, with the steps of keys and values. Of mixed bits, dropped layers get those of
    the head."""
    layout = "single" if len({graph.file for graph in pruned.graphs.values()}) == 1 else "pair"
    export = functools.partial(
        export_model, whole, schedule, folder, layout=layout, operators=pruned.operators, kv=kv, provider=provider
    )
    if pruned.quantization is None:
        export(precision=precision_name(pruned.dtype))
        return
    packed = pruned.quantization
    known = dict(zip(pruned.kept_layers, packed.layer_bits, strict=True))
    packing = Packing(
        packed.precision,
        tuple(LayerBits(*known.get(layer, (packed.head_bits,) * 2)) for layer in range(schedule.num_layers)),
        packed.head_bits,
        block_size=packed.block_size,
        zero_points=packed.zero_points,
        activations=packed.activations,
    )
    export(formats=("onnx",), packing=packing)


def _steps_of_all_layers(folder: Path, pruned: Manifest, schedule: Schedule) -> RoundedKv:
    """The steps of a bundle's keys and values; layers that write none in it are only timed, and get those of its first slot."""
    assert pruned.kv_cache is not None
    steps = bundle_steps(folder, pruned)
    known = dict(zip(pruned.slots, (steps[slot] for slot in range(len(pruned.slots))), strict=True))
    return RoundedKv([known.get(layer, steps[0]) for layer in schedule.kv_layers], pruned.kv_cache.prompts)


def _check_baseline(baseline: Manifest, pruned: Manifest, *, place: str) -> None:
    """Raise where a bundle is not the whole model of another, in the same precision."""
    baseline.schedule.check_model(pruned.schedule.model, place=place)
    settings = [
        (
            one.precision,
            one.schedule.boundary,
            None if one.quantization is None else one.quantization.activations,
            None if one.kv_cache is None else one.kv_cache.dtype,
        )
        for one in (baseline, pruned)
    ]
    if not baseline.schedule.is_full or settings[0] != settings[1]:
        raise ModelError(
            f"{place} is not the whole model in {pruned.precision} with the boundary {pruned.schedule.boundary}"
            + ("" if pruned.quantization is None else f" and activations in {pruned.quantization.activations}")
            + f", and keys and values {'as computed' if pruned.kv_cache is None else f'in {pruned.kv_cache.dtype}'}",
            hint="give the model itself as --baseline",
        )
