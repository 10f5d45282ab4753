"""What rewrites graphs: appends nodes and small constants under names of its own, and renames values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

ORT = "com.microsoft"
FLOAT, INT8, INT64 = 1, 3, 7  # of onnx.TensorProto


class NodeWriter:
    """`prefix`: how the names begin that only this writer gives."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self._made: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def op(self, op_type: str, inputs: Sequence[str], *, output: str = "", domain: str = "", **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        import onnx

        output = output or self._name()
        node = onnx.helper.make_node(op_type, inputs, [output], name=self._name(), domain=domain, **attributes)
        self.graph.node.append(node)
        return output

    def once(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The same, one node for all that ask for it."""
        key = (op_type, *inputs, *sorted(attributes.items()))
        if key not in self._made:
            self._made[key] = self.op(op_type, inputs, **attributes)
        return self._made[key]

    def split(self, value: str, sizes: Sequence[int], *, axis: int) -> list[str]:
        import onnx

        names = [self._name() for _ in sizes]
        inputs = [value, self.integers(*sizes)]
        self.graph.node.append(onnx.helper.make_node("Split", inputs, names, name=self._name(), axis=axis))
        return names

    def reshape(self, value: str, *shape: int, output: str = "") -> str:
        """0 keeps a dimension."""
        return self.op("Reshape", [value, self.integers(*shape)], output=output)

    def range(self, size: str) -> str:
        """0, 1, ... up to a size [1]."""
        return self.once("Range", [self.integer(0), self.once("Squeeze", [size]), self.integer(1)])

    def integers(self, *numbers: int) -> str:
        """A constant int64 vector."""
        return self._constant(np.array(numbers, np.int64))

    def integer(self, number: int) -> str:
        """A constant int64 scalar."""
        return self._constant(np.array(number, np.int64))

    def number(self, number: float) -> str:
        """A constant float32 scalar."""
        return self._constant(np.array(number, np.float32))

    def _constant(self, array: np.ndarray[Any, Any]) -> str:
        import onnx

        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self._name()
            self.graph.initializer.append(onnx.numpy_helper.from_array(array, self._made[key]))
        return self._made[key]

    def _name(self) -> str:
        self._count += 1
        return f"{self.prefix}.{self._count}"


def small_model(graph: onnx.GraphProto) -> bytes:
    """A model of standard operators and onnxruntime's own, made for one session."""
    import onnx

    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(ORT, 1)]
    model: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def rename_value(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Where it is made and wherever it is used, in branches and loops, too."""
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            rename_value(body.node, old, new)
