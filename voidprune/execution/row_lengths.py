"""Graphs that are told how many tokens each row has, in place of a mask of them.

A mask [B, S] gets longer with every step, so it is made and bound anew for each; lengths [B] are written in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from voidprune.execution.node_writer import rename_value

if TYPE_CHECKING:
    import onnx

MASK = "attention_mask"
LENGTHS = "lengths"
"""The input that takes its place: int64 [B], tokens of each row, new ones included."""


def take_lengths(graphs: Iterable[onnx.GraphProto]) -> None:
    """Replace MASK by LENGTHS in all graphs, if all do nothing with it but count its ones and its columns."""
    import onnx

    graphs = list(graphs)
    if not all(_is_counted(node) for graph in graphs for node in graph.node if MASK in node.input):
        return
    for graph in graphs:
        nodes = list(graph.node)
        del graph.node[:]
        counted = [node.output[0] for node in nodes if node.op_type == "ReduceSum" and MASK in node.input]
        for node in nodes:
            if MASK not in node.input:
                graph.node.append(node)
            elif node.op_type == "Shape":
                longest = onnx.helper.make_node("ReduceMax", [LENGTHS], node.output, name=node.name, keepdims=1)
                graph.node.append(longest)
        for name in counted:
            rename_value(graph.node, name, LENGTHS)
        (mask,) = (value for value in graph.input if value.name == MASK)
        mask.CopyFrom(onnx.helper.make_tensor_value_info(LENGTHS, onnx.TensorProto.INT64, ["batch"]))


def _is_counted(node: onnx.NodeProto) -> bool:
    """Whether a node gives the ones of each row, [B], or the number of columns, [1]."""
    import onnx

    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    return (node.op_type, attributes) in (("ReduceSum", {"keepdims": 0}), ("Shape", {"start": 1, "end": 2}))
