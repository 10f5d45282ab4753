"""What a graph is written in: the operators of an operator set. What a layer computes is decided in `graph_author.py`, not here.

- "ort" (`fused_operators.py`): onnxruntime's own (domain com.microsoft), which take Hugging Face's [out, in] matrices as they
  are. Fast.
- "standard" (`standard_operators.py`): those of the ONNX standard alone (opset 24: `Attention`, `RMSNormalization`,
  `RotaryEmbedding`, `Swish`, `TensorScatter`), for runtimes that know no others. Same inputs, outputs and cache; the whole
  buffer is read, masked.

Shapes: B rows, T new tokens, M positions of the cache's buffers, N heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from voidprune.export.emitter import Emitter, Tokens
from voidprune.export.weights import Matrix, PackedMatrix
from voidprune.models.graph_architecture import Activation, GraphArchitecture
from voidprune.models.rope import Rope


@dataclass(frozen=True)
class Cache:
    """Buffers of keys and of values, [B, N, M, H] each.

    `steps`: what 1 stands for in them, [1, N, 1, H] in float32 each; None where they are in the dtype of the graph.
    """

    key: ir.Value
    value: ir.Value
    steps: tuple[ir.Value, ir.Value] | None = None


class Operators(ABC):
    """What both sets share, and what each says in its own words."""

    def __init__(self, emitter: Emitter, architecture: GraphArchitecture) -> None:
        self.emit = emitter
        self.architecture = architecture
        self._tables: dict[Rope, tuple[ir.Value, ir.Value]] = {}

    # ---- each in its own words

    @abstractmethod
    def product(self, value: ir.Value, matrix: Matrix, bias: ir.Value | None, width: int) -> ir.Value:
        """`value` [B, T, in] times `matrix` [out, in] transposed, plus `bias` [out]: [B, T, out], `width` numbers."""

    @abstractmethod
    def look_up(self, table: PackedMatrix, ids: ir.Value) -> ir.Value:
        """Rows of a packed table [V, D]: of `ids` [B, T], [B, T, D]."""

    @abstractmethod
    def rms_norm(self, value: ir.Value, scale: ir.Value) -> ir.Value:
        """Over the last axis."""

    @abstractmethod
    def rotate(self, value: ir.Value, positions: ir.Value, rope: Rope, num_heads: int) -> ir.Value:
        """Rotated heads, [B, T, N*H] in and out. `positions` as `rope_positions` gives them."""

    @abstractmethod
    def silu(self, value: ir.Value) -> ir.Value: ...

    @abstractmethod
    def attend(
        self, query_key_value: Sequence[ir.Value], cache: Cache, tokens: Tokens, layer: int
    ) -> tuple[ir.Value, Cache]:
        """Attention of new tokens to all up to each: output [B, T, N*H], and the cache with their keys and values.

        `query_key_value`: not rotated yet; three tensors [B, T, N*H], or one with all three side by side.
        """

    # ---- shared

    def embed(self, table: Matrix, ids: ir.Value) -> ir.Value:
        """Rows of a table [V, D]: of `ids` [B, T], [B, T, D]."""
        return self.look_up(table, ids) if isinstance(table, PackedMatrix) else self.emit.op("Gather", [table, ids])

    def without_padding(self, value: ir.Value, matrix: PackedMatrix) -> ir.Value:
        """Rows of a packed matrix, [..., K] of [..., all numbers of all blocks]."""
        if not matrix.is_padded:
            return value
        return self.emit.op("Slice", [value, *(self.emit.integers(number) for number in (0, matrix.shape[1], -1))])

    def layer_norm(self, value: ir.Value, scale: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Over the last axis."""
        inputs = [value, scale] if bias is None else [value, scale, bias]
        return self.emit.op("LayerNormalization", inputs, axis=-1, epsilon=self.architecture.norm_epsilon)

    def add_and_rms_norm(self, stream: ir.Value, branch: ir.Value, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        total = self.emit.op("Add", [stream, branch])
        return self.rms_norm(total, scale), total

    def add_and_layer_norm(
        self, stream: ir.Value, branch: ir.Value, scale: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        total = self.emit.op("Add", [stream, branch])
        return self.layer_norm(total, scale, bias), total

    def activate(self, value: ir.Value) -> ir.Value:
        match self.architecture.activation:
            case Activation.SILU:
                return self.silu(value)
            case Activation.GELU:
                return self.emit.op("Gelu", [value])
            case Activation.GELU_TANH:
                return self.emit.op("Gelu", [value], approximate="tanh")

    def write_kv(self, key: ir.Value, value: ir.Value, cache: Cache, tokens: Tokens, layer: int) -> Cache:
        """Keys (not rotated yet) and values [B, T, N*H] into the buffers; no query, no attention."""
        rope, num_heads = self.architecture.ropes[layer], self.architecture.num_kv_heads
        if rope is not None:
            key = self.rotate(key, self.rope_positions(tokens, key, rope), rope, num_heads)
        if cache.steps is not None:
            key, value = (self._round_channels(*pair) for pair in zip((key, value), cache.steps, strict=True))
        return self.scatter(self.heads(key, num_heads), self.heads(value, num_heads), cache, tokens)

    def _round_channels(self, value: ir.Value, steps: ir.Value) -> ir.Value:
        """[B, T, N*H] as int8. See `export/rounded_kv.py`, which finds these nodes again."""
        wide = value if self.emit.dtype is ir.DataType.FLOAT else self.emit.cast(value, ir.DataType.FLOAT)
        flat = self.emit.reshape(steps, -1)
        return self.emit.op("QuantizeLinear", [wide, flat], axis=2, output_dtype=ir.DataType.INT8)

    def scatter(self, key: ir.Value, value: ir.Value, cache: Cache, tokens: Tokens) -> Cache:
        """New keys and values [B, N, T, H], as the buffers hold them, into their places."""
        return replace(
            cache,
            key=self.emit.op("TensorScatter", [cache.key, key, tokens.first_position], axis=2),
            value=self.emit.op("TensorScatter", [cache.value, value, tokens.first_position], axis=2),
        )

    def heads(self, value: ir.Value, num_heads: int) -> ir.Value:
        """[B, T, N*H] as [B, N, T, H]."""
        apart = self.emit.reshape(value, 0, 0, num_heads, self.architecture.head_dim)
        return self.emit.op("Transpose", [apart], perm=[0, 2, 1, 3])

    def split_heads(self, query_key_value: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Query, key and value apart, whichever way they came."""
        if len(query_key_value) == 3:
            return query_key_value
        shape = self.architecture
        sizes = [count * shape.head_dim for count in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
        return self.emit.split_last(query_key_value[0], sizes)

    def rotated(self, query_key_value: Sequence[ir.Value], tokens: Tokens, rope: Rope | None) -> Sequence[ir.Value]:
        """Query, key and value apart, the first two rotated."""
        query, key, value = self.split_heads(query_key_value)
        if rope is None:
            return query, key, value
        positions = self.rope_positions(tokens, query, rope)
        return (
            self.rotate(query, positions, rope, self.architecture.num_heads),
            self.rotate(key, positions, rope, self.architecture.num_kv_heads),
            value,
        )

    def rope_positions(self, tokens: Tokens, like: ir.Value, rope: Rope) -> ir.Value:
        """Rows of the rotary tables, [B, T]: positions; those of the second table in rows that are long by now.

        Keys that were cached before a row became long stay as they are: transformers computes them anew in `generate`.
        """
        positions = self.emit.positions(tokens, like)
        if not rope.long_frequencies:
            return positions
        limit = self.emit.weights.constant("rope_long_from", np.array(rope.long_from, np.int32))
        is_long = self.emit.op("GreaterOrEqual", [self.emit.all_tokens.last_position, limit])
        is_long = self.emit.op("Unsqueeze", [is_long, self.emit.integers(1)])
        offsets = [self.emit.integer(self.architecture.context_length), self.emit.integer(0)]
        return self.emit.op("Add", [positions, self.emit.op("Where", [is_long, *offsets])])

    def rotary_tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [context, pairs]; those of long sequences below, where there are such.

        Computed by the runtime when it loads the graph, so the file stays small.
        """
        if rope not in self._tables:
            kinds = [rope.frequencies, rope.long_frequencies] if rope.long_frequencies else [rope.frequencies]
            number = len(self._tables)
            tables = [
                self._rotary_table(f"rope_{number}_{part}", frequencies, rope.scale)
                for part, frequencies in enumerate(kinds)
            ]
            cosines, sines = (
                parts[0] if len(parts) == 1 else self.emit.op("Concat", parts, axis=0)
                for parts in ([table[0] for table in tables], [table[1] for table in tables])
            )
            self._tables[rope] = self.emit.to_weights_dtype(cosines), self.emit.to_weights_dtype(sines)
        return self._tables[rope]

    def _rotary_table(self, name: str, frequencies: tuple[float, ...], scale: float) -> tuple[ir.Value, ir.Value]:
        emit = self.emit
        context = emit.integer(self.architecture.context_length)
        positions = emit.cast(emit.op("Range", [emit.integer(0), context, emit.integer(1)]), ir.DataType.FLOAT)
        row = emit.weights.constant(name, np.array([frequencies], np.float32))
        angles = emit.op("Mul", [emit.op("Unsqueeze", [positions, emit.integers(1)]), row])
        cosines, sines = emit.op("Cos", [angles]), emit.op("Sin", [angles])
        if scale == 1.0:
            return cosines, sines
        factor = emit.weights.constant(f"rope_scale_{scale!r}", np.array(scale, np.float32))
        return emit.op("Mul", [cosines, factor]), emit.op("Mul", [sines, factor])
