"""Are the files of a bundle those that were exported? Sizes, headers and graphs always; every byte on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from voidprune import artifacts
from voidprune.errors import ArtifactError, CheckpointError
from voidprune.execution.manifest import Manifest
from voidprune.models.checkpoint import read_header, weights_hash

_HINT = "export the model again, or copy the whole folder again"


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    verify_hashes: bool = False,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Raise CheckpointError for weights, and ArtifactError for graphs, that are not those of the manifest.

    The graphs say where in the weight files each tensor lies, so weights of another layout would give wrong logits without a
    word: sizes and headers are compared in any case, and so are the graphs themselves, kilobytes each. Damage within a tensor is
    only found with `verify_hashes`, which reads every file; `advance` is told the bytes that were read for it.
    """
    for name in manifest.weight_files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}", hint=_HINT)
        size, expected = (folder / name).stat().st_size, manifest.sizes[name]
        if size != expected:
            raise CheckpointError(
                f"{folder / name} has {size:,} bytes; it was exported with {expected:,}: truncated, damaged or swapped",
                hint=_HINT,
            )
        read_header(folder / name)
    if weights_hash(folder) != manifest.weights_header:
        raise CheckpointError(
            f"the header of the weights in {folder} is not the one that the graphs were written for", hint=_HINT
        )
    for graph in manifest.graphs.values():
        _check_hash(folder, graph.file, manifest, error=ArtifactError)
    if verify_hashes:
        for name in manifest.files:
            error = CheckpointError if name in manifest.weight_files else ArtifactError
            _check_hash(folder, name, manifest, error=error, advance=advance)


def _check_hash(
    folder: Path,
    name: str,
    manifest: Manifest,
    *,
    error: type[CheckpointError] | type[ArtifactError],
    advance: Callable[[int], None] = lambda _bytes: None,
) -> None:
    path = folder / name
    if not path.is_file():
        raise error(f"{folder} lacks {name}", hint=_HINT)
    if artifacts.file_hash(path, advance=advance) != manifest.files.get(name):
        raise error(f"{path} is not the file that was exported: swapped, edited or damaged", hint=_HINT)
