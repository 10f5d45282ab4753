"""onnxruntime's fused operators: the fast set. Shapes as in `operators.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from voidprune.export.emitter import Emitter, Tokens
from voidprune.export.operators import Cache, Operators
from voidprune.export.rounded_kv import K_STEPS, ROUNDING
from voidprune.export.weights import Matrix, PackedMatrix
from voidprune.models.graph_architecture import GraphArchitecture
from voidprune.models.rope import Rope

ORT = "com.microsoft"


class FusedOperators(Operators):
    """Domain com.microsoft."""

    def __init__(self, emitter: Emitter, architecture: GraphArchitecture) -> None:
        super().__init__(emitter, architecture)
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def product(self, value: ir.Value, matrix: Matrix, bias: ir.Value | None, width: int) -> ir.Value:
        if isinstance(matrix, PackedMatrix):
            multiply = self._integer_product if matrix.blocks.whole_rows else self._block_product
            return multiply(value, matrix, bias)
        product = self.emit.op("FusedMatMul", [value, matrix], domain=ORT, transB=1)
        return product if bias is None else self.emit.op("Add", [product, bias])

    def _integer_product(self, value: ir.Value, matrix: PackedMatrix, bias: ir.Value | None) -> ir.Value:
        """Numbers of 8 bits times numbers of 8 bits."""
        emit, weights = self.emit, self.emit.weights
        rows, columns = matrix.shape
        if value not in self._rounded:
            self._rounded[value] = self._round_tokens(value)
        rounded, largest = self._rounded[value]
        product = emit.op(
            "QGemm",
            [
                rounded,
                *self._rounding,
                weights.packed_numbers(matrix, ir.DataType.INT8, [columns]),
                weights.scales(matrix),
                emit.op("ConstantOfShape", [emit.integers(rows)], value=ir.tensor(np.zeros(1, np.int8))),
            ],
            domain=ORT,
            transB=1,
        )
        column = emit.op("Unsqueeze", [largest, emit.integers(1)])
        product = emit.unflatten_tokens(emit.op("Mul", [product, column]), value, rows)
        return product if bias is None else emit.op("Add", [product, bias])

    def _round_tokens(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """[B, T, K] as numbers from 1 to 255 around 128, uint8 [B * T, K], and what 127 stands for, [B * T].

        A token of zeros gives zeros: what 0 / 0 is rounded to is multiplied by 0 in the end. Nothing as large as the tokens is
        written but their numbers.
        """
        emit, (step, middle) = self.emit, self._rounding
        flat = emit.flatten_tokens(value)
        high, low = (emit.op(kind, [flat, emit.integers(1)], keepdims=0) for kind in ("ReduceMax", "ReduceMin"))
        largest = emit.op("Max", [high, emit.op("Neg", [low])])
        middles = emit.op("Expand", [middle, emit.op("Shape", [largest])])
        return emit.op("QuantizeLinear", [flat, emit.op("Mul", [largest, step]), middles], axis=0), largest

    @property
    def _rounding(self) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of rounded tokens, as shares of what is largest in each."""
        constant = self.emit.weights.constant
        return constant("int8_step", np.array(1 / 127, np.float32)), constant("uint8_128", np.array(128, np.uint8))

    def _block_product(self, value: ir.Value, matrix: PackedMatrix, bias: ir.Value | None) -> ir.Value:
        weights, blocks = self.emit.weights, matrix.blocks
        rows, columns = matrix.shape
        return self.emit.op(
            "MatMulNBits",
            [
                value,
                weights.packed_numbers(
                    matrix, ir.DataType.UINT8, [matrix.num_blocks, matrix.row_bytes // matrix.num_blocks]
                ),
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
                weights.packed_numbers(table, ir.DataType.UINT8, [table.row_bytes]),
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
        inputs = [
            *(query_key_value if len(query_key_value) == 3 else [query_key_value[0], None, None]),
            cache.key,
            cache.value,
            tokens.last_position,
            tokens.total,
            *(self.rotary_tables(rope) if rope is not None and fused else ()),
        ]
        rounding: Mapping[str, Any] = {}
        if cache.steps is not None:
            inputs += [None] * (K_STEPS - len(inputs)) + [*cache.steps]
            rounding = ROUNDING
        output, key, value = self.emit.op_with_outputs(
            "GroupQueryAttention",
            inputs,
            3,
            domain=ORT,
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            do_rotary=int(fused),
            rotary_interleaved=int(fused and rope is not None and rope.interleaved),
            local_window_size=shape.windows[layer] or -1,
            scale=shape.score_scale,
            softcap=shape.score_softcap or 0.0,
            **rounding,
        )
        return output, replace(cache, key=key, value=value)

    def _rotates_inside(self, rope: Rope) -> bool:
        # onnxruntime 1.31: GroupQueryAttention rotates multiples of 16 only ("head_size shall be a multiple of 16").
        return self.architecture.head_dim % 16 == 0 and rope.width % 16 == 0 and not rope.long_frequencies
