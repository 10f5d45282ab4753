"""The head of a bundle apart from its graphs, so that the runner may choose how much of it to compute (`heads.py`).

Prefill and decode end alike: the last hidden states times the head and, in some families, a factor and a cap behind it. Where
they do, both graphs can be left without it, and give hidden states.

Shapes: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from voidprune.execution.node_writer import rename_value

if TYPE_CHECKING:
    import onnx

LEAST_BYTES = 2**25
"""Of a head that is worth it. The likeliest token took 0.6 of the time of all logits with 32 MiB, 0.7 to 1 with 16, 1 to 1.6 with 8
(docs/results.md, "The head")."""
MOST_SCREENED_BYTES = 2**31 - 2**20
"""Of its copy in 8 bits, which is part of a model: no protobuf is larger than 2 GiB."""
MOST_ROWS = 8
"""Tokens whose likeliest successors `heads.py` looks for at a time; more of them read the whole head."""
BLOCK_SIZE = 32
"""Numbers of a row that share a scale in the copy that `heads.py` makes of a head."""
LOGITS = "logits"
HIDDEN = "hidden"
"""What graphs without their head give in place of LOGITS: [B, T, D]."""


@dataclass(frozen=True)
class DetachedHead:
    """A float32 matrix [V, D] at `offset` of the file `location`, beside the graphs.

    `tail`: what happens to its product, number by number: a positive factor, or None for a hyperbolic tangent. The order of
    logits is that of the products.
    """

    location: str
    offset: int
    vocab_size: int
    hidden_size: int
    tail: tuple[float | None, ...]

    @property
    def num_bytes(self) -> int:
        return 4 * self.vocab_size * self.hidden_size

    @property
    def screened_bytes(self) -> int:
        """Of its copy in 8 bits: numbers, scales of blocks, and two float32 numbers a row (`heads.py`)."""
        return self.vocab_size * (self.hidden_size + 4 * self.hidden_size // BLOCK_SIZE + 8)


def find_common_head(graphs: Iterable[onnx.GraphProto]) -> DetachedHead | None:
    """How all graphs come from hidden states to their logits; None where it is not worth it."""
    found = {trace and trace[0] for trace in map(_trace_head, graphs)}
    head = found.pop()
    if head is None or found or head.hidden_size % BLOCK_SIZE:
        return None
    return head if head.num_bytes >= LEAST_BYTES and head.screened_bytes <= MOST_SCREENED_BYTES else None


def detach_head(graph: onnx.GraphProto) -> None:
    """Let a graph that has such a head give HIDDEN in place of LOGITS, and refer to nothing but what it needs for that."""
    import onnx

    found = _trace_head(graph)
    assert found is not None
    head, nodes = found
    hidden, matrix = nodes[-1].input
    dropped = {node.output[0] for node in nodes}
    kept = [node for node in graph.node if node.output[0] not in dropped]
    del graph.node[:]
    graph.node.extend(kept)
    rename_value(graph.node, hidden, HIDDEN)
    if not any(matrix in node.input for node in graph.node):
        weights = [initializer for initializer in graph.initializer if initializer.name != matrix]
        del graph.initializer[:]
        graph.initializer.extend(weights)
    batch, tokens, _ = graph.output[0].type.tensor_type.shape.dim
    shape = [size.dim_param or size.dim_value for size in (batch, tokens)]
    graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, [*shape, head.hidden_size])
    )


def _trace_head(graph: onnx.GraphProto) -> tuple[DetachedHead, list[onnx.NodeProto]] | None:
    """The head and its nodes, from that which gives LOGITS back to the product."""
    import onnx

    makers = {output: node for node in graph.node for output in node.output}
    weights = {initializer.name: initializer for initializer in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    tail: list[float | None] = []
    name = LOGITS
    while True:
        node = makers[name]
        nodes.append(node)
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "FusedMatMul" and attributes == {"transB": 1} and node.input[1] in weights:
            weight = weights[node.input[1]]
            place = {entry.key: entry.value for entry in weight.external_data}
            if weight.data_type != onnx.TensorProto.FLOAT or not place:
                return None
            vocab_size, hidden_size = weight.dims
            return DetachedHead(
                place["location"], int(place["offset"]), vocab_size, hidden_size, tuple(reversed(tail))
            ), nodes
        if node.op_type == "Tanh":
            tail.append(None)
        elif node.op_type == "Mul" and node.input[1] in weights:
            factor = onnx.numpy_helper.to_array(weights[node.input[1]])
            if factor.size != 1 or not factor > 0:
                return None
            tail.append(float(factor))
        else:
            return None
        name = node.input[0]
