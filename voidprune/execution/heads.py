"""From what the graphs of a bundle give to logits, and to the likeliest token, which needs less.

A float32 head is often the largest matrix that a step reads. Greedy decoding asks only where its product is largest. That is
found from a copy of the head in 8 bits, with a bound on how far each logit can be from the true one: only the rows whose upper
bound reaches the greatest lower bound are multiplied in float32. So the token is that of the float32 head, up to the rounding of
float32 sums, for little more than a quarter of the bytes.

For a row w and its copy w', a hidden state x and what the operator (`MatMulNBits`, accuracy_level 4) rounds it to, x',

    |w.x - w'.x'| = |(w - w').x + w'.(x - x')| <= |w - w'| |x| + |w'| |x - x'|

by Cauchy and Schwarz. The first factors are known of each row; |x - x'| is at most half a step in each number of a block, and a
step is 1/127 of the largest of its block. Whether the operator keeps to that is looked at: the error of every row that is
multiplied must be within its bound, or the whole head is read from then on.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N = B * T, C rows of the head that are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from voidprune.execution.detached_head import BLOCK_SIZE, HIDDEN, LOGITS, MOST_ROWS, DetachedHead
from voidprune.execution.node_writer import ORT, NodeWriter, small_model
from voidprune.execution.providers import open_session

Array = np.ndarray[Any, Any]
Outputs = Any
"""What a session gives, [B, T, X]: an array on the host, a tensor of torch on a device."""

MOST_CANDIDATES = 4096
"""Rows of a head that are multiplied by themselves; where more are in question the whole head is read."""
_SLACK = 1.02
"""By which bounds are wider than exact arithmetic would need."""
_ROWS_AT_A_TIME = 256
_MOST_THREADS = 8


class Head(Protocol):
    """What a session gives is called `output`, and has `width` numbers a token. `is_screened`: greedy decoding reads less."""

    is_screened: bool
    output: str
    width: int
    vocab_size: int

    def logits(self, outputs_BTX: Outputs) -> Array:
        """[B, T, V]."""

    def likeliest(self, outputs_BTX: Outputs) -> Array:
        """The token with the greatest logit, the first of equals: [B, T]."""

    def join(self, parts: Sequence[Outputs], axis: int) -> Outputs:
        """What a session gave in several runs as if it were one."""


class _HostHead:
    def join(self, parts: Sequence[Array], axis: int) -> Array:
        return np.concatenate(parts, axis)


class WholeHead(_HostHead):
    """Of graphs that give logits themselves."""

    is_screened = False
    output = LOGITS

    def __init__(self, vocab_size: int) -> None:
        self.width = self.vocab_size = vocab_size

    def logits(self, outputs_BTX: Array) -> Array:
        return outputs_BTX

    def likeliest(self, outputs_BTX: Array) -> Array:
        return np.asarray(outputs_BTX.argmax(-1))


class ScreenedHead(_HostHead):
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
        found = self._screening.run(None, {HIDDEN: hidden_ND})
        (num_found,), candidates_C, logits_NC, products_NC, estimates_NC, bounds_NC = found
        if not (0 < num_found <= MOST_CANDIDATES and np.isfinite(bounds_NC).all()):  # hidden states may be no numbers
            return None
        if (np.abs(products_NC - estimates_NC) > bounds_NC).any():
            self.keeps_bounds = False
            return None
        return np.asarray(candidates_C[logits_NC.argmax(-1)])

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
        return open_session(_screening_graph(self.head, _round_rows(table_VD)), self.folder)


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
        rounded = np.rint(blocks / np.where(scale > 0, scale, 1)[..., np.newaxis]).clip(-127, 127)
        numbers[rows], scales[rows] = rounded + 128, scale
        rounded *= scale[..., np.newaxis]
        lengths[rows] = _SLACK * _row_lengths(rounded)
        rounded -= blocks
        errors[rows] = _SLACK * _row_lengths(rounded)

    with ThreadPoolExecutor(_MOST_THREADS) as pool:
        list(pool.map(fill, range(0, num_rows, _ROWS_AT_A_TIME)))
    return {"numbers": numbers, "scales": scales, "errors": errors, "lengths": lengths}


def _row_lengths(blocks: Array) -> Array:
    """Their squares are summed in float64, in which those of the smallest float32 numbers are not 0."""
    rows = blocks.reshape(len(blocks), -1)
    return np.asarray(np.sqrt(np.einsum("vd,vd->v", rows, rows, dtype=np.float64)))


# ---- graphs


def _whole_graph(head: DetachedHead) -> bytes:
    """Hidden states [B, T, D] to logits [B, T, V]."""
    writer = _start_graph(head)
    logits = _follow(writer, writer.op("FusedMatMul", [HIDDEN, "head"], domain=ORT, transB=1), head.tail)
    return _finish_graph(writer, ["batch", "tokens", head.hidden_size], [logits])


def _follow(writer: NodeWriter, products: str, tail: Sequence[float | None]) -> str:
    """From products to logits."""
    for factor in tail:
        products = (
            writer.op("Tanh", [products]) if factor is None else writer.op("Mul", [products, writer.number(factor)])
        )
    return products


def _screening_graph(head: DetachedHead, rows: Mapping[str, Array]) -> bytes:
    """Hidden states [N, D] to how many rows are in question, which [C], and their logits, products, estimates and bounds [N, C]."""
    import onnx

    writer = _start_graph(head)
    last, first = writer.integers(-1), writer.integers(0)
    # Within the model, so that nothing has to outlive the session: onnxruntime drops what it has laid out anew.
    writer.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in rows.items())
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
    by_any = writer.op("ReduceMax", [writer.op("Cast", [reaches], to=onnx.TensorProto.UINT8), first], keepdims=0)
    found = writer.op("Squeeze", [writer.op("NonZero", [by_any]), first])
    candidates = writer.op("Slice", [found, first, writer.integers(MOST_CANDIDATES)])
    products = writer.op("FusedMatMul", [HIDDEN, writer.op("Gather", ["head", candidates])], domain=ORT, transB=1)
    chosen = [writer.op("Gather", [value, candidates], axis=1) for value in (estimates, bounds)]
    logits = _follow(writer, writer.op("Identity", [products]), head.tail)  # no value is a result twice
    results = [writer.op("Shape", [found]), candidates, logits, products, *chosen]
    return _finish_graph(writer, ["rows", head.hidden_size], results)


def _start_graph(head: DetachedHead) -> NodeWriter:
    import onnx

    shape = [head.vocab_size, head.hidden_size]
    weight = onnx.TensorProto(name="head", data_type=onnx.TensorProto.FLOAT, dims=shape)
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", head.location), ("offset", str(head.offset))):
        weight.external_data.add(key=key, value=value)
    return NodeWriter(onnx.GraphProto(name="head", initializer=[weight]), "of head")


def _finish_graph(writer: NodeWriter, hidden_shape: Sequence[str | int], results: Sequence[str]) -> bytes:
    import onnx

    graph = writer.graph
    graph.input.append(onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, hidden_shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    return small_model(graph)
