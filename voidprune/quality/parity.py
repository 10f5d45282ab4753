"""Does an export equal its reference? Logits of prefill, decode steps and a second turn, at batch 1 and 2.

The reference is the *source* model under the schedule; compared with it are the slim checkpoint in stock transformers under
the renumbered schedule, and the graphs under onnxruntime. All are driven with the same token ids, so that one difference does
not hide the next. Graphs with packed matrices are compared with the source run with what these matrices mean.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from voidprune.errors import ParityError
from voidprune.execution.manifest import Parity, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import (
    Checkpoint,
    open_checkpoint,
    precision_name,
    stored_bytes,
)
from voidprune.models.pretrained import load_model
from voidprune.quality.driving import (
    TOLERANCE,
    Array,
    Cached,
    OnePass,
    largest_difference,
    require,
    require_finite,
    require_finite_tolerance,
)
from voidprune.quality.kv_parity import NUM_PASSES, check_kv, with_exact_kv
from voidprune.quality.layer_streaming import largest_part, streamed_model
from voidprune.quality.packed_parity import check_packed
from voidprune.schedule import Schedule

HEADROOM = 1.25
"""Memory that a model takes while it runs, per byte of its weights."""


def verify_bundle(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str = "cpu",
    seed: int = 0,
    available_bytes: int | None = None,
    on_pass: Callable[[], None] = lambda: None,
) -> Parity:
    """Compare a staged bundle with the checkpoint that it was made of, in as much memory as there is.

    Source and copy are never in memory together. Where one of them does not fit into `available_bytes` (by default what the
    machine has free), or only the kept layers of the source are on this disk, decoder layers are loaded one at a time.
    `on_pass` is called after each run of a model, `count_passes` times in all.
    Raises ParityError, ModelError.
    """
    if available_bytes is None:
        available_bytes = free_memory("cuda" if provider == "cuda" else "cpu")
    verify = functools.partial(
        _verify,
        source=source,
        schedule=schedule,
        provider=provider,
        seed=seed,
        available_bytes=available_bytes,
        on_pass=on_pass,
    )
    if read_manifest(folder).kv_cache is None:
        return verify(folder)
    with with_exact_kv(folder) as without:
        exact = verify(without)
    return check_kv(
        folder,
        source=source,
        schedule=schedule,
        exact=exact,
        provider=provider,
        seed=seed,
        layer_streamed=exact.layer_streamed,
        on_pass=on_pass,
    )


def _verify(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str,
    seed: int,
    available_bytes: int,
    on_pass: Callable[[], None],
) -> Parity:
    """Of a bundle whose graphs hold K/V as they compute them."""
    manifest, slim = read_manifest(folder), open_checkpoint(folder)
    device = "cuda" if provider == "cuda" else "cpu"
    copy_bytes = sum(4 * math.prod(record.shape) for record in slim.tensors.values())
    needed = max(_loaded_bytes(source, "F32" if slim.is_packed else manifest.dtype), copy_bytes)
    if manifest.quantization is not None and manifest.quantization.differs_by_phase:
        needed = max(needed, 2 * _loaded_bytes(source, "F32"))  # a model for each phase
    if manifest.quantization is not None and manifest.quantization.computes_in_16_bits:
        both = sum(_loaded_bytes(source, dtype) for dtype in ("F32", "F16"))  # the reference, and what it is judged by
        needed = max(needed, both)
    fits = needed * HEADROOM <= available_bytes
    if not fits:
        _require_layer_fits(source, available_bytes)
    if slim.is_packed:
        return check_packed(
            folder,
            source=source,
            schedule=schedule,
            provider=provider,
            seed=seed,
            layer_streamed=not fits,
            on_pass=on_pass,
        )
    if fits and source.revision is None:
        dtype = precision_name(manifest.dtype)
        found = _check_whole(
            folder,
            lambda: load_model(source.folder, dtype=dtype, device=device),
            schedule=schedule,
            provider=provider,
            seed=seed,
            on_pass=on_pass,
        )
    else:
        _require_layer_fits(source, available_bytes)
        found = check_layers(folder, source=source, schedule=schedule, provider=provider, seed=seed, on_pass=on_pass)
    if manifest.quantization is None:
        return found
    packed = check_packed(
        folder, source=source, schedule=schedule, provider=provider, seed=seed, layer_streamed=not fits, on_pass=on_pass
    )
    return replace(packed, hf=found.hf, tolerance=max(found.tolerance, packed.tolerance))  # each was held to its own


def _require_layer_fits(source: Checkpoint, available_bytes: int) -> None:
    if (part := largest_part(source)) * HEADROOM > available_bytes:
        raise ParityError(
            f"one layer of {source.name} takes {part:,} bytes in float32; {available_bytes:,} are free",
            hint="nothing unverified is published: export on a machine with more memory",
        )


def _loaded_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(stored_bytes(record, dtype) for record in checkpoint.tensors.values())


def free_memory(device: str) -> int:
    """Bytes that a model may take on a device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    status = Path("/proc/meminfo")
    if status.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_layers(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str = "cpu",
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> Parity:
    """Compare a bundle with its source, one decoder layer in memory at a time.

    One pass over prompts and responses in which every token runs the actions of its phase equals prefill and cached decode (a
    test of `execution/reference.py`), so each side is read once. Both are run in float32, with the weights as the bundle stores
    them. Layers that run in neither phase are left out, and need not be there. Raises ParityError.
    """
    manifest, slim = read_manifest(folder), open_checkpoint(folder)
    renumbered = schedule.on_slim_model(slim.identity)
    device = "cuda" if provider == "cuda" else "cpu"
    drive = OnePass.choose(slim, schedule.boundary, seed=seed)

    def run(checkpoint: Checkpoint, actions: Schedule, *, dtype: str = "F32") -> list[Array]:
        dropped = set(range(actions.num_layers)) - set(actions.union)
        with (
            streamed_model(checkpoint, through=manifest.dtype, dtype=dtype, device=device, dropped=dropped) as model,
            scheduled(model, actions) as running,
        ):
            logits = drive.run_reference(running)
        on_pass()
        return logits

    expected = run(source, schedule)
    require_finite(expected, name=source.name)
    hf = largest_difference(run(slim, renumbered), expected)
    require(hf, TOLERANCE, what="the slim checkpoint in transformers")
    onnx, tolerance = None, TOLERANCE
    if manifest.graphs and manifest.quantization is None:
        if manifest.dtype != "F32":
            stored = run(slim, renumbered, dtype=manifest.dtype)
            tolerance = max(TOLERANCE, 2 * largest_difference(stored, expected))
            require_finite_tolerance(tolerance, dtype=manifest.dtype, hint="export with --precision fp32")
        onnx = largest_difference(drive.run_session(BundleSession(folder, provider=provider, prepack=False)), expected)
        require(onnx, tolerance, what=f"the ONNX graphs on {provider}")
        on_pass()
    return Parity(hf=hf, onnx=onnx, tolerance=tolerance, **drive.counts)


def check_bundle(
    folder: Path,
    *,
    source: PreTrainedModel,
    schedule: Schedule,
    provider: str = "cpu",
    seed: int = 0,
    on_pass: Callable[[], None] = lambda: None,
) -> Parity:
    """`verify_bundle` with a source that is loaded already, in the dtype of the bundle, because it serves several checks."""
    return _check_whole(folder, lambda: source, schedule=schedule, provider=provider, seed=seed, on_pass=on_pass)


def count_passes(folder: Path) -> int:
    """How often `verify_bundle` and `check_bundle` run a model or a bundle, where float32 does not have to be judged by float64."""
    manifest = read_manifest(folder)
    passes = 0
    if manifest.has_checkpoint:
        passes += 2 + (manifest.dtype != "F32")
    passes += NUM_PASSES if manifest.kv_cache is not None else 0
    if (quantization := manifest.quantization) is not None:
        return passes + {"int8": 4, "fp32": 2}.get(quantization.activations, 3)
    return passes + bool(manifest.graphs)


def _check_whole(
    folder: Path,
    load_source: Callable[[], PreTrainedModel],
    *,
    schedule: Schedule,
    provider: str,
    seed: int,
    on_pass: Callable[[], None],
) -> Parity:
    """Raises ParityError, saying what differs and by how much.

    In float32 all differences stay within TOLERANCE. In 16 bits two right answers differ with the order of sums, so there the
    graphs are compared with the slim checkpoint run in float32, and may be twice as far from it as torch is when it runs the
    same weights in 16 bits. A float32 model whose logits differ by more than TOLERANCE is judged in the same way, by its products
    in float64: where torch itself rounds so much, its answer is no measure.
    """
    manifest = read_manifest(folder)
    slim = open_checkpoint(folder)
    renumbered = schedule.on_slim_model(slim.identity)
    drive = Cached.choose(slim, seed=seed)

    def run_source() -> tuple[list[Array], str]:
        source = load_source()
        with scheduled(source, schedule) as reference:
            found = drive.run_reference(reference), str(source.device)
        on_pass()
        return found

    def run_slim(dtype: str, *, in_float64: bool = False) -> list[Array]:
        model = load_model(folder, dtype=dtype, device=device)
        with scheduled(model.double() if in_float64 else model, renumbered) as copy:
            logits = drive.run_reference(copy)
        on_pass()
        return logits

    expected, device = run_source()  # and the source is out of memory again, where nobody else holds it
    if manifest.dtype == "F32":
        require_finite(expected, name=manifest.source)
    stored = run_slim(precision_name(manifest.dtype))
    truth, tolerance = expected, TOLERANCE
    if manifest.dtype != "F32":
        truth = run_slim("fp32")
        tolerance = 2 * largest_difference(stored, truth)
        hint = "export with --precision fp32; if that says so too, it is the source"
        require_finite_tolerance(tolerance, dtype=manifest.dtype, hint=hint)
    hf = largest_difference(stored, expected)
    found = None
    if manifest.graphs and manifest.quantization is None:
        found = drive.run_session(BundleSession(folder, provider=provider, prepack=False))
        on_pass()
    if manifest.dtype == "F32" and max(hf, 0.0 if found is None else largest_difference(found, truth)) > TOLERANCE:
        truth = run_slim("fp32", in_float64=True)
        tolerance = max(TOLERANCE, 2 * largest_difference(stored, truth))
    require(hf, tolerance, what="the slim checkpoint in transformers")
    onnx = None
    if found is not None:
        onnx = largest_difference(found, truth)
        require(onnx, tolerance, what=f"the ONNX graphs on {provider}")
    return Parity(hf=hf, onnx=onnx, tolerance=tolerance, **drive.counts)
