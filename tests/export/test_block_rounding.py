"""Quantized matrices: the bytes that `MatMulNBits` reads, as near to the weights as rounding allows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import open_plainly
from voidprune.export.block_rounding import quantize_rows, restore_rows
from voidprune.models.packed import (
    BlockFormat,
    pack,
)

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
