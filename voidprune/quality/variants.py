"""A bundle with other graphs beside the same weights, for as long as it is looked at: to see what a part of its graphs changes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir

from voidprune import artifacts
from voidprune.execution.manifest import FILE as MANIFEST
from voidprune.execution.manifest import Manifest
from voidprune.export.onnx_graph import save_graph


@contextmanager
def with_graphs(folder: Path, manifest: Manifest, change: Callable[[onnx_ir.Model], None]) -> Iterator[Path]:
    """A folder with all that `manifest` says is in the bundle of `folder`, its graphs changed, while the block runs.

    It lies in the bundle: onnxruntime reads no weights from elsewhere. The manifest written there is the given one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        variant = Path(name)
        graphs = {graph.file for graph in manifest.graphs.values()}
        for file in manifest.sizes.keys() - graphs - {MANIFEST}:
            (variant / file).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / file, variant / file)
        files, sizes = dict(manifest.files), dict(manifest.sizes)
        for file in graphs:
            model = onnx_ir.load(folder / file)
            change(model)
            save_graph(model, variant / file)
            files[file] = artifacts.file_hash(variant / file)
            sizes[file] = (variant / file).stat().st_size
        document = replace(manifest, files=files, sizes=sizes).to_document()
        artifacts.write_file(variant / MANIFEST, artifacts.canonical_bytes(document))
        yield variant


def _link(file: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has none. onnxruntime refuses links that leave the folder."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)
