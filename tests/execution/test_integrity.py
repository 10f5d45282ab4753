"""Weights and graphs that are not those of the export are named when a bundle is loaded, not met as wrong logits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import onnx
import pytest

from tests.conftest import MakeBundle
from tests.tiny_models import TinyModel
from voidprune.errors import ArtifactError, CheckpointError
from voidprune.execution.manifest import read_manifest
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import WEIGHTS_FILE, copy_tensors, open_checkpoint
from voidprune.schedule import dropped_schedule

GRAPHS = ["prefill.onnx", "decode.onnx"]


@pytest.fixture
def copy(llama: TinyModel, make_bundle: MakeBundle, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    bundle = make_bundle(llama, dropped_schedule(llama.identity, {2, 3}))
    return shutil.copytree(bundle.folder, tmp_path / "bundle")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_files_as_they_were_exported(copy: Path) -> None:
    assert BundleSession(copy, verify_hashes=True).manifest == read_manifest(copy)


def test_truncated_weights(copy: Path) -> None:
    weights = copy / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated, damaged or swapped"):
        BundleSession(copy)


def test_broken_header(copy: Path) -> None:
    with (copy / WEIGHTS_FILE).open("r+b") as file:
        file.seek(8)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="broken header"):
        BundleSession(copy)


def test_missing_weights(copy: Path) -> None:
    (copy / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {WEIGHTS_FILE}"):
        BundleSession(copy)


def test_weights_of_another_size(copy: Path, llama: TinyModel) -> None:
    shutil.copyfile(llama.folder / WEIGHTS_FILE, copy / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="truncated, damaged or swapped"):
        BundleSession(copy)


def test_weights_in_another_order(copy: Path, tmp_path: Path) -> None:
    """The graphs refer to bytes: the same tensors at other places would give wrong logits without a word."""
    records = sorted(open_checkpoint(copy).tensors.items())
    copy_tensors(records, tmp_path / "sorted")
    assert (tmp_path / "sorted").stat().st_size == (copy / WEIGHTS_FILE).stat().st_size
    shutil.copyfile(tmp_path / "sorted", copy / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="is not the one that the graphs were written for"):
        BundleSession(copy)


def test_a_changed_weight_is_found_by_its_hash_only(copy: Path) -> None:
    flip_last_byte(copy / WEIGHTS_FILE)
    BundleSession(copy)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is not the file that was exported") as caught:
        BundleSession(copy, verify_hashes=True)
    assert caught.value.hint == "export the model again, or copy the whole folder again"


@pytest.mark.parametrize("name", GRAPHS)
def test_missing_and_damaged_graphs(copy: Path, name: str) -> None:
    flip_last_byte(copy / name)
    with pytest.raises(ArtifactError, match=re.escape(f"{name} is not the file that was exported")):
        BundleSession(copy)
    (copy / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=re.escape(f"{name} is not the file that was exported")):
        BundleSession(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"lacks {name}")):
        BundleSession(copy)


def test_swapped_graphs(copy: Path) -> None:
    (copy / "prefill.onnx").rename(copy / "other")
    (copy / "decode.onnx").rename(copy / "prefill.onnx")
    (copy / "other").rename(copy / "decode.onnx")
    with pytest.raises(ArtifactError, match=r"(prefill|decode)\.onnx is not the file that was exported"):
        BundleSession(copy)


def test_an_edited_graph_that_loads(copy: Path) -> None:
    """It points somewhere else in the same weights: right in every respect but the result."""
    model = onnx.load(copy / "decode.onnx", load_external_data=False)
    first, second = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [64, 96]][:2]
    first.external_data[1].value, second.external_data[1].value = (
        second.external_data[1].value,
        first.external_data[1].value,
    )
    onnx.save(model, copy / "decode.onnx")
    with pytest.raises(ArtifactError, match=r"decode\.onnx is not the file that was exported"):
        BundleSession(copy)


@pytest.mark.parametrize("name", ["config.json", "genai_config.json"])
def test_other_files_are_free_to_change_until_hashes_are_asked_for(copy: Path, name: str) -> None:
    (copy / name).write_text("{}" + (copy / name).read_text()[2:])
    BundleSession(copy)
    with pytest.raises(ArtifactError, match=re.escape(f"{name} is not the file that was exported")):
        BundleSession(copy, verify_hashes=True)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"lacks {name}")):
        BundleSession(copy, verify_hashes=True)
