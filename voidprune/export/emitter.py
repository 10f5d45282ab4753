"""The tape that one graph is written on: nodes, small constants, weights, and what it knows of its new tokens.

Shapes: B rows, T new tokens, S tokens of the longest row with its past.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from voidprune.export.weights import GraphWeights
from voidprune.models.checkpoint import Checkpoint

END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Tokens:
    """Which of the new tokens a tensor holds, as the cache operators need to know it.

    `last_position` int32 [B]: the position of the last of them in each row; `total` int32 scalar: tokens of the longest row up
    to it; `first_position` int64 [B].
    """

    last_position: ir.Value
    total: ir.Value
    first_position: ir.Value


class Emitter:
    """Writes nodes. `weights` has the checkpoint's tensors; inputs of the graph are made here, too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ModelError for a dtype that has no graph."""
        self.tape = ir.tape.Tape()
        self.weights = GraphWeights(checkpoint, self.tape)
        self.dtype = self.weights.dtype
        self.input_ids = self.input("input_ids", ir.DataType.INT64, ["batch", "tokens"])
        self.attention_mask = self.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.all_tokens = self._count_tokens()
        self._row_counts: dict[ir.Value, ir.Value] = {}

    @staticmethod
    def input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: object
    ) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes, domain=domain)  # type: ignore[arg-type]

    def op_with_outputs(
        self, op_type: str, inputs: Sequence[ir.Value | None], num_outputs: int, *, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        return self.tape.op_multi_out(op_type, inputs, attributes, num_outputs=num_outputs, domain=domain)

    def integers(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.weights.constant(f"int64_{'_'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def integer(self, number: int) -> ir.Value:
        """A constant int64 scalar."""
        return self.weights.constant(f"int64_scalar_{number}", np.array(number, np.int64))

    def number(self, number: float) -> ir.Value:
        """A constant scalar of the weights' dtype."""
        array = np.array(number, np.float32).astype(self.dtype.numpy())
        return self.weights.constant(f"number_{number!r}", array)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", [value], to=dtype)

    def to_weights_dtype(self, value: ir.Value) -> ir.Value:
        """Of a float32 value."""
        return value if self.dtype is ir.DataType.FLOAT else self.cast(value, self.dtype)

    def scale(self, value: ir.Value, factor: float) -> ir.Value:
        return value if factor == 1.0 else self.op("Mul", [value, self.number(factor)])

    def slice_tokens(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Some of the tokens of a tensor [B, T, ...]."""
        return self.op("Slice", [value, *(self.integers(number) for number in (start, end, 1))])

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """0 keeps a dimension."""
        return self.op("Reshape", [value, self.integers(*shape)])

    def flatten_tokens(self, value: ir.Value) -> ir.Value:
        """[B, T, K] as [B * T, K], for operators that take matrices."""
        return self.op("Flatten", [value], axis=2)

    def unflatten_tokens(self, value: ir.Value, like: ir.Value, width: int) -> ir.Value:
        """[B * T, `width`] as [B, T, `width`], with B and T of `like`."""
        if like not in self._row_counts:
            self._row_counts[like] = self.op("Shape", [like], start=0, end=2)
        shape = self.op("Concat", [self._row_counts[like], self.integers(width)], axis=0)
        return self.op("Reshape", [value, shape])

    def split_last(self, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        return self.op_with_outputs("Split", [value, self.integers(*sizes)], len(sizes), axis=-1)

    # ---- tokens

    def _count_tokens(self) -> Tokens:
        one = self.integers(1)
        lengths = self.op("ReduceSum", [self.attention_mask, one], keepdims=0)
        total = self.op("Shape", [self.attention_mask], start=1, end=2)
        # Counted where the tokens are: the length of a shape is a number of the host's, and a graph that copies one from there
        # cannot be captured on CUDA.
        each = self.op(
            "ConstantOfShape", [self.op("Shape", [self.input_ids])], value=ir.tensor(np.array([1], np.int64))
        )
        return Tokens(
            last_position=self.cast(self.op("Sub", [lengths, one]), ir.DataType.INT32),
            total=self.cast(self.op("Squeeze", [total]), ir.DataType.INT32),
            first_position=self.op("Sub", [lengths, self.op("ReduceSum", [each, one], keepdims=0)]),
        )

    @functools.cached_property
    def earlier_tokens(self) -> Tokens:
        """All new tokens but the last of each row."""
        one = self.weights.constant("int32_one", np.array(1, np.int32))
        return Tokens(
            last_position=self.op("Sub", [self.all_tokens.last_position, one]),
            total=self.op("Sub", [self.all_tokens.total, one]),
            first_position=self.all_tokens.first_position,
        )

    @functools.cached_property
    def final_token(self) -> Tokens:
        """The last new token of each row."""
        position = self.cast(self.all_tokens.last_position, ir.DataType.INT64)
        return replace(self.all_tokens, first_position=position)

    def positions(self, tokens: Tokens, like: ir.Value) -> ir.Value:
        """Positions [B, T] of the tokens in a tensor `like` [B, T, ...]."""
        count = self.op("Squeeze", [self.op("Shape", [like], start=1, end=2)])
        offsets = self.op("Range", [self.integer(0), count, self.integer(1)])
        return self.op("Add", [self.op("Unsqueeze", [tokens.first_position, self.integers(1)]), offsets])
