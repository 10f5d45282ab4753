"""Shards as transformers cuts them, whatever way the system can copy, and hashes of what was written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune import artifacts
from voidprune.errors import CheckpointError
from voidprune.models.checkpoint import layer_tensor_groups, layer_tensor_order, read_header, weights_hash
from voidprune.models.copying import (
    INDEX_FILE,
    WEIGHTS_FILE,
    copy_tensors,
    cut_shards,
    overwrite_tensors,
    write_weights,
)
from voidprune.models.tensors import TensorRecord, same_bytes

ALL = range(NUM_LAYERS)


def write(model: TinyModel, folder: Path, **options: Any) -> dict[str, str]:
    folder.mkdir()
    return write_weights(layer_tensor_groups(model.checkpoint, ALL), folder, **options)


def test_all_that_fits_is_one_file(llama: TinyModel, tmp_path: Path) -> None:
    hashes = write(llama, tmp_path / "out", max_shard_bytes=llama.checkpoint.num_bytes)
    assert [path.name for path in (tmp_path / "out").iterdir()] == list(hashes) == [WEIGHTS_FILE]
    copy_tensors(layer_tensor_order(llama.checkpoint, ALL), tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "out" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_shards_hold_every_tensor_once_within_the_limit(
    tiny_model: TinyModel, tmp_path: Path, dtype: str | None
) -> None:
    limit = 100_000
    hashes = write(tiny_model, tmp_path / "out", max_shard_bytes=limit, dtype=dtype)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    seen: dict[str, str] = {}
    for name, digest in hashes.items():
        assert artifacts.file_hash(tmp_path / "out" / name) == digest
        records = read_header(tmp_path / "out" / name)
        assert not seen.keys() & records.keys()
        seen |= dict.fromkeys(records, name)
        groups = layer_tensor_groups(tiny_model.checkpoint, ALL)
        (largest,) = [max(sum(record.num_bytes for _, record in group) for group in groups)]
        assert sum(record.num_bytes for record in records.values()) <= max(limit, largest)
    assert seen == index["weight_map"]
    assert len(hashes) > 1
    total = sum(os.path.getsize(tmp_path / "out" / name) for name in hashes)
    assert index["metadata"]["total_size"] < total
    source = safetensors.torch.load_file(tiny_model.folder / WEIGHTS_FILE)
    written = {}
    for name in hashes:
        written |= safetensors.torch.load_file(tmp_path / "out" / name)
    for name, tensor in written.items():
        assert (tensor == source[name].to(tensor.dtype)).all(), name


def test_what_one_initializer_spans_stays_in_one_shard(get_model: Callable[[str], TinyModel]) -> None:
    groups = layer_tensor_groups(get_model("llama-biased").checkpoint, (2,))
    together = [[name.removeprefix("model.layers.0.") for name, _ in group] for group in groups if len(group) > 1]
    assert together == [
        [f"self_attn.{part}_proj.weight" for part in "qkv"],
        [f"self_attn.{part}_proj.bias" for part in "qkv"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        ["mlp.gate_proj.bias", "mlp.up_proj.bias"],
    ]
    for shard in cut_shards(groups, max_shard_bytes=1):
        names = {name for name, _ in shard}
        assert names in [{name for name, _ in group} for group in groups]


def test_repeat_gives_the_same_bytes(llama: TinyModel, tmp_path: Path) -> None:
    first = write(llama, tmp_path / "one", max_shard_bytes=100_000)
    assert first == write(llama, tmp_path / "two", max_shard_bytes=100_000)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_hash_of_headers_sees_every_shard(llama: TinyModel, tmp_path: Path) -> None:
    write(llama, tmp_path / "one", max_shard_bytes=100_000)
    write(llama, tmp_path / "two", max_shard_bytes=90_000)
    assert weights_hash(tmp_path / "one") != weights_hash(tmp_path / "two")


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_progress_counts_bytes_of_tensors(llama: TinyModel, tmp_path: Path, dtype: str | None) -> None:
    told: list[int] = []
    write(llama, tmp_path / "out", max_shard_bytes=100_000, dtype=dtype, advance=told.append)
    assert sum(told) == llama.checkpoint.num_bytes // (1 if dtype is None else 2)


# ---- ways to copy


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("absent", [("copy_file_range",), ("copy_file_range", "sendfile")], ids=len)
def test_what_the_kernel_cannot_is_done_otherwise(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, absent: tuple[str, ...]
) -> None:
    order = layer_tensor_order(llama.checkpoint, (0, 3))
    copy_tensors(order, tmp_path / "expected")

    def cannot(*_: Any) -> int:
        asked.append(1)
        raise OSError(error, "cannot")

    asked: list[int] = []
    for name in absent:
        monkeypatch.setattr(os, name, cannot)
    copy_tensors(order, tmp_path / "out")
    assert asked
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


def test_another_file_system(llama: TinyModel, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    order = layer_tensor_order(llama.checkpoint, (0, 3))
    target = memory / f"voidprune-test-{os.getpid()}"
    try:
        copy_tensors(order, target)
        copy_tensors(order, tmp_path / "here")
        assert target.read_bytes() == (tmp_path / "here").read_bytes()
    finally:
        target.unlink(missing_ok=True)


def test_a_full_disk_is_not_tried_around(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        copy_tensors(layer_tensor_order(llama.checkpoint, (0,)), tmp_path / "out")


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_source_that_ends_while_it_is_copied(llama: TinyModel, tmp_path: Path, dtype: str | None) -> None:
    source = tmp_path / "in"
    source.write_bytes((llama.folder / WEIGHTS_FILE).read_bytes())
    records = read_header(source)
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 10_001)
    with pytest.raises(CheckpointError, match="ended while"):
        copy_tensors(records.items(), tmp_path / "out", dtype=dtype)


def test_infinities_and_nans_of_the_source_are_kept(tmp_path: Path) -> None:
    import torch

    tensors = {"odd": torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "out", dtype="F16")
    written = safetensors.torch.load_file(tmp_path / "out")["odd"]
    assert torch.equal(written, tensors["odd"].half()) or torch.isnan(written[0])
    assert written[1:].tolist() == [torch.inf, -torch.inf, 1.0]


def test_same_bytes(llama: TinyModel) -> None:
    records: list[TensorRecord] = list(llama.checkpoint.tensors.values())
    one = llama.checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    assert same_bytes(one, one)
    assert not any(same_bytes(one, other) for other in records if other is not one)


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_tensors_get_new_values_where_they_are(llama: TinyModel, tmp_path: Path, dtype: str | None) -> None:
    write(llama, tmp_path / "out", max_shard_bytes=100_000, dtype=dtype)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    records = {name: record for file in before for name, record in read_header(tmp_path / "out" / file).items()}
    name = "model.layers.2.mlp.down_proj.weight"
    values = np.random.default_rng(0).normal(size=records[name].shape).astype(np.float32)
    assert overwrite_tensors([(records[name], values)]) == {records[name].file}
    for file, content in before.items():
        tensors = safetensors.torch.load(content)
        for found, tensor in safetensors.torch.load_file(tmp_path / "out" / file).items():
            expected = torch.from_numpy(values).to(tensor.dtype) if found == name else tensors[found]
            assert torch.equal(tensor, expected)
        assert read_header(tmp_path / "out" / file).keys() == tensors.keys()


def test_values_that_a_dtype_does_not_hold_are_refused(llama: TinyModel, tmp_path: Path) -> None:
    write(llama, tmp_path / "out", max_shard_bytes=llama.checkpoint.num_bytes, dtype="F16")
    content = (tmp_path / "out" / WEIGHTS_FILE).read_bytes()
    record = read_header(tmp_path / "out" / WEIGHTS_FILE)["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are infinite in F16"):
        overwrite_tensors([(record, np.full(record.shape, 1e6, np.float32))])
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == content
