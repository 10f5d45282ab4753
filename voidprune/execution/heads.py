"""From what the graphs of a bundle give to logits, and to the likeliest token, which needs less.

A float32 head is often the largest matrix that a step reads. Greedy decoding asks only where its product is largest. That is
found from a copy of the head in 8 bits, with a bound on how far each logit can be from the true one: only the rows whose upper
bound reaches the greatest lower bound are multiplied in float32. So the token is that of the float32 head, up to the rounding of
float32 sums, and a quarter of the head is read.

For a row w and its copy w', a hidden state x and what the operator (`MatMulNBits`, accuracy_level 4) rounds it to, x',

    |w.x - w'.x'| = |(w - w').x + w'.(x - x')| <= |w - w'| |x| + |w'| |x - x'|

by Cauchy and Schwarz. The first factors are known of each row; |x - x'| is at most half a step in each number of a block, and a
step is 1/127 of the largest of its block. Whether the operator keeps to that is looked at: the error of every row that is
multiplied must be within its bound, or the whole head is read from then on.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N = B * T, C rows of the head that are multiplied.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime as ort

from voidprune.execution.detached_head import BLOCK_SIZE, HIDDEN, LOGITS, DetachedHead
from voidprune.execution.node_writer import ORT, NodeWriter
from voidprune.execution.providers import open_session

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

MOST_ROWS = 8
"""Tokens whose likeliest successor is looked for at a time; more of them read the whole head."""
MOST_CANDIDATES = 4096
"""Rows of a head that are multiplied by themselves; where more are in question the whole head is read."""
_SLACK = 1.02
"""By which bounds are wider than exact arithmetic would need."""
_ROWS_AT_A_TIME = 1024
_IR_VERSION = 10


class Head(Protocol):
    """What a session gives is called `output`, and has `width` numbers a token. `is_screened`: greedy decoding reads less."""

    is_screened: bool
    output: str
    width: int
    vocab_size: int

    def logits(self, outputs_BTX: Array) -> Array:
        """[B, T, V]."""

    def likeliest(self, outputs_BTX: Array) -> Array:
        """The token with the greatest logit, the first of equals: [B, T]."""


class WholeHead:
    """Of graphs that give logits themselves."""

    is_screened = False
    output = LOGITS

    def __init__(self, vocab_size: int) -> None:
        self.width = self.vocab_size = vocab_size

    def logits(self, outputs_BTX: Array) -> Array:
        return outputs_BTX

    def likeliest(self, outputs_BTX: Array) -> Array:
        return np.asarray(outputs_BTX.argmax(-1))


class ScreenedHead:
    """A float32 head that is opened when it is asked for the first time: whole for logits, in 8 bits for the likeliest token."""

    is_screened = True
    output = HIDDEN

    def __init__(self, folder: Path, head: DetachedHead) -> None:
        self.folder, self.head = folder, head
        self.width, self.vocab_size = head.hidden_size, head.vocab_size
        self.keeps_bounds = True

    def logits(self, outputs_BTX: Array) -> Array:
        (logits_BTV,) = self._whole.run(None, {HIDDEN: outputs_BTX})
        return np.asarray(logits_BTV)

    def likeliest(self, outputs_BTX: Array) -> Array:
        num_rows, num_tokens, _ = outputs_BTX.shape
        tokens_N = self._screen(outputs_BTX.reshape(-1, self.width)) if num_rows * num_tokens <= MOST_ROWS else None
        if tokens_N is None:
            return np.asarray(self.logits(outputs_BTX).argmax(-1))
        return tokens_N.reshape(num_rows, num_tokens)

    def _screen(self, hidden_ND: Array) -> Array | None:
        """The likeliest tokens; None where bounds do not tell, or do not hold."""
        if not self.keeps_bounds:
            return None
        (num_found,), candidates_C, products_NC, estimates_NC, bounds_NC = self._screening.run(
            None, {HIDDEN: hidden_ND}
        )
        if not 0 < num_found <= MOST_CANDIDATES:  # none where hidden states are not finite
            return None
        self.keeps_bounds = bool((np.abs(products_NC - estimates_NC) <= bounds_NC).all())
        return np.asarray(candidates_C[products_NC.argmax(-1)]) if self.keeps_bounds else None

    @cached_property
    def _whole(self) -> ort.InferenceSession:
        return open_session(_whole_graph(self.head), self.folder)

    @cached_property
    def _screening(self) -> ort.InferenceSession:
        table_VD = np.memmap(
            self.folder / self.head.location,
            np.float32,
            mode="r",
            offset=self.head.offset,
            shape=(self.vocab_size, self.width),
        )
        return open_session(_screening_graph(self.head), self.folder, arrays=_round_rows(table_VD))


def _round_rows(table_VD: Array) -> dict[str, Array]:
    """A copy in blocks of 8 bits around 128, as `MatMulNBits` reads it, and of each row the lengths of its error and of itself."""
    num_rows, width = table_VD.shape
    num_blocks = width // BLOCK_SIZE
    numbers = np.empty((num_rows, num_blocks, BLOCK_SIZE), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    errors, lengths = np.empty((2, num_rows), np.float32)

    def fill(start: int) -> None:
        rows = slice(start, start + _ROWS_AT_A_TIME)
        blocks = table_VD[rows].reshape(-1, num_blocks, BLOCK_SIZE)
        scale = np.abs(blocks).max(-1) / np.float32(127)
        rounded = np.rint(blocks / np.where(scale > 0, scale, 1)[..., np.newaxis])
        numbers[rows], scales[rows] = rounded + 128, scale
        rounded *= scale[..., np.newaxis]
        lengths[rows] = np.linalg.norm(rounded.reshape(-1, width), axis=-1)
        rounded -= blocks
        errors[rows] = np.linalg.norm(rounded.reshape(-1, width), axis=-1)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        list(pool.map(fill, range(0, num_rows, _ROWS_AT_A_TIME)))
    return {"numbers": numbers, "scales": scales, "errors": errors * _SLACK, "lengths": lengths * _SLACK}


# ---- graphs


def _whole_graph(head: DetachedHead) -> bytes:
    """Hidden states [B, T, D] to logits [B, T, V]."""
    writer = _start_graph(head)
    logits = writer.op("FusedMatMul", [HIDDEN, "head"], domain=ORT, transB=1)
    for factor in head.tail:
        logits = writer.op("Tanh", [logits]) if factor is None else writer.op("Mul", [logits, writer.number(factor)])
    return _finish_graph(writer, ["batch", "tokens", head.hidden_size], [logits])


def _screening_graph(head: DetachedHead) -> bytes:
    """Hidden states [N, D] to how many rows are in question, which [C], and their products, estimates and bounds [N, C]."""
    writer = _start_graph(head)
    last, first = writer.integers(-1), writer.integers(0)
    blocks = head.hidden_size // BLOCK_SIZE
    lent = {"numbers": (2, [blocks, BLOCK_SIZE]), "scales": (1, [blocks]), "errors": (1, []), "lengths": (1, [])}
    for name, (kind, shape) in lent.items():
        writer.graph.initializer.append(_external(name, kind, [head.vocab_size, *shape], "lent"))
    estimates = writer.op(
        "MatMulNBits",
        [HIDDEN, "numbers", "scales"],
        domain=ORT,
        K=head.hidden_size,
        N=head.vocab_size,
        bits=8,
        block_size=BLOCK_SIZE,
        accuracy_level=4,
    )
    largest = writer.op("ReduceMax", [writer.op("Abs", [writer.reshape(HIDDEN, 0, -1, BLOCK_SIZE)]), last], keepdims=0)
    half_step = writer.number(_SLACK * math.sqrt(BLOCK_SIZE) / 127 / 2)
    rounding = writer.op("Mul", [writer.op("ReduceL2", [largest, last]), half_step])
    of_rows = writer.op("Mul", ["errors", writer.op("ReduceL2", [HIDDEN, last])])
    bounds = writer.op("Add", [of_rows, writer.op("Mul", ["lengths", rounding])])
    least = writer.op("ReduceMax", [writer.op("Sub", [estimates, bounds]), last])
    reaches = writer.op("GreaterOrEqual", [writer.op("Add", [estimates, bounds]), least])
    by_any = writer.op("ReduceMax", [writer.op("Cast", [reaches], to=2), first], keepdims=0)  # UINT8
    found = writer.op("Squeeze", [writer.op("NonZero", [by_any]), first])
    candidates = writer.op("Slice", [found, first, writer.integers(MOST_CANDIDATES)])
    products = writer.op("FusedMatMul", [HIDDEN, writer.op("Gather", ["head", candidates])], domain=ORT, transB=1)
    chosen = [writer.op("Gather", [value, candidates], axis=1) for value in (estimates, bounds)]
    results = [writer.op("Shape", [found]), candidates, products, *chosen]
    return _finish_graph(writer, ["rows", head.hidden_size], results)


def _start_graph(head: DetachedHead) -> NodeWriter:
    import onnx

    graph = onnx.GraphProto(name="head")
    graph.initializer.append(
        _external(
            "head", onnx.TensorProto.FLOAT, [head.vocab_size, head.hidden_size], head.location, offset=head.offset
        )
    )
    return NodeWriter(graph, "of head")


def _external(name: str, kind: int, shape: Sequence[int], location: str, **place: int) -> onnx.TensorProto:
    """An initializer that lies in a file, or is lent when the session is opened."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _finish_graph(writer: NodeWriter, hidden_shape: Sequence[str | int], results: Sequence[str]) -> bytes:
    import onnx

    graph = writer.graph
    graph.input.append(onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, hidden_shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(ORT, 1)]
    model: bytes = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()
    return model
