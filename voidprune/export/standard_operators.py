"""The operators of the ONNX standard alone, opset 24. Shapes as in `operators.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from voidprune.errors import ModelError
from voidprune.export.emitter import Emitter, Tokens
from voidprune.export.operators import Cache, Operators
from voidprune.export.weights import Matrix, PackedMatrix
from voidprune.models.graph_architecture import GraphArchitecture
from voidprune.models.rope import Rope


class StandardOperators(Operators):
    """Those of the ONNX standard."""

    def __init__(self, emitter: Emitter, architecture: GraphArchitecture) -> None:
        super().__init__(emitter, architecture)
        self._masks: dict[tuple[Tokens, int | None], ir.Value] = {}

    def product(self, value: ir.Value, matrix: Matrix, bias: ir.Value | None, width: int) -> ir.Value:
        """`Gemm` takes [out, in] as it is; `MatMul` would make runtimes keep a transposed copy."""
        if isinstance(matrix, PackedMatrix):
            matrix = self._dequantize(matrix)
        flat = self.emit.flatten_tokens(value)
        product = self.emit.op("Gemm", [flat, matrix, *([] if bias is None else [bias])], transB=1)
        return self.emit.unflatten_tokens(product, value, width)

    def _dequantize(self, matrix: PackedMatrix) -> ir.Value:
        """[out, in]. ONNX packs numbers of 4 bits without regard to rows, so rows must fill whole bytes."""
        weights, blocks = self.emit.weights, matrix.blocks
        if blocks.whole_rows:
            numbers = weights.packed_numbers(matrix, ir.DataType.INT8, [matrix.shape[1]])
            scales = self.emit.op("Unsqueeze", [weights.scales(matrix), self.emit.integers(1)])
            return self.emit.op("Mul", [self.emit.cast(numbers, ir.DataType.FLOAT), scales])
        dtype = ir.DataType.UINT8 if blocks.bits == 8 else ir.DataType.UINT4
        if matrix.num_blocks * blocks.bits % 8:
            raise ModelError(
                f"the standard's operators cannot read zero points of {blocks.bits} bits in rows of {matrix.num_blocks} blocks",
                hint="export with --ops ort, or with another --block-size",
            )
        numbers = weights.packed_numbers(matrix, dtype, [matrix.num_blocks * matrix.block_length])
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
        num_bytes, zero_bytes = table.row_bytes, blocks.zero_point_bytes(table.shape[1])
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
        new_keys, new_values = (self.heads(part, shape.num_kv_heads) for part in (key, value))
        cache = self.scatter(new_keys, new_values, cache, tokens)
        mask = self._mask(tokens, query, cache.key, shape.windows[layer])
        output = self.emit.op(
            "Attention",
            [self.heads(query, shape.num_heads), cache.key, cache.value, mask],
            scale=shape.score_scale,
            softcap=shape.score_softcap or 0.0,
        )
        together = self.emit.op("Transpose", [output], perm=[0, 2, 1, 3])
        return self.emit.reshape(together, 0, 0, shape.num_heads * shape.head_dim), cache

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
