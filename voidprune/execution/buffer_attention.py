"""Attention as matrix products over K/V buffers, in place of onnxruntime's own operator: faster on a CPU.

`GroupQueryAttention` multiplies there head by head, in decode a vector by a matrix each time, and reads keys and values once for
every head that shares them (1.31: onnxruntime/contrib_ops/cpu/bert/gqa_attention_base.h). Here the heads that share them are the
rows of one product. What buffers hold behind their tokens has to be finite.

Shapes: B rows, T new tokens each, N heads in K groups of G that share keys and values, H head size, M positions of the buffers,
C tokens of a chunk, S keys that a chunk may see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from voidprune.execution.kv_cache import LARGEST, LEAST
from voidprune.execution.node_writer import FLOAT, INT8, INT64, ORT, NodeWriter

if TYPE_CHECKING:
    import onnx

CHUNK = 32
"""Tokens of a prompt that attend at a time: their scores stay in the caches of a processor. 16 to 128 are about as fast."""
SHORT_PROMPT = 96
"""Tokens up to which the operator is faster than a loop."""
MANY_KEYS = 1024
"""Keys of a token beyond which the operator is used again: with 2,048 of them the scores of a chunk are in no core's cache, and a
loop took 0.91 of its time on one processor and 1.08 on another (docs/results.md, "Attention")."""
LEAST_WIDTH = 512
"""Of all query heads of a layer together. Below, nodes take longer to begin than to do their work: with 192, steps were 1.2 to 1.3
times as long and prompts of 128 tokens 1.3 times; with 896, 0.93 and 0.89 (prompt and context of 512, 2 cores)."""
_OPERATOR = "GroupQueryAttention"
_INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "last_position", "total", "cosines", "sines"),
    *("positions", "bias", "sinks", "key_steps", "value_steps"),
)
"""Of the operator (onnxruntime, docs/ContribOperators.md). The graphs use no positions, bias and sinks, and steps only where K/V
are in 8 bits. Without a key, `query` is all three."""


def rewrite_decode(model: onnx.ModelProto, *, least_width: int | None = None) -> int:
    """Let decode multiply all positions of the buffers at once. Returns the heads of a layer whose scores are then in memory.

    Buffers should not be much longer than what is in them. Nothing is changed, and 0 returned, where no heads share keys: a
    product of a single row is slower than the operator; in layers of less than `least_width` (by default LEAST_WIDTH); and where
    K/V are not float32.
    """
    found = _attentions(model, least_width=least_width)
    if any(attention.num_heads == attention.num_groups or attention.rounds for attention in found):
        return 0
    _rewrite(model, found, _attend_at_once)
    return max((attention.num_heads for attention in found), default=0)


def rewrite_prefill(model: onnx.ModelProto, *, least_width: int | None = None) -> None:
    """Let the tokens of prompts that are neither short nor very long attend CHUNK at a time, to the keys that they may see.

    All rows have as many tokens. K/V in 8 bits are widened for that, and very long prompts are no exception: the operator reads
    them anew for every query, and took 4 times as long as with K/V in float32 for 512 tokens, 6 times for 2,048 (onnxruntime 1.31,
    2 cores of an EPYC with AVX2). Nothing is changed in layers of less than `least_width` (by default LEAST_WIDTH), and where
    graphs do not compute in float32.
    """
    _rewrite(model, _attentions(model, least_width=least_width), _attend_by_length)


@dataclass(frozen=True)
class _Attention:
    """One GroupQueryAttention: its node, inputs by name, and attributes."""

    node: onnx.NodeProto
    inputs: dict[str, str]
    attributes: dict[str, Any]
    head_dim: int
    rotated: int
    """Numbers of a head that are turned to its position; 0 where the operator turns none."""

    @property
    def num_heads(self) -> int:
        return int(self.attributes["num_heads"])

    @property
    def num_groups(self) -> int:
        return int(self.attributes["kv_num_heads"])

    @property
    def rounds(self) -> bool:
        """Whether buffers hold K/V in 8 bits."""
        return bool(self.inputs["key_steps"])

    @property
    def scale(self) -> float:
        return float(self.attributes.get("scale") or 1 / math.sqrt(self.head_dim))

    @property
    def window(self) -> int:
        """Keys that a token sees, its own included; 0 for all."""
        return max(0, int(self.attributes.get("local_window_size", 0)))


def _attentions(model: onnx.ModelProto, *, least_width: int | None) -> list[_Attention]:
    """Of a graph; none where it does not compute in float32 or layers are narrower."""
    import onnx

    caches = {value.name: value.type.tensor_type for value in model.graph.input if value.name.startswith("past_key")}
    results = [value.type.tensor_type for value in model.graph.output if not value.name.startswith("present")]
    held = {cache.elem_type for cache in caches.values()}
    if {result.elem_type for result in results} != {FLOAT} or not held <= {FLOAT, INT8}:
        return []
    widths: dict[str, int] = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
        if value.type.tensor_type.shape.dim
    }  # rotary tables are computed from constants
    (head_dim,) = {cache.shape.dim[-1].dim_value for cache in caches.values()} or {0}
    found = []
    for node in model.graph.node:
        if node.op_type == _OPERATOR:
            inputs = dict.fromkeys(_INPUTS, "") | dict(zip(_INPUTS, node.input, strict=False))
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            rotated = 2 * widths[inputs["cosines"]] if attributes.get("do_rotary") else 0
            found.append(_Attention(node, inputs, attributes, head_dim, rotated))
    width = LEAST_WIDTH if least_width is None else least_width
    return [] if any(one.num_heads * head_dim < width for one in found) else found


def _rewrite(model: onnx.ModelProto, found: list[_Attention], attend: Callable[[NodeWriter, _Attention], None]) -> None:
    graph = model.graph
    by_output = {attention.node.output[0]: attention for attention in found}
    nodes = list(graph.node)
    del graph.node[:]
    writer = NodeWriter(graph, "attention")
    for node in nodes:
        attention = by_output.get(node.output[0])
        if attention is None:
            graph.node.append(node)
        else:
            attend(writer, attention)


def _write_heads(writer: NodeWriter, attention: _Attention, num_tokens: str, first: str) -> str:
    """The new keys and values into their buffers; the queries [B, N, T, H]. `num_tokens` [1], `first` position [B]."""
    inputs, sizes = attention.inputs, (attention.num_heads, attention.num_groups)
    together = inputs["query"]
    if inputs["key"]:
        together = writer.op("Concat", [inputs["query"], inputs["key"], inputs["value"]], axis=-1)
    heads = writer.op("Transpose", [writer.reshape(together, 0, 0, -1, attention.head_dim)], perm=[0, 2, 1, 3])
    turned, value = writer.split(heads, [sum(sizes), sizes[1]], axis=1)
    if attention.rotated:
        positions = writer.once(
            "Add", [writer.once("Unsqueeze", [first, writer.integers(1)]), writer.range(num_tokens)]
        )
        turned = writer.op(
            "RotaryEmbedding",
            [turned, positions, inputs["cosines"], inputs["sines"]],
            domain=ORT,
            num_heads=sum(sizes),
            rotary_embedding_dim=attention.rotated if attention.rotated != attention.head_dim else 0,
            interleaved=attention.attributes.get("rotary_interleaved", 0),
        )
    query, key = writer.split(turned, sizes, axis=1)
    _, *presents = attention.node.output
    for new, part, present in zip((key, value), ("key", "value"), presents, strict=True):
        if attention.rounds:
            new = _round(writer, new, inputs[f"{part}_steps"])
        writer.op("TensorScatter", [inputs[f"past_{part}"], new, first], output=present, axis=2)
    return query


def _round(writer: NodeWriter, states: str, steps: str) -> str:
    """Keys or values [B, K, T, H] as `kv_cache.py` has them in 8 bits; `steps` [1, K, 1, H]."""
    numbers = writer.op("Round", [writer.op("Div", [states, steps])])
    fitting = writer.op("Clip", [numbers, writer.number(LEAST), writer.number(LARGEST)])
    return writer.op("Cast", [fitting], to=INT8)


def _widen(writer: NodeWriter, numbers: str, steps: str) -> str:
    return writer.op("Mul", [writer.op("Cast", [numbers], to=FLOAT), steps])


def _score(writer: NodeWriter, attention: _Attention, query: str, keys: str) -> str:
    """Of queries [B, N, T, H] and keys [B, K, S, H]: [B, K, G * T, S], all tokens of one head, then those of the next."""
    grouped = writer.reshape(query, 0, attention.num_groups, -1, attention.head_dim)
    scores = writer.op("FusedMatMul", [grouped, keys], domain=ORT, transB=1, alpha=attention.scale)
    if softcap := attention.attributes.get("softcap"):
        capped = writer.op("Tanh", [writer.op("Div", [scores, writer.number(softcap)])])
        scores = writer.op("Mul", [capped, writer.number(softcap)])
    return scores


def _first_positions(writer: NodeWriter, attention: _Attention, num_tokens: str) -> str:
    """Of the new tokens of each row, the position of the first: [B]."""
    last = writer.once("Cast", [attention.inputs["last_position"]], to=INT64)
    return writer.once("Sub", [writer.once("Add", [last, writer.integers(1)]), num_tokens])


def _hide(writer: NodeWriter, unseen: str) -> str:
    """What is added to scores: minus infinity where they are not to count."""
    return writer.once("Where", [unseen, writer.number(-math.inf), writer.number(0.0)])


# ---- decode


def _attend_at_once(writer: NodeWriter, attention: _Attention) -> None:
    num_tokens = writer.once("Shape", ["input_ids"], start=1, end=2)
    first = _first_positions(writer, attention, num_tokens)
    query = _write_heads(writer, attention, num_tokens, first)
    output, key, value = attention.node.output
    scores = _score(writer, attention, query, key)
    any_buffer = next(value.name for value in writer.graph.input if value.name.startswith("past_key"))
    positions = writer.once("Add", [writer.once("Unsqueeze", [first, writer.integers(1)]), writer.range(num_tokens)])
    position = writer.once("Unsqueeze", [positions, writer.integers(2)])
    places = writer.range(writer.once("Shape", [any_buffer], start=2, end=3))
    unseen = writer.once("Greater", [places, position])
    if attention.window:
        oldest = writer.once("Sub", [position, writer.integer(attention.window - 1)])
        unseen = writer.once("Or", [unseen, writer.once("Less", [places, oldest])])
    bias = writer.once("Unsqueeze", [_hide(writer, unseen), writer.integers(1)])
    rows = writer.once("Tile", [bias, writer.integers(1, 1, attention.num_heads // attention.num_groups, 1)])
    shares = writer.op("Softmax", [writer.op("Add", [scores, rows])], axis=-1)
    mixed = writer.reshape(writer.op("MatMul", [shares, value]), 0, attention.num_heads, -1, attention.head_dim)
    writer.reshape(writer.op("Transpose", [mixed], perm=[0, 2, 1, 3]), 0, 0, -1, output=output)


# ---- prefill


def _attend_by_length(writer: NodeWriter, attention: _Attention) -> None:
    """By the operator where the prompt is short or has many keys, else in chunks."""
    import onnx

    outputs = list(attention.node.output)
    branches = []
    for name in ("operator", "chunks"):
        branch = onnx.GraphProto(name=f"{outputs[0]}.{name}")
        node = onnx.NodeProto()
        node.CopyFrom(attention.node)
        node.output[:] = [f"{branch.name}.{output}" for output in outputs]
        if name == "operator":
            branch.node.append(node)
        else:
            _attend_in_chunks(NodeWriter(branch, branch.name), replace(attention, node=node))
        kinds = [FLOAT, *[INT8 if attention.rounds else FLOAT] * 2]
        branch.output.extend(map(onnx.helper.make_tensor_value_info, node.output, kinds, [None] * 3))
        branches.append(branch)
    num_tokens = writer.once("Squeeze", [writer.once("Shape", ["input_ids"], start=1, end=2)])
    by_operator = writer.once("LessOrEqual", [num_tokens, writer.integer(SHORT_PROMPT)])
    if not attention.rounds and not 0 < attention.window <= MANY_KEYS:
        num_keys = writer.once("Cast", [attention.inputs["total"]], to=INT64)
        sees_many = writer.once("Greater", [num_keys, writer.integer(MANY_KEYS)])
        by_operator = writer.once("Or", [by_operator, sees_many])
    chosen = dict(zip(("then_branch", "else_branch"), branches, strict=True))
    writer.graph.node.append(onnx.helper.make_node("If", [by_operator], outputs, name=f"{outputs[0]}.length", **chosen))


def _attend_in_chunks(writer: NodeWriter, attention: _Attention) -> None:
    """As a Loop over chunks of equal length; the last may begin before the one before it ends, and its new tokens count."""
    import onnx

    one, minus_one = writer.integers(1), writer.integers(-1)
    num_tokens = writer.op("Shape", [attention.inputs["query"]], start=1, end=2)
    first = _first_positions(writer, attention, num_tokens)
    query = _write_heads(writer, attention, num_tokens, first)
    output, key, value = attention.node.output
    if attention.rounds:
        key = _widen(writer, key, attention.inputs["key_steps"])
        value = _widen(writer, value, attention.inputs["value_steps"])
    num_chunks = _divide_up(writer, num_tokens, writer.integers(CHUNK))
    length = _divide_up(writer, num_tokens, num_chunks)
    start = writer.op("ReduceMax", [first, writer.integers(0)], keepdims=1)  # the same in all rows
    num_places = writer.op("Shape", [attention.inputs["past_key"]], start=2, end=3)
    # Which of M + C keys, the last of a chunk at the end, each of its tokens sees.
    width = writer.op("Add", [num_places, length])
    own = writer.op("Unsqueeze", [writer.op("Add", [num_places, writer.range(length)]), one])
    places = writer.range(width)
    unseen = writer.op("Greater", [places, own])
    if attention.window:
        oldest = writer.op("Sub", [own, writer.integer(attention.window - 1)])
        unseen = writer.op("Or", [unseen, writer.op("Less", [places, oldest])])
    band = _hide(writer, unseen)
    heads, groups = attention.num_heads, attention.num_groups
    by_head = writer.op("Concat", [writer.integers(0, heads), length, minus_one], axis=0)
    shared = writer.op("Mul", [length, writer.integers(heads // groups)])
    by_group = writer.op("Concat", [writer.integers(0, groups), shared, minus_one], axis=0)

    body = onnx.GraphProto(name=f"{writer.prefix}.chunk")
    inner = NodeWriter(body, body.name)
    offset = inner.op("Mul", [inner.op("Unsqueeze", [f"{inner.prefix}.number", inner.integers(0)]), length])
    begin = inner.op("Min", [offset, inner.op("Sub", [num_tokens, length])])
    end = inner.op("Add", [begin, length])
    full_end = inner.op("Add", [start, end])
    last_key = inner.op("Min", [full_end, num_places])
    first_key = inner.integers(0)
    if attention.window:
        behind = inner.op("Sub", [inner.op("Add", [start, begin]), inner.integers(attention.window - 1)])
        first_key = inner.op("Max", [behind, first_key])
    tokens = keys = inner.integers(2)  # axes
    asking = inner.op("Slice", [query, begin, end, tokens])
    scores = _score(inner, attention, asking, inner.op("Slice", [key, first_key, last_key, keys]))
    shift = inner.op("Sub", [width, full_end])
    columns = [inner.op("Add", [place, shift]) for place in (first_key, last_key)]
    bias = inner.op("Slice", [band, *columns, inner.integers(1)])
    shares = inner.op("Softmax", [inner.op("Add", [inner.op("Reshape", [scores, by_head]), bias])], axis=-1)
    seen = inner.op("Slice", [value, first_key, last_key, keys])
    mixed = inner.op("MatMul", [inner.op("Reshape", [shares, by_group]), seen])
    inner.reshape(mixed, 0, heads, -1, attention.head_dim, output=f"{inner.prefix}.mixed")
    inner.op("Identity", [f"{inner.prefix}.asked_on"], output=f"{inner.prefix}.goes_on")
    value_info = onnx.helper.make_tensor_value_info
    asked = [("number", INT64), ("asked_on", onnx.TensorProto.BOOL)]
    body.input.extend(value_info(f"{inner.prefix}.{name}", kind, []) for name, kind in asked)
    body.output.append(value_info(f"{inner.prefix}.goes_on", onnx.TensorProto.BOOL, []))
    mixed_shape: list[str | int] = ["batch", heads, "chunk", attention.head_dim]
    body.output.append(value_info(f"{inner.prefix}.mixed", onnx.TensorProto.FLOAT, mixed_shape))
    chunks = writer.op("Loop", [writer.op("Squeeze", [num_chunks]), ""], body=body)  # [chunks, B, N, C, H]

    in_order = writer.op("Transpose", [chunks], perm=[1, 0, 3, 2, 4])
    flat = writer.op("Reshape", [in_order, writer.integers(0, -1, heads * attention.head_dim)])
    before = writer.op("Mul", [writer.op("Sub", [num_chunks, one]), length])
    twice = writer.op("Sub", [writer.op("Add", [before, length]), num_tokens])
    numbers = writer.range(num_tokens)
    later = writer.op("Add", [numbers, twice])
    chosen = writer.op("Where", [writer.op("Less", [numbers, before]), numbers, later])
    writer.op("Gather", [flat, chosen], output=output, axis=1)


def _divide_up(writer: NodeWriter, number: str, by: str) -> str:
    """[1] over [1], rounded up."""
    return writer.op("Div", [writer.op("Add", [number, writer.op("Sub", [by, writer.integers(1)])]), by])
