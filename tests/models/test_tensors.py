"""Fetching and reading through records; headers are tested in `test_checkpoint.py`, where files are checked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_models import TinyModel
from voidprune.errors import CheckpointError
from voidprune.models import tensors
from voidprune.models.tensors import (
    Advance,
    TensorRecord,
    fetch_tensors,
    header_length,
    missing_bytes,
    parse_header,
    read_pieces,
    same_bytes,
    stored_bytes,
)


class Source:
    """A source that says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fetch(self, records: Sequence[TensorRecord], *, advance: Advance) -> None:
        self.asked += [record.name for record in records]
        advance(self.missing_bytes(records))

    def missing_bytes(self, records: Sequence[TensorRecord]) -> int:
        return sum(record.num_bytes for record in records)


def record(name: str, source: Source | None = None, *, dtype: str = "F32", file: Path = Path("file")) -> TensorRecord:
    return TensorRecord(name, dtype, (2, 3), file, 0, 24, source)


def test_each_source_is_asked_once_for_what_is_its_own() -> None:
    one, other, told = Source(), Source(), list[int]()
    wanted = [record("a", one), record("b", other), record("c"), record("d", one)]
    assert missing_bytes(wanted) == 72
    fetch_tensors(wanted, advance=told.append)
    assert (one.asked, other.asked, told) == (["a", "d"], ["b"], [48, 24])


def test_where_a_record_comes_from_is_not_part_of_it() -> None:
    assert record("a", Source()) == record("a")


@pytest.mark.parametrize(
    ("dtype", "target", "expected"), [("F32", None, 24), ("F32", "F16", 12), ("BF16", "F32", 24), ("I32", "F16", 24)]
)
def test_bytes_in_another_dtype(dtype: str, target: str | None, expected: int) -> None:
    assert stored_bytes(record("a", dtype=dtype), target) == expected


def test_reading_fetches_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_CHUNK", 10)
    (tmp_path / "file").write_bytes(bytes(range(24)))
    source = Source()
    found = list(read_pieces(record("a", source, file=tmp_path / "file")))
    assert source.asked == ["a"]
    assert [len(piece) for piece in found] == [10, 10, 4]
    assert b"".join(found) == bytes(range(24))


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(23))
    with pytest.raises(CheckpointError, match="ended while a was being read"):
        list(read_pieces(record("a", file=tmp_path / "file")))


def test_same_bytes_need_the_same_shape(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(24))
    one = record("a", file=tmp_path / "file")
    assert same_bytes(one, replace(one, name="b"))
    assert not same_bytes(one, replace(one, shape=(3, 2)))


def test_a_header_has_its_limits() -> None:
    with pytest.raises(CheckpointError, match="no safetensors header"):
        header_length(b"1234", size=4, place="x")
    with pytest.raises(CheckpointError, match="its header has 9 bytes; the file has 16"):
        header_length(struct.pack("<Q", 9), size=16, place="x")
    assert header_length(struct.pack("<Q", 8), size=16, place="x") == 8


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (((0, 4), (0, 4)), "does not follow the tensor before it"),
        (((0, 4), (2, 6)), "does not follow the tensor before it"),
        (((0, 4), (8, 12)), "does not follow the tensor before it"),
        (((4, 0), (4, 8)), "spans -4"),
    ],
)
def test_tensors_lie_one_behind_the_other(offsets: tuple[tuple[int, int], ...], message: str) -> None:
    entries = [f'"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{begin},{end}]}}'
               for name, (begin, end) in zip("ab", offsets, strict=True)]  # fmt: skip
    content = ("{" + ",".join(entries) + "}").encode()
    with pytest.raises(CheckpointError, match=message):
        parse_header(content, Path("x"), size=8 + len(content) + 8)


def test_records_of_a_model_lie_in_its_file(llama: TinyModel) -> None:
    size = (llama.folder / "model.safetensors").stat().st_size
    assert max(found.offset + found.num_bytes for found in llama.checkpoint.tensors.values()) == size
