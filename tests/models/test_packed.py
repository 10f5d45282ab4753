"""Files with packed matrices: what is written is what is read, and damaged ones are named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.errors import CheckpointError, ModelError
from voidprune.export.hf_checkpoint import write_slim_files
from voidprune.export.quantize import uniform_packing, write_packed
from voidprune.models.checkpoint import open_checkpoint, weights_hash
from voidprune.models.packed import (
    METADATA_KEY,
    BlockFormat,
    PackedRecord,
    dequantize_rows,
    find_packed,
    pack,
    packed_file,
    read_packed,
    unpack,
)
from voidprune.models.pretrained import load_model
from voidprune.models.sizes import measure_sizes
from voidprune.models.tensors import read_rows
from voidprune.schedule import Phase

QUERY = "model.layers.0.self_attn.q_proj"
FOUR, EIGHT = (BlockFormat(bits=bits, block_size=32, zero_points=False) for bits in (4, 8))
ROWS = BlockFormat(bits=8, block_size=None, zero_points=False)


@pytest.fixture
def packed(llama: TinyModel, tmp_path: Path) -> Path:
    """The file of a folder that holds nothing else for graphs or transformers."""
    write_slim_files(llama.checkpoint, range(NUM_LAYERS), tmp_path)
    file = tmp_path / packed_file("int4")
    write_packed(llama.checkpoint, range(NUM_LAYERS), file, uniform_packing("int4", NUM_LAYERS, zero_points=True))
    return file


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 9)), elements=st.integers(0, 15)
    )
)
def test_unpack_undoes_pack(numbers: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    for eight in (EIGHT, ROWS):
        assert (unpack(pack(numbers, eight), eight) == numbers).all()
    packed = pack(numbers, FOUR)
    assert packed.shape[-1] == (numbers.shape[-1] + 1) // 2
    assert (unpack(packed, FOUR)[..., : numbers.shape[-1]] == numbers).all()


def test_lower_half_comes_first() -> None:
    assert pack(np.array([[1, 2, 15]], np.uint8), FOUR).tolist() == [[0x21, 0x0F]]


def test_numbers_of_whole_rows_are_signed() -> None:
    assert pack(np.array([[0, 1, 128, 255]], np.uint8), ROWS).view(np.int8).tolist() == [[-128, -127, 0, 127]]


def test_format_counts_blocks_and_bytes() -> None:
    four = BlockFormat(bits=4, block_size=32, zero_points=True)
    assert (four.middle, four.largest, four.numbers_shape(3, 40)) == (8, 15, (3, 2, 16))
    assert [four.num_blocks(columns) for columns in (1, 32, 33, 96)] == [1, 1, 2, 3]
    assert [four.zero_point_bytes(columns) for columns in (32, 64, 96)] == [1, 1, 2]
    eight = BlockFormat(bits=8, block_size=128, zero_points=False)
    assert (eight.middle, eight.largest, eight.zero_point_bytes(300)) == (128, 255, 3)
    assert (eight.numbers_shape(3, 300), eight.scales_shape(3, 300)) == ((3, 3, 128), (3, 3))
    assert (ROWS.numbers_shape(3, 300), ROWS.scales_shape(3, 300), ROWS.num_blocks(300)) == ((3, 300), (3,), 1)


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 3},
        {"bits": 4.0},
        {"block_size": 48},
        {"block_size": 32.0},
        {"zero_points": 1},
        {"block_size": None},
        {"bits": 8, "block_size": None, "zero_points": True},
    ],
)
def test_other_formats_do_not_exist(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no way to pack"):
        BlockFormat(**{"bits": 4, "block_size": 32, "zero_points": False, **values})


def test_folder_opens_with_logical_shapes(packed: Path, llama: TinyModel) -> None:
    found = open_checkpoint(packed.parent)
    assert found.is_packed
    assert found.dtype == "F32"
    assert {name: record.shape for name, record in found.tensors.items()} == {
        name: record.shape for name, record in llama.checkpoint.tensors.items()
    }
    record = found.tensors[f"{QUERY}.weight"]
    assert isinstance(record, PackedRecord)
    assert record.blocks == BlockFormat(bits=4, block_size=32, zero_points=True)
    assert found.tensors["model.norm.weight"].dtype == "F32"
    assert weights_hash(packed.parent).startswith("sha256:")


def test_rows_can_be_read_apart(packed: Path) -> None:
    record = read_packed(packed)[f"{QUERY}.weight"]
    assert isinstance(record, PackedRecord)
    whole = dequantize_rows(record, 0, 64)
    assert (np.concatenate([dequantize_rows(record, start, start + 16) for start in range(0, 64, 16)]) == whole).all()


def test_transformers_and_planning_refuse_it(packed: Path) -> None:
    assert find_packed(packed.parent) == packed
    for use in (load_model, lambda folder: measure_sizes(open_checkpoint(folder))):
        with pytest.raises(ModelError, match="holds packed matrices for its ONNX graphs") as caught:
            use(packed.parent)
        assert "--format hf --format onnx" in str(caught.value.hint)


# ---- damaged files


def describe(**formats: list[Any]) -> Callable[[dict[str, Any]], None]:
    """A change of what the metadata say of matrices, `q` standing for the first query matrix."""

    def change(header: dict[str, Any]) -> None:
        found = json.loads(header["__metadata__"][METADATA_KEY])
        found |= {f"{QUERY if name == 'q' else name}.weight": entry for name, entry in formats.items()}
        header["__metadata__"][METADATA_KEY] = json.dumps(found, separators=(",", ":"))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "do not say how its matrices are packed"),
        (lambda header: header["__metadata__"].update({METADATA_KEY: "[]"}), "do not say how its matrices are packed"),
        (describe(q=[3, 32, True, 64]), "no way to pack"),
        (describe(q=[4.0, 32, True, 64]), "no way to pack"),
        (describe(q=[4, None, False, 64]), "no way to pack"),
        (describe(q=[8, None, False, 64]), "its metadata ask for I8"),
        (describe(q=[4, 32, True, "64"]), "columns"),
        (describe(q=[8, 32, True, 64]), "its metadata ask for"),
        (describe(q=[4, 32, True, 96]), "its metadata ask for"),
        (describe(other=[4, 32, True, 96]), "lacks other.weight"),
        (lambda header: header.update({f"{QUERY}.scale": header.pop(f"{QUERY}.scales")}), f"lacks {QUERY}.scales"),
    ],
)
def test_damaged_header_is_named(packed: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite_header(packed, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(packed.parent)


def test_prefill_has_no_matrix_that_decode_lacks(llama: TinyModel, tmp_path: Path) -> None:
    packing = uniform_packing("w8a8-int4", NUM_LAYERS)
    write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)

    def rename(header: dict[str, Any]) -> None:
        for part in ("weight", "scales"):
            header[f"other.{part}"] = header.pop(f"{QUERY}.{part}")
        found = json.loads(header["__metadata__"][METADATA_KEY])
        found["other.weight"] = found.pop(f"{QUERY}.weight")
        header["__metadata__"][METADATA_KEY] = json.dumps(found, separators=(",", ":"))

    assert set(read_packed(tmp_path / "packed", Phase.PREFILL)) == set(read_packed(tmp_path / "packed"))
    rewrite_header(tmp_path / "packed", rename)
    with pytest.raises(CheckpointError, match=f"holds {QUERY}.weight for prefill and lacks it for decode"):
        read_packed(tmp_path / "packed")


def test_file_without_metadata_header_is_named(packed: Path) -> None:
    packed.write_bytes(struct.pack("<Q", 5) + b"[1,2]")
    with pytest.raises(CheckpointError, match="broken header"):
        open_checkpoint(packed.parent)


def test_truncated_file_is_named(packed: Path) -> None:
    record = read_packed(packed)["model.norm.weight"]
    with packed.open("r+b") as file:
        file.truncate(packed.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_checkpoint(packed.parent)
    with pytest.raises(CheckpointError, match=r"ended while model\.norm\.weight was being read"):
        read_rows(record, 0, 64)
