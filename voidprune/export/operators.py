"""The two operator sets that a graph can be written in. What a layer computes is decided in `graph_author.py`, not here.

- "ort": onnxruntime's fused operators (domain com.microsoft), which take Hugging Face's [out, in] matrices as they are. Fast.
- "standard": operators of the ONNX standard alone (opset 24: `Attention`, `RMSNormalization`, `RotaryEmbedding`, `Swish`,
  `TensorScatter`), for runtimes that know no others. Same inputs, outputs and cache; the whole buffer is read, masked.

Shapes: B rows, T new tokens, M positions of the cache's buffers, N heads, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from voidprune.errors import ModelError
from voidprune.export.emitter import Emitter, Tokens
from voidprune.export.weights import Matrix, PackedMatrix
from voidprune.models.graph_architecture import Activation, GraphArchitecture
from voidprune.models.rope import Rope

ORT = "com.microsoft"
Cache = tuple[ir.Value, ir.Value]
"""Buffers of keys and of values, [B, N, M, H] each."""


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
        return self.scatter(self.heads(key, num_heads), self.heads(value, num_heads), cache, tokens)

    def scatter(self, key: ir.Value, value: ir.Value, cache: Cache, tokens: Tokens) -> Cache:
        past_key, past_value = cache
        return (
            self.emit.op("TensorScatter", [past_key, key, tokens.first_position], axis=2),
            self.emit.op("TensorScatter", [past_value, value, tokens.first_position], axis=2),
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


class FusedOperators(Operators):
    """onnxruntime's own."""

    def product(self, value: ir.Value, matrix: Matrix, bias: ir.Value | None, width: int) -> ir.Value:
        if isinstance(matrix, PackedMatrix):
            return self._packed_product(value, matrix, bias)
        product = self.emit.op("FusedMatMul", [value, matrix], domain=ORT, transB=1)
        return product if bias is None else self.emit.op("Add", [product, bias])

    def _packed_product(self, value: ir.Value, matrix: PackedMatrix, bias: ir.Value | None) -> ir.Value:
        weights, blocks = self.emit.weights, matrix.blocks
        rows, columns = matrix.shape
        return self.emit.op(
            "MatMulNBits",
            [
                value,
                weights.packed_numbers(matrix, ir.DataType.UINT8, [matrix.num_blocks, blocks.block_bytes]),
                weights.scales(matrix),
                weights.zero_points(matrix, ir.DataType.UINT8, [blocks.zero_point_bytes(columns)]),
                None,
                bias,
            ],
            domain=ORT,
            N=rows,
            K=columns,
            bits=blocks.bits,
            block_size=blocks.block_size,
            accuracy_level=0,
        )

    def look_up(self, table: PackedMatrix, ids: ir.Value) -> ir.Value:
        weights, blocks = self.emit.weights, table.blocks
        found = self.emit.op(
            "GatherBlockQuantized",
            [
                weights.packed_numbers(table, ir.DataType.UINT8, [table.num_blocks * blocks.block_bytes]),
                ids,
                weights.scales(table),
                weights.zero_points(table, ir.DataType.UINT8, [blocks.zero_point_bytes(table.shape[1])]),
            ],
            domain=ORT,
            bits=blocks.bits,
            block_size=blocks.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return self.without_padding(found, table)

    def rms_norm(self, value: ir.Value, scale: ir.Value) -> ir.Value:
        epsilon = self.architecture.norm_epsilon
        return self.emit.op("SimplifiedLayerNormalization", [value, scale], axis=-1, epsilon=epsilon, stash_type=1)

    def add_and_rms_norm(self, stream: ir.Value, branch: ir.Value, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
        return self._add_and_norm("SkipSimplifiedLayerNormalization", [stream, branch, scale])

    def add_and_layer_norm(
        self, stream: ir.Value, branch: ir.Value, scale: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        return self._add_and_norm("SkipLayerNormalization", [stream, branch, scale, bias])

    def _add_and_norm(self, op_type: str, inputs: Sequence[ir.Value | None]) -> tuple[ir.Value, ir.Value]:
        epsilon = self.architecture.norm_epsilon
        normed, _, _, total = self.emit.op_with_outputs(op_type, inputs, 4, domain=ORT, epsilon=epsilon)
        return normed, total

    def rotate(self, value: ir.Value, positions: ir.Value, rope: Rope, num_heads: int) -> ir.Value:
        partial = rope.width if rope.width != self.architecture.head_dim else 0
        return self.emit.op(
            "RotaryEmbedding",
            [value, positions, *self.rotary_tables(rope)],
            domain=ORT,
            num_heads=num_heads,
            rotary_embedding_dim=partial,
            interleaved=int(rope.interleaved),
        )

    def silu(self, value: ir.Value) -> ir.Value:
        return self.emit.op("QuickGelu", [value], domain=ORT, alpha=1.0)

    def attend(
        self, query_key_value: Sequence[ir.Value], cache: Cache, tokens: Tokens, layer: int
    ) -> tuple[ir.Value, Cache]:
        shape = self.architecture
        rope = shape.ropes[layer]
        fused = rope is not None and self._rotates_inside(rope)
        if not fused:
            query_key_value = self.rotated(query_key_value, tokens, rope)
        output, key, value = self.emit.op_with_outputs(
            "GroupQueryAttention",
            [
                *(query_key_value if len(query_key_value) == 3 else [query_key_value[0], None, None]),
                *cache,
                tokens.last_position,
                tokens.total,
                *(self.rotary_tables(rope) if rope is not None and fused else ()),
            ],
            3,
            domain=ORT,
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            do_rotary=int(fused),
            rotary_interleaved=int(fused and rope is not None and rope.interleaved),
            local_window_size=shape.windows[layer] or -1,
            scale=shape.score_scale,
            softcap=shape.score_softcap or 0.0,
        )
        return output, (key, value)

    def _rotates_inside(self, rope: Rope) -> bool:
        # onnxruntime 1.31: GroupQueryAttention rotates multiples of 16 only ("head_size shall be a multiple of 16").
        return self.architecture.head_dim % 16 == 0 and rope.width % 16 == 0 and not rope.long_frequencies


class StandardOperators(Operators):
    """Those of the ONNX standard."""

    def __init__(self, emitter: Emitter, architecture: GraphArchitecture) -> None:
        super().__init__(emitter, architecture)
        self._masks: dict[tuple[Tokens, int | None], ir.Value] = {}

    def product(self, value: ir.Value, matrix: Matrix, bias: ir.Value | None, width: int) -> ir.Value:
        """`Gemm` takes [out, in] as it is; `MatMul` would make runtimes keep a transposed copy."""
        if isinstance(matrix, PackedMatrix):
            matrix = self._dequantize(matrix)
        flat = self.emit.op("Flatten", [value], axis=2)
        product = self.emit.op("Gemm", [flat, matrix, *([] if bias is None else [bias])], transB=1)
        rows = self.emit.op("Shape", [value], start=0, end=2)
        return self.emit.op("Reshape", [product, self.emit.op("Concat", [rows, self.emit.integers(width)], axis=0)])

    def _dequantize(self, matrix: PackedMatrix) -> ir.Value:
        """[out, in]. ONNX packs numbers of 4 bits without regard to rows, so rows must fill whole bytes."""
        weights, blocks = self.emit.weights, matrix.blocks
        dtype = ir.DataType.UINT8 if blocks.bits == 8 else ir.DataType.UINT4
        if matrix.num_blocks * blocks.bits % 8:
            raise ModelError(
                f"the standard's operators cannot read zero points of {blocks.bits} bits in rows of {matrix.num_blocks} blocks",
                hint="export with --ops ort, or with another --block-size",
            )
        numbers = weights.packed_numbers(matrix, dtype, [matrix.num_blocks * blocks.block_size])
        zero_points = self._own_zero_points(matrix, dtype, [matrix.num_blocks])
        inputs = [numbers, weights.scales(matrix), zero_points]
        return self.without_padding(
            self.emit.op("DequantizeLinear", inputs, axis=1, block_size=blocks.block_size), matrix
        )

    def _own_zero_points(self, matrix: PackedMatrix, dtype: ir.DataType, row_shape: Sequence[int]) -> ir.Value:
        found = self.emit.weights.zero_points(matrix, dtype, row_shape)
        assert found is not None, "bundle.check_packing sees to that"
        return found

    def look_up(self, table: PackedMatrix, ids: ir.Value) -> ir.Value:
        """`Gather` has no numbers of 4 bits: bytes are looked up, then taken apart."""
        emit, blocks = self.emit, table.blocks
        num_bytes, zero_bytes = table.num_blocks * blocks.block_bytes, blocks.zero_point_bytes(table.shape[1])
        packed = [
            emit.weights.packed_numbers(table, ir.DataType.UINT8, [num_bytes]),
            self._own_zero_points(table, ir.DataType.UINT8, [zero_bytes]),
        ]
        numbers, zero_points = (self._unpack(emit.op("Gather", [part, ids]), blocks.bits) for part in packed)
        if table.num_blocks * blocks.bits % 8:
            ends = [emit.integers(number) for number in (0, table.num_blocks, -1)]
            zero_points = emit.op("Slice", [zero_points, *ends])
        scales = emit.op("Gather", [emit.weights.scales(table), ids])
        inputs = [numbers, scales, zero_points]
        return self.without_padding(emit.op("DequantizeLinear", inputs, axis=-1, block_size=blocks.block_size), table)

    def _unpack(self, value: ir.Value, bits: int) -> ir.Value:
        """Numbers of `bits` bits [B, T, n * 8 / bits] out of bytes [B, T, n], the lower half first."""
        if bits == 8:
            return value
        emit, last = self.emit, self.emit.integers(-1)
        mask, shift = (emit.weights.constant(f"uint8_{number}", np.array(number, np.uint8)) for number in (15, 4))
        halves = [emit.op("BitwiseAnd", [value, mask]), emit.op("BitShift", [value, shift], direction="RIGHT")]
        together = emit.op("Concat", [emit.op("Unsqueeze", [half, last]) for half in halves], axis=-1)
        return emit.reshape(together, 0, 0, -1)

    def rms_norm(self, value: ir.Value, scale: ir.Value) -> ir.Value:
        return self.emit.op("RMSNormalization", [value, scale], axis=-1, epsilon=self.architecture.norm_epsilon)

    def rotate(self, value: ir.Value, positions: ir.Value, rope: Rope, num_heads: int) -> ir.Value:
        partial = rope.width if rope.width != self.architecture.head_dim else 0
        return self.emit.op(
            "RotaryEmbedding",
            [value, *self.rotary_tables(rope), positions],
            num_heads=num_heads,
            rotary_embedding_dim=partial,
            interleaved=int(rope.interleaved),
        )

    def silu(self, value: ir.Value) -> ir.Value:
        return self.emit.op("Swish", [value])

    def attend(
        self, query_key_value: Sequence[ir.Value], cache: Cache, tokens: Tokens, layer: int
    ) -> tuple[ir.Value, Cache]:
        shape = self.architecture
        query, key, value = self.rotated(query_key_value, tokens, shape.ropes[layer])
        keys, values = self.scatter(
            self.heads(key, shape.num_kv_heads), self.heads(value, shape.num_kv_heads), cache, tokens
        )
        mask = self._mask(tokens, query, keys, shape.windows[layer])
        output = self.emit.op(
            "Attention",
            [self.heads(query, shape.num_heads), keys, values, mask],
            scale=shape.score_scale,
            softcap=shape.score_softcap or 0.0,
        )
        together = self.emit.op("Transpose", [output], perm=[0, 2, 1, 3])
        return self.emit.reshape(together, 0, 0, shape.num_heads * shape.head_dim), (keys, values)

    def _mask(self, tokens: Tokens, query: ir.Value, keys: ir.Value, window: int | None) -> ir.Value:
        """Which positions of the buffer each new token sees, bool [B, 1, T, M]."""
        key = (tokens, window)
        if key not in self._masks:
            emit = self.emit
            size = emit.op("Squeeze", [emit.op("Shape", [keys], start=2, end=3)])
            columns = emit.op("Range", [emit.integer(0), size, emit.integer(1)])
            rows = emit.op("Unsqueeze", [emit.positions(tokens, query), emit.integers(1, 3)])
            seen = emit.op("LessOrEqual", [columns, rows])
            if window is not None:
                first = emit.op("Sub", [rows, emit.integer(window)])
                seen = emit.op("And", [seen, emit.op("Greater", [columns, first])])
            self._masks[key] = seen
        return self._masks[key]


OPERATOR_SETS: dict[str, type[Operators]] = {"ort": FusedOperators, "standard": StandardOperators}
