"""Do graphs that hold keys and values in 8 bits equal their reference: torch, with a cache that rounds alike?

Everything else about such a bundle is compared without that rounding (`parity.py`): wherever a number lies between two steps, two
right answers may be one apart. Of 41 tiny models of all families, 31 were as near to this reference as without rounding, and the
others within 7 % of what rounding itself changes (float32). Allowed is what rounding changes, and what was allowed without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from voidprune.execution.manifest import Manifest, Parity, read_manifest
from voidprune.execution.reference import ScheduledModel, scheduled
from voidprune.execution.rounded_cache import RoundedCache
from voidprune.execution.session import BundleSession
from voidprune.export.rounded_kv import bundle_steps, hold_exactly
from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.models.pretrained import load_model
from voidprune.quality.driving import Cached, Drive, OnePass, largest_difference, require
from voidprune.quality.layer_streaming import streamed_model
from voidprune.quality.packed_parity import PackedMeaning, choose_drive
from voidprune.quality.variants import with_graphs
from voidprune.schedule import Schedule

NUM_PASSES = 4
"""Runs of a model or a bundle in `check_kv`."""


@contextmanager
def with_exact_kv(folder: Path) -> Iterator[Path]:
    """The bundle with graphs that hold keys and values as they compute them, while the block runs."""
    with with_graphs(folder, replace(read_manifest(folder), kv_cache=None), hold_exactly) as exact:
        yield exact


def check_kv(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    exact: Parity,
    provider: str = "cpu",
    seed: int = 0,
    layer_streamed: bool = False,
    on_pass: Callable[[], None] = lambda: None,
) -> Parity:
    """`exact`, which is of the bundle `with_exact_kv`, with how far the graphs are off as they run and as they were exported, the
    larger of both. Raises ParityError."""
    manifest = read_manifest(folder)
    steps = bundle_steps(folder, manifest)
    opened = _opened(
        folder, manifest, source=source, schedule=schedule, provider=provider, seed=seed, layer_streamed=layer_streamed
    )
    with opened as (reference, drive):
        by_layer = {layer: steps[slot] for slot, layer in enumerate(reference.schedule.kv_layers)}
        expected = drive.run_reference(reference)
        on_pass()
        rounded = drive.run_reference(reference, lambda: RoundedCache(by_layer))
        on_pass()
    del reference  # and the model is out of memory, of which a session may take as much
    allowed = exact.tolerance if exact.rounded_tolerance is None else exact.rounded_tolerance
    tolerance = allowed + largest_difference(rounded, expected)
    found = []
    for as_exported in (False, True):
        session = BundleSession(folder, provider=provider, as_exported=as_exported, prepack=not as_exported)
        found.append(largest_difference(drive.run_session(session), rounded))
        del session
        require(found[-1], tolerance, what=f"the ONNX graphs on {provider}, which hold K/V in 8 bits,")
        on_pass()
    return replace(exact, kv=max(found), kv_tolerance=tolerance)


@contextmanager
def _opened(
    folder: Path,
    manifest: Manifest,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str,
    seed: int,
    layer_streamed: bool,
) -> Iterator[tuple[ScheduledModel, Drive]]:
    """What the graphs mean but for their cache, run in float32, and what it is driven with."""
    if manifest.quantization is not None:
        drive = choose_drive(folder, manifest.quantization, schedule, seed=seed, layer_streamed=layer_streamed)
        meaning = PackedMeaning(
            folder, manifest.quantization, source, schedule, provider=provider, layer_streamed=layer_streamed
        )
        with meaning.reference() as (reference, _):
            yield reference, drive
        return
    slim, device = open_checkpoint(folder), "cuda" if provider == "cuda" else "cpu"
    renumbered = schedule.on_slim_model(slim.identity)
    if layer_streamed:
        streamed = streamed_model(slim, through=manifest.dtype, device=device)
        with streamed as model, scheduled(model, renumbered) as reference:
            yield reference, OnePass.choose(slim, schedule.boundary, seed=seed)
    else:
        with scheduled(load_model(folder, device=device), renumbered) as reference:
            yield reference, Cached.choose(slim, seed=seed)
