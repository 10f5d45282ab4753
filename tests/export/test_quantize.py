"""Quantized matrices: the bytes that `MatMulNBits` reads, as near to the weights as rounding allows, and always the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import GetModel, open_plainly
from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.errors import CheckpointError
from voidprune.export.quantize import (
    LayerBits,
    Packing,
    average_bits,
    layer_weights,
    packed_bytes,
    quantize_rows,
    restore_rows,
    uniform_packing,
    write_packed,
)
from voidprune.models.checkpoint import open_checkpoint, read_tensor
from voidprune.models.copying import copy_tensors
from voidprune.models.packed import (
    BlockFormat,
    PackedRecord,
    dequantize_rows,
    differs_by_phase,
    multiplies_rows,
    pack,
    read_packed,
)
from voidprune.models.tensors import TensorRecord
from voidprune.schedule import Phase

FORMATS = [
    BlockFormat(bits=bits, block_size=block_size, zero_points=zero_points)
    for bits in (4, 8)
    for block_size in (32, 128)
    for zero_points in (False, True)
]
ROWS = BlockFormat(bits=8, block_size=None, zero_points=False)


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def meaning_one_by_one(
    numbers: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    points: np.ndarray[Any, Any] | None,
    blocks: BlockFormat,
) -> np.ndarray[Any, Any]:
    """scale * (number - zero point), number by number, straight from the definition of the operator."""
    found = np.zeros((numbers.shape[0], numbers.shape[1] * numbers.shape[2]))
    for row, block, column in np.ndindex(numbers.shape):
        point = 2 ** (blocks.bits - 1) if points is None else int(points[row, block])
        found[row, block * blocks.block_size + column] = scales[row, block] * (int(numbers[row, block, column]) - point)
    return found


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [32, 100, 128, 200])
@pytest.mark.parametrize("level", [0, 4])
def test_onnxruntime_reads_what_is_meant(blocks: BlockFormat, columns: int, level: int) -> None:
    weights, bias = random_matrix(24, columns), random_matrix(1, 24)[0]
    numbers, scales, points = quantize_rows(weights, blocks)
    meant = meaning_one_by_one(numbers, scales, points, blocks)[:, :columns]
    packed = pack(numbers.reshape(24, -1), blocks).reshape(blocks.numbers_shape(24, columns))
    initializers = {"packed": packed, "scales": scales, "bias": bias}
    if points is not None:
        initializers["points"] = pack(points, blocks)
    node = helper.make_node(
        "MatMulNBits",
        ["value", "packed", "scales", "points" if points is not None else "", "", "bias"],
        ["product"],
        domain="com.microsoft",
        N=24,
        K=columns,
        bits=blocks.bits,
        block_size=blocks.block_size,
        accuracy_level=level,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, [2, 3, columns])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [2, 3, 24])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_plainly(model.SerializeToString())
    value = random_matrix(6, columns, seed=1).reshape(2, 3, columns)
    (found,) = session.run(None, {"value": value})
    expected = value @ meant.T + bias
    assert np.abs(found - expected).max() <= (1e-4 if level == 0 else 0.02 * np.abs(expected).max())


@pytest.mark.parametrize("blocks", [*FORMATS, ROWS], ids=str)
def test_rounding_is_no_worse_than_the_plain_one(blocks: BlockFormat) -> None:
    """Plain: the largest magnitude, or both extremes, at the end of what the bits hold."""
    weights = random_matrix(40, 256)
    values = weights.reshape(40, -1, blocks.numbers_in_block(256))
    if blocks.zero_points:
        low, high = np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0)
        scales = (high - low) / blocks.largest
        points = np.rint(-low / scales)
    else:
        scales, points = np.abs(values).max(-1, keepdims=True) / (blocks.middle - 1), blocks.middle
    plain = (np.clip(np.rint(values / scales) + points, 0, blocks.largest) - points) * scales
    error = np.square(restore_rows(weights, blocks).reshape(values.shape) - values).sum(-1)
    plain_error = np.square(plain - values).sum(-1)
    assert error.sum() < (0.95 if blocks.bits == 4 else 1.0) * plain_error.sum()


@given(
    st.sampled_from([*FORMATS, ROWS]),
    st.integers(1, 4),
    st.integers(1, 140),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_no_weight_moves_further_than_a_step(
    blocks: BlockFormat, rows: int, columns: int, seed: int, size: float
) -> None:
    weights = random_matrix(rows, columns, seed=seed) * np.float32(size)
    numbers, scales, points = quantize_rows(weights, blocks)
    assert numbers.max() <= blocks.largest
    assert np.isfinite(scales).all()
    assert (points is not None) == blocks.zero_points
    error = np.sqrt(np.square(restore_rows(weights, blocks).astype(np.float64) - weights).sum())
    assert error <= np.sqrt(np.square(weights.astype(np.float64)).sum()) * (0.2 if blocks.bits == 4 else 0.02)


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
def test_zeros_stay_zeros(blocks: BlockFormat) -> None:
    assert not restore_rows(np.zeros((3, 70), np.float32), blocks).any()
    half = np.concatenate([np.zeros((2, 128), np.float32), random_matrix(2, 128)], axis=1)
    assert not restore_rows(half, blocks)[:, :128].any()


@pytest.mark.parametrize("precision", ["int4", "int8", "w8a8", "w8a8-int4"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 128}, {"zero_points": True}])
def test_file_means_the_rounded_weights(
    llama: TinyModel, tmp_path: Path, precision: str, settings: dict[str, Any]
) -> None:
    kept = (0, 2, 5)
    packing = uniform_packing(precision, len(kept), **settings)
    errors = write_packed(llama.checkpoint, kept, tmp_path / "packed", packing)
    parts = []
    for phase in Phase:
        found = read_packed(tmp_path / "packed", phase)
        assert len(found) == 3 + 9 * len(kept)
        num_packed, square = 0, 0.0
        for name, record in found.items():
            place = llama.checkpoint.architecture.spec.tensors.layer_of(name)
            source = name if place is None else f"model.layers.{kept[place[0]]}.{place[1]}"
            weights = np.array(read_tensor(llama.checkpoint.tensors[source]))
            if isinstance(record, PackedRecord):
                assert record.blocks.whole_rows == (multiplies_rows(precision, phase) and place is not None)
                meant = dequantize_rows(record, 0, record.shape[0])
                assert (meant == restore_rows(weights, record.blocks)).all()
                square += float(np.square(meant.astype(np.float64) - weights).sum())
                num_packed += 1
                parts += record.stored_parts
            else:
                assert (np.array(read_tensor(record)) == weights).all()
                parts.append(record)
        assert num_packed == 2 + 7 * len(kept), "embedding, head, and all matrices of layers"
        error = sum(error for error, _ in errors.squares.values())
        assert (error == pytest.approx(square)) == (phase is Phase.DECODE or not differs_by_phase(precision))
    assert 0.001 < errors.relative < 0.12
    content = (tmp_path / "packed").stat().st_size
    assert packed_bytes(llama.checkpoint, kept, packing) == content - min(part.offset for part in parts)


def test_what_one_product_spans_lies_side_by_side(llama: TinyModel, tmp_path: Path) -> None:
    write_packed(
        llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", uniform_packing("int4", NUM_LAYERS, zero_points=True)
    )
    assert_side_by_side(read_packed(tmp_path / "packed"))


def test_what_each_phase_spans_lies_side_by_side(llama: TinyModel, tmp_path: Path) -> None:
    packing = uniform_packing("w8a8-int4", NUM_LAYERS, zero_points=True)
    write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)
    for phase in Phase:
        assert_side_by_side(read_packed(tmp_path / "packed", phase))


def assert_side_by_side(found: Mapping[str, TensorRecord]) -> None:
    """Queries, keys and values of a layer: the numbers of all, the scales of all, the zero points of all."""
    records = [found[f"model.layers.3.self_attn.{part}_proj.weight"] for part in "qkv"]
    for parts in zip(*(record.stored_parts for record in records if isinstance(record, PackedRecord)), strict=True):
        ends = [part.offset + part.num_bytes for part in parts]
        assert [part.offset for part in parts[1:]] == ends[:-1]


def test_same_source_gives_the_same_bytes(llama: TinyModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / name, uniform_packing("int4", NUM_LAYERS))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_source_in_16_bits_is_packed_as_it_is(llama: TinyModel, tmp_path: Path, dtype: str) -> None:
    """As its numbers in float32 are."""
    for folder in ("wide", "narrow"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    copy_tensors(llama.checkpoint.tensors.items(), tmp_path / "narrow" / "model.safetensors", dtype=dtype)
    narrow = open_checkpoint(tmp_path / "narrow")
    copy_tensors(narrow.tensors.items(), tmp_path / "wide" / "model.safetensors", dtype="F32")
    wide = open_checkpoint(tmp_path / "wide")
    for checkpoint, file in ((narrow, "a"), (wide, "b")):
        write_packed(checkpoint, range(NUM_LAYERS), tmp_path / file, uniform_packing("int8", NUM_LAYERS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fused_matrices_and_norms_of_heads(get_model: GetModel, tmp_path: Path) -> None:
    fused = get_model("phi3").checkpoint
    write_packed(fused, [1], tmp_path / "phi3", uniform_packing("int4", 1))
    assert isinstance(read_packed(tmp_path / "phi3")["model.layers.0.self_attn.qkv_proj.weight"], PackedRecord)
    normed = get_model("cohere").checkpoint
    write_packed(normed, [1], tmp_path / "cohere", uniform_packing("int4", 1))
    norm = read_packed(tmp_path / "cohere")["model.layers.0.self_attn.q_norm.weight"]
    assert len(norm.shape) == 2
    assert norm.dtype == "F32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(llama: TinyModel, tmp_path: Path, value: float) -> None:
    tensors = safetensors.torch.load_file(llama.folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = torch.where(torch.arange(tensors[name].numel()).view_as(tensors[name]) == 77, value, tensors[name])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        write_packed(
            open_checkpoint(tmp_path), range(NUM_LAYERS), tmp_path / "packed", uniform_packing("int4", NUM_LAYERS)
        )


def test_average_is_of_weights_not_of_layers(llama: TinyModel) -> None:
    weights = layer_weights(llama.checkpoint, (0, 1))
    assert weights == [LayerBits(64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 96)] * 2
    assert average_bits([LayerBits(4, 4), LayerBits(8, 8)], weights) == 6
    assert average_bits([LayerBits(8, 4), LayerBits(8, 4)], weights) == pytest.approx(4 + 4 * 12288 / 30720)


def test_progress_counts_every_byte(llama: TinyModel, tmp_path: Path) -> None:
    packing = Packing("mixed", (LayerBits(4, 8), LayerBits(8, 4)), 8, block_size=128, zero_points=True)
    told: list[int] = []
    write_packed(llama.checkpoint, (0, 1), tmp_path / "packed", packing, advance=told.append)
    assert sum(told) == packed_bytes(llama.checkpoint, (0, 1), packing)
