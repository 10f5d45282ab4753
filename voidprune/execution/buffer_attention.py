"""Attention of decode as matrix products over whole K/V buffers: on a CPU, for heads that share keys and values.

onnxruntime's `GroupQueryAttention` multiplies there head by head, a vector by a matrix each time, and reads keys and values once
for every head that shares them (1.31: onnxruntime/contrib_ops/cpu/bert/gqa_attention_base.h). Here the heads that share them are
the rows of one product. All positions of the buffers are multiplied, so buffers should not be much longer than what is in them,
and what they hold behind it has to be finite.

Shapes: B rows, T new tokens each, N heads in K groups of G that share keys and values, H head size, M positions of the buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

_ORT = "com.microsoft"
_ATTENTION = "GroupQueryAttention"
_INT64 = 7  # onnx.TensorProto.INT64


def attend_by_products(model: onnx.ModelProto) -> int:
    """Rewrite the attention of a decode graph. Returns the heads of a layer, N.

    Nothing is changed, and 0 returned, where products would not be faster: no heads share keys, or K/V are not float32.
    """
    import onnx

    graph = model.graph
    attending = [node for node in graph.node if node.op_type == _ATTENTION]
    heads = [(_attributes(node)["num_heads"], _attributes(node)["kv_num_heads"]) for node in attending]
    caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
    is_float = all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in caches)
    if not heads or not is_float or any(count == groups for count, groups in heads):
        return 0
    writer = _Writer(graph, onnx.shape_inference.infer_shapes(model).graph)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type == _ATTENTION:
            writer.attend(node)
        else:
            graph.node.append(node)
    return int(max(count for count, _ in heads))


class _Writer:
    """Appends nodes to a graph in which the names that begin with "attention." are its own."""

    def __init__(self, graph: onnx.GraphProto, inferred: onnx.GraphProto) -> None:
        """`inferred`: a graph that knows the shapes of rotary tables, which are computed from constants."""
        self._graph = graph
        self._widths: dict[str, int] = {
            value.name: value.type.tensor_type.shape.dim[-1].dim_value
            for value in (*inferred.value_info, *inferred.input)
            if value.type.tensor_type.shape.dim
        }
        self._any_buffer = next(value.name for value in graph.input if value.name.startswith("past_key_values."))
        self._made: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def attend(self, node: onnx.NodeProto) -> None:
        """What a GroupQueryAttention gives: its output [B, T, N * H], and the new keys and values in their buffers."""
        attributes = _attributes(node)
        inputs = dict(zip(_INPUTS, node.input, strict=False))
        num_heads, num_groups = attributes["num_heads"], attributes["kv_num_heads"]
        head_dim = self._widths[inputs["past_key"]]
        first = self._first(inputs)
        together = inputs["query"]
        if inputs["key"]:
            together = self._op("Concat", [inputs["query"], inputs["key"], inputs["value"]], axis=-1)
        heads = self._op("Transpose", [self._reshape(together, 0, 0, -1, head_dim)], perm=[0, 2, 1, 3])
        turned, value = self._split(heads, [num_heads + num_groups, num_groups])
        if attributes.get("do_rotary"):
            turned = self._rotate(turned, inputs, num_heads + num_groups, head_dim, attributes)
        query, key = self._split(turned, [num_heads, num_groups])
        output, *presents = node.output
        for new, past, present in zip((key, value), ("past_key", "past_value"), presents, strict=True):
            self._op("TensorScatter", [inputs[past], new, first], output=present, axis=2)
        # Rows of a product: all tokens of one head, then those of the next.
        grouped = self._op("Reshape", [query, self._integers(0, num_groups, -1, head_dim)])
        scale = attributes.get("scale") or 1 / math.sqrt(head_dim)
        scores = self._op("FusedMatMul", [grouped, presents[0]], domain=_ORT, transB=1, alpha=scale)
        if softcap := attributes.get("softcap"):
            capped = self._op("Tanh", [self._op("Div", [scores, self._number(softcap)])])
            scores = self._op("Mul", [capped, self._number(softcap)])
        unseen = self._unseen(inputs, attributes.get("local_window_size", -1), num_heads // num_groups)
        shares = self._op("Softmax", [self._op("Add", [scores, unseen])], axis=-1)
        mixed = self._reshape(self._op("MatMul", [shares, presents[1]]), 0, num_heads, -1, head_dim)
        tokens = self._op("Transpose", [mixed], perm=[0, 2, 1, 3])
        self._op("Reshape", [tokens, self._integers(0, 0, -1)], output=output)

    def _rotate(
        self, heads: str, inputs: dict[str, str], num_heads: int, head_dim: int, attributes: dict[str, Any]
    ) -> str:
        """Heads [B, heads, T, H], turned to their positions."""
        width = 2 * self._widths[inputs["cosines"]]  # of a head, what is turned
        return self._op(
            "RotaryEmbedding",
            [heads, self._positions(inputs), inputs["cosines"], inputs["sines"]],
            domain=_ORT,
            rotary_embedding_dim=width if width != head_dim else 0,
            num_heads=num_heads,
            interleaved=attributes.get("rotary_interleaved", 0),
        )

    # ---- what all layers share

    def _num_tokens(self) -> str:
        """[1]"""
        return self._once("Shape", ["input_ids"], start=1, end=2)

    def _first(self, inputs: dict[str, str]) -> str:
        """Of the new tokens of each row, the position of the first: [B]."""
        last = self._once("Cast", [inputs["last_position"]], to=_INT64)
        return self._once("Sub", [self._once("Add", [last, self._integers(1)]), self._num_tokens()])

    def _positions(self, inputs: dict[str, str]) -> str:
        """[B, T]"""
        offsets = self._range(self._num_tokens())
        return self._once("Add", [self._once("Unsqueeze", [self._first(inputs), self._integers(1)]), offsets])

    def _range(self, size: str) -> str:
        """0, 1, ... up to a size [1]."""
        return self._once("Range", [self._integer(0), self._once("Squeeze", [size]), self._integer(1)])

    def _unseen(self, inputs: dict[str, str], window: int, num_shared: int) -> str:
        """[B, 1, G * T, M]: minus infinity at positions that a token does not see. `window` -1: it sees all before it."""
        position = self._once("Unsqueeze", [self._positions(inputs), self._integers(2)])
        places = self._range(self._once("Shape", [self._any_buffer], start=2, end=3))
        unseen = self._once("Greater", [places, position])
        if window > 0:
            oldest = self._once("Sub", [position, self._integer(window - 1)])
            unseen = self._once("Or", [unseen, self._once("Less", [places, oldest])])
        bias = self._once("Where", [unseen, self._number(-math.inf), self._number(0.0)])
        return self._once(
            "Tile", [self._once("Unsqueeze", [bias, self._integers(1)]), self._integers(1, 1, num_shared, 1)]
        )

    # ---- nodes and constants

    def _op(self, op_type: str, inputs: Sequence[str], *, output: str = "", domain: str = "", **attributes: Any) -> str:
        import onnx

        output = output or self._name()
        node = onnx.helper.make_node(op_type, inputs, [output], name=self._name(), domain=domain, **attributes)
        self._graph.node.append(node)
        return output

    def _once(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        key = (op_type, *inputs, *sorted(attributes.items()))
        if key not in self._made:
            self._made[key] = self._op(op_type, inputs, **attributes)
        return self._made[key]

    def _split(self, heads: str, counts: Sequence[int]) -> list[str]:
        """Of heads [B, heads, T, H], some and some."""
        import onnx

        names = [self._name() for _ in counts]
        inputs = [heads, self._integers(*counts)]
        self._graph.node.append(onnx.helper.make_node("Split", inputs, names, name=self._name(), axis=1))
        return names

    def _reshape(self, value: str, *shape: int) -> str:
        return self._op("Reshape", [value, self._integers(*shape)])

    def _integers(self, *numbers: int) -> str:
        return self._constant(np.array(numbers, np.int64))

    def _integer(self, number: int) -> str:
        return self._constant(np.array(number, np.int64))

    def _number(self, number: float) -> str:
        return self._constant(np.array(number, np.float32))

    def _constant(self, array: np.ndarray[Any, Any]) -> str:
        import onnx

        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self._name()
            self._graph.initializer.append(onnx.numpy_helper.from_array(array, self._made[key]))
        return self._made[key]

    def _name(self) -> str:
        self._count += 1
        return f"attention.{self._count}"


_INPUTS = ("query", "key", "value", "past_key", "past_value", "last_position", "total", "cosines", "sines")
"""Of GroupQueryAttention, as the graphs use it (onnxruntime, docs/ContribOperators.md). Without a key, `query` is all three."""


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
