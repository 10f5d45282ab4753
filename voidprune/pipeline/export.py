"""A model and a schedule become a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from voidprune.errors import ModelError
from voidprune.execution.manifest import Manifest, Parity
from voidprune.export.bundle import FORMATS, export_bundle
from voidprune.models.checkpoint import Checkpoint, precision_name
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.pretrained import load_model
from voidprune.pipeline.models import default_provider
from voidprune.quality.parity import check_bundle
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
    provider: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    accept: Callable[[Path], None] | None = None,
) -> Manifest:
    """Export a bundle, verified against the source model before it is published. Raises every VoidpruneError of the way.

    `accept` gets the staged folder once it is verified, and may refuse it by raising: `gates.gate_bundle`.
    """
    provider = provider or default_provider()
    dtype = precision_name(checkpoint.dtype) if precision == "keep" else precision

    def verify(stage: Path) -> Parity:
        device = "cuda" if provider == "cuda" else "cpu"
        parity = check_bundle(
            stage,
            source=load_model(checkpoint.folder, dtype=dtype, device=device),  # in no variable: free again for `accept`
            schedule=schedule,
            provider=provider,
            seed=seed,
        )
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
        overwrite=overwrite,
    )
