"""A model and a schedule become a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from voidprune.errors import ModelError
from voidprune.execution.manifest import Manifest, Parity
from voidprune.export.bundle import FORMATS, export_bundle
from voidprune.export.hf_checkpoint import DEFAULT_SHARD_BYTES, slim_bytes, slim_tensors
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.tensors import fetch_tensors, missing_bytes
from voidprune.pipeline.models import default_provider
from voidprune.pipeline.progress import Track, untracked
from voidprune.quality.parity import verify_bundle
from voidprune.schedule import Schedule


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
    precision: str = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    provider: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    accept: Callable[[Path], None] | None = None,
    track: Track = untracked,
) -> Manifest:
    """Export a bundle, verified against the source model before it is published. Raises every VoidpruneError of the way.

    `accept` gets the staged folder once it is verified, and may refuse it by raising: `gates.gate_bundle`. Of a checkpoint that
    was opened on the Hub, only the tensors of kept layers are fetched.
    """
    provider = provider or default_provider()
    schedule.check_model(checkpoint.identity, place="the schedule")
    needed = slim_tensors(checkpoint, schedule.union)
    if missing := missing_bytes(needed):
        with track("fetching", missing, "bytes") as advance:
            fetch_tensors(needed, advance=advance)
    with ExitStack() as copying:
        total = slim_bytes(checkpoint, schedule.union, precision=precision)
        advance = copying.enter_context(track("copying", total, "bytes"))

        def verify(stage: Path) -> Parity:
            copying.close()
            with track("verifying", None, "steps"):
                parity = verify_bundle(stage, source=checkpoint, schedule=schedule, provider=provider, seed=seed)
            if accept is not None:
                accept(stage)
            return parity

        return export_bundle(
            checkpoint,
            schedule,
            folder,
            verify=verify,
            formats=tuple(formats),
            precision=precision,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            advance=advance,
        )
