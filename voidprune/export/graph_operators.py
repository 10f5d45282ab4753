"""The operators of one graph, one method a part of a decoder. What runs when is decided in `onnx_graph.py`, not here.

Weights are external data: names, shapes and byte ranges of the checkpoint's own file. Shapes as in `onnx_graph.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

import voidprune
from voidprune.errors import CheckpointError, ModelError
from voidprune.models.checkpoint import Checkpoint, TensorRecord
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.schedule import LayerAction, Phase

OPSET = 24
IR_VERSION = 10
_ORT = "com.microsoft"
_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Tokens:
    """Which of the new tokens a tensor holds, as the cache operators need to know it.

    `last_position` int32 [B]: the position of the last of them in each row; `total` int32 scalar: tokens of the longest row up
    to it; `first_position` int64 [B].
    """

    last_position: ir.Value
    total: ir.Value
    first_position: ir.Value


@dataclass(frozen=True)
class Hidden:
    """The residual stream of some tokens: `stream`, plus a sublayer output that the next norm will add to it."""

    stream: ir.Value
    pending: ir.Value | None
    tokens: Tokens


class GraphAuthor:
    """Emits operators of one graph. Each method takes values and returns values; state is only the tape."""

    def __init__(self, checkpoint: Checkpoint, phase: Phase, slots: Mapping[int, int]) -> None:
        """`slots`: layer -> cache slot, of the layers that write K/V in this graph. Raises ModelError, CheckpointError."""
        self.checkpoint = checkpoint
        self.architecture = describe_graph_architecture(checkpoint.config, checkpoint.architecture.spec)
        self.names = self.architecture.spec.tensors
        self.phase = phase
        self.slots = slots
        if checkpoint.dtype not in _DTYPES:
            raise ModelError(f"weights of dtype {checkpoint.dtype} have no ONNX graph", hint="export with --format hf")
        self.dtype = _DTYPES[checkpoint.dtype]
        self.tape = ir.tape.Tape()
        self.weights: dict[str, ir.Value] = {}
        self.input_ids = _value("input_ids", ir.DataType.INT64, ["batch", "tokens"])
        self.attention_mask = _value("attention_mask", ir.DataType.INT64, ["batch", "total"])
        cache: list[int | str] = ["batch", self.architecture.num_kv_heads, "positions", self.architecture.head_dim]
        self.cache = {
            slot: (
                _value(f"past_key_values.{slot}.key", self.dtype, cache),
                _value(f"past_key_values.{slot}.value", self.dtype, cache),
            )
            for slot in slots.values()
        }
        self.inputs = [self.input_ids, self.attention_mask, *(value for pair in self.cache.values() for value in pair)]
        self._cache_shape = ir.Shape(cache)
        self.all_tokens = self._count_tokens()
        self.cosines, self.sines = self._rotary_tables()
        # onnxruntime 1.31: GroupQueryAttention rotates heads of 16, 32, ... only ("head_size shall be a multiple of 16").
        self.fused_rotary = self.architecture.head_dim % 16 == 0

    # ---- tokens and positions

    def _count_tokens(self) -> Tokens:
        one = self.constant("one", np.array([1], np.int64))
        lengths = self.op("ReduceSum", [self.attention_mask, one], keepdims=0)
        total = self.op("Shape", [self.attention_mask], start=1, end=2)
        return Tokens(
            last_position=self.op("Cast", [self.op("Sub", [lengths, one])], to=ir.DataType.INT32),
            total=self.op("Cast", [self.op("Squeeze", [total])], to=ir.DataType.INT32),
            first_position=self.op("Sub", [lengths, self.op("Shape", [self.input_ids], start=1, end=2)]),
        )

    def earlier_tokens(self) -> Tokens:
        """All new tokens but the last."""
        one = self.constant("one_int32", np.array(1, np.int32))
        return Tokens(
            last_position=self.op("Sub", [self.all_tokens.last_position, one]),
            total=self.op("Sub", [self.all_tokens.total, one]),
            first_position=self.all_tokens.first_position,
        )

    def final_token(self) -> Tokens:
        position = self.op("Cast", [self.all_tokens.last_position], to=ir.DataType.INT64)
        return replace(self.all_tokens, first_position=position)

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [context, H/2]: computed by onnxruntime when it loads the graph, so the file stays small."""
        frequencies = self.architecture.rope.inverse_frequencies(self.architecture.head_dim)
        scalars = [
            self.constant("rope_start", np.array(0, np.int64)),
            self.constant("rope_context", np.array(self.architecture.context_length, np.int64)),
            self.constant("rope_step", np.array(1, np.int64)),
        ]
        positions = self.op("Cast", [self.op("Range", scalars)], to=ir.DataType.FLOAT)
        column = self.op("Unsqueeze", [positions, self.constant("rope_axis", np.array([1], np.int64))])
        angles = self.op("Mul", [column, self.constant("rope_frequencies", frequencies[np.newaxis, :])])
        return self.cast(self.op("Cos", [angles])), self.cast(self.op("Sin", [angles]))

    # ---- the residual stream

    def embed(self) -> Hidden:
        table = self.weight(f"{self.names.embedding}.weight")
        return Hidden(self.op("Gather", [table, self.input_ids]), None, self.all_tokens)

    def normalize(self, hidden: Hidden, weight: str) -> tuple[ir.Value, Hidden]:
        """RMS norm of the stream, and the stream with what was pending added to it."""
        scale = self.weight(f"{weight}.weight")
        epsilon = self.architecture.norm_epsilon
        if hidden.pending is None:
            normed = self.op(
                "SimplifiedLayerNormalization", [hidden.stream, scale], axis=-1, epsilon=epsilon, stash_type=1
            )
            return normed, hidden
        normed, _, _, stream = self.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [hidden.stream, hidden.pending, scale],
            {"epsilon": epsilon},
            num_outputs=4,
            domain=_ORT,
        )
        return normed, replace(hidden, stream=stream, pending=None)

    def last_token(self, hidden: Hidden) -> Hidden:
        return self._slice_hidden(hidden, -1, _END, self.final_token())

    def split(self, hidden: Hidden) -> tuple[Hidden, Hidden]:
        return self._slice_hidden(hidden, 0, -1, self.earlier_tokens()), self.last_token(hidden)

    def _slice_hidden(self, hidden: Hidden, start: int, end: int, tokens: Tokens) -> Hidden:
        pending = None if hidden.pending is None else self.slice_tokens(hidden.pending, start, end)
        return Hidden(self.slice_tokens(hidden.stream, start, end), pending, tokens)

    def slice_tokens(self, value: ir.Value, start: int, end: int) -> ir.Value:
        bounds = [self.constant(f"index_{number}", np.array([number], np.int64)) for number in (start, end, 1)]
        return self.op("Slice", [value, *bounds])

    def join(self, earlier: Hidden, last: Hidden) -> Hidden:
        if earlier.pending is not None and last.pending is not None:
            pending = self.op("Concat", [earlier.pending, last.pending], axis=1)
            return Hidden(self.op("Concat", [earlier.stream, last.stream], axis=1), pending, self.all_tokens)
        streams = [self.settle(earlier).stream, self.settle(last).stream]
        return Hidden(self.op("Concat", streams, axis=1), None, self.all_tokens)

    def settle(self, hidden: Hidden) -> Hidden:
        if hidden.pending is None:
            return hidden
        return replace(hidden, stream=self.op("Add", [hidden.stream, hidden.pending]), pending=None)

    # ---- sublayers

    def layer(self, hidden: Hidden, layer: int, action: LayerAction, *, last_only: bool = False) -> Hidden:
        """One layer for all tokens of `hidden`. With `last_only`, nothing but the last token is needed after its K/V."""
        if action.writes_kv:
            hidden = self.attention(hidden, layer, action, last_only=last_only)
        elif last_only:
            hidden = self.last_token(hidden)
        return self.mlp(hidden, layer) if action.runs_mlp else hidden

    def attention(
        self, hidden: Hidden, layer: int, action: LayerAction, *, last_only: bool = False, is_final_write: bool = True
    ) -> Hidden:
        """The attention sublayer: adds its output where the action attends, writes K/V in any case.

        `is_final_write` is False when another part of the tokens will write into the same slot afterwards.
        """
        slot = self.slots[layer]
        normed, hidden = self.normalize(hidden, self.names.layer(layer, self.names.attention_norm))
        if not action.attends:
            self.cache[slot] = self._write_kv(normed, layer, hidden.tokens)
            if is_final_write:
                self._name_present(slot)
            return self.last_token(hidden) if last_only else hidden
        output, *present = self.tape.op_multi_out(
            "GroupQueryAttention",
            [
                *self._query_key_value(normed, layer, hidden.tokens),
                *self.cache[slot],
                hidden.tokens.last_position,
                hidden.tokens.total,
                *((self.cosines, self.sines) if self.fused_rotary else ()),
            ],
            {
                "num_heads": self.architecture.num_heads,
                "kv_num_heads": self.architecture.num_kv_heads,
                "do_rotary": int(self.fused_rotary),
                "local_window_size": self.architecture.windows[layer] or -1,
            },
            num_outputs=3,
            domain=_ORT,
        )
        self.cache[slot] = (present[0], present[1])
        if is_final_write:
            self._name_present(slot)
        if last_only:
            hidden = self.last_token(hidden)
            output = self.slice_tokens(output, -1, _END)
        projected = self.linear(output, layer, (self.names.output,), bias=self.architecture.output_bias)
        return replace(hidden, pending=projected)

    def _query_key_value(self, normed: ir.Value, layer: int, tokens: Tokens) -> tuple[ir.Value | None, ...]:
        """Inputs of the attention operator: packed, or with the rotary embedding applied outside where it must be."""
        names = (self.names.query, self.names.key, self.names.value)
        packed = self.linear(normed, layer, names, bias=self.architecture.qkv_bias)
        if self.fused_rotary:
            return packed, None, None
        heads = (self.architecture.num_heads, self.architecture.num_kv_heads, self.architecture.num_kv_heads)
        sizes = np.array([count * self.architecture.head_dim for count in heads], np.int64)
        query, key, value = self.tape.op_multi_out(
            "Split", [packed, self.constant("qkv_sizes", sizes)], {"axis": -1}, num_outputs=3
        )
        positions = self._positions(normed, tokens)
        return self._rotate(query, positions, heads[0]), self._rotate(key, positions, heads[1]), value

    def _write_kv(self, normed: ir.Value, layer: int, tokens: Tokens) -> tuple[ir.Value, ir.Value]:
        """Keys and values of these tokens into the buffers; no query, no attention."""
        names, num_heads = (self.names.key, self.names.value), self.architecture.num_kv_heads
        both = self.linear(normed, layer, names, bias=self.architecture.qkv_bias)
        key, value = self.tape.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        key = self._rotate(key, self._positions(normed, tokens), num_heads)
        heads = self.constant("kv_heads", np.array([0, 0, num_heads, self.architecture.head_dim], np.int64))
        past_key, past_value = self.cache[self.slots[layer]]
        key, value = (
            self.op("Transpose", [self.op("Reshape", [part, heads])], perm=[0, 2, 1, 3]) for part in (key, value)
        )
        return (
            self.op("TensorScatter", [past_key, key, tokens.first_position], axis=2),
            self.op("TensorScatter", [past_value, value, tokens.first_position], axis=2),
        )

    def _positions(self, tensor: ir.Value, tokens: Tokens) -> ir.Value:
        """Position ids [B, T] of the tokens in a tensor [B, T, ...]."""
        bounds = [self.constant("zero", np.array(0, np.int64)), self.constant("step", np.array(1, np.int64))]
        count = self.op("Squeeze", [self.op("Shape", [tensor], start=1, end=2)])
        offsets = self.op("Range", [bounds[0], count, bounds[1]])
        column = self.op("Unsqueeze", [tokens.first_position, self.constant("column", np.array([1], np.int64))])
        return self.op("Add", [column, offsets])

    def _rotate(self, value: ir.Value, positions: ir.Value, num_heads: int) -> ir.Value:
        inputs = [value, positions, self.cosines, self.sines]
        return self.op("RotaryEmbedding", inputs, domain=_ORT, num_heads=num_heads)

    def _name_present(self, slot: int) -> None:
        for value, part in zip(self.cache[slot], ("key", "value"), strict=True):
            value.name = f"present.{slot}.{part}"
            value.type = ir.TensorType(self.dtype)
            value.shape = self._cache_shape

    def mlp(self, hidden: Hidden, layer: int) -> Hidden:
        normed, hidden = self.normalize(hidden, self.names.layer(layer, self.names.mlp_norm))
        bias = self.architecture.mlp_bias
        gate = self.linear(normed, layer, (self.names.gate,), bias=bias)
        up = self.linear(normed, layer, (self.names.up,), bias=bias)
        activated = self.op("Mul", [self.op("QuickGelu", [gate], domain=_ORT, alpha=1.0), up])
        return replace(hidden, pending=self.linear(activated, layer, (self.names.down,), bias=bias))

    def finish(self, hidden: Hidden) -> ir.Model:
        """Final norm and head; the whole graph."""
        normed, _ = self.normalize(hidden, self.names.final_norm)
        head = self.names.embedding if self.architecture.tied_embeddings else self.names.head
        logits = self.op("FusedMatMul", [normed, self.weight(f"{head}.weight")], domain=_ORT, transB=1)
        logits.name = "logits"
        logits.type = ir.TensorType(self.dtype)
        new_tokens = 1 if self.phase is Phase.PREFILL else "tokens"
        logits.shape = ir.Shape(["batch", new_tokens, self.architecture.vocab_size])
        presents = [value for pair in self.cache.values() for value in pair]
        graph = ir.Graph(
            self.inputs,
            [logits, *presents],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET, _ORT: 1},
            name=str(self.phase),
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="voidprune", producer_version=voidprune.__version__)

    # ---- operators and weights

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: object
    ) -> ir.Value:
        return self.tape.op(op_type, inputs, attributes, domain=domain)  # type: ignore[arg-type]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if name not in self.weights:
            self.weights[name] = self.tape.initializer(ir.tensor(array, name=name), name)
        return self.weights[name]

    def cast(self, value: ir.Value) -> ir.Value:
        return value if self.dtype is ir.DataType.FLOAT else self.op("Cast", [value], to=self.dtype)

    def linear(self, value: ir.Value, layer: int, names: tuple[str, ...], *, bias: bool) -> ir.Value:
        """`value` times the matrices `names` of a layer, side by side; one product, because they lie side by side on disk."""
        full = [self.names.layer(layer, name) for name in names]
        product = self.op(
            "FusedMatMul", [value, self.weight(*(f"{name}.weight" for name in full))], domain=_ORT, transB=1
        )
        return self.op("Add", [product, self.weight(*(f"{name}.bias" for name in full))]) if bias else product

    def weight(self, *names: str) -> ir.Value:
        """The tensors `names`, stacked along their first axis: one range of bytes in the checkpoint's file."""
        label = "+".join(names)
        if label not in self.weights:
            records = [self._record(name) for name in names]
            first = records[0]
            for before, after in itertools.pairwise(records):
                assert before.offset + before.num_bytes == after.offset, f"{after.name} does not follow {before.name}"
            tensor = ir.ExternalTensor(
                first.file.name,
                first.offset,
                sum(record.num_bytes for record in records),
                self.dtype,
                shape=ir.Shape([sum(record.shape[0] for record in records), *first.shape[1:]]),
                name=label,
                base_dir=first.file.parent,
            )
            self.weights[label] = self.tape.initializer(tensor, label)
        return self.weights[label]

    def _record(self, name: str) -> TensorRecord:
        record = self.checkpoint.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self.checkpoint.folder} lacks {name}, which its config asks for")
        if _DTYPES.get(record.dtype) is not self.dtype:
            raise ModelError(
                f"{name} is {record.dtype}; the matrices are {self.checkpoint.dtype}",
                hint="export with --precision, which makes them one",
            )
        return record


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
