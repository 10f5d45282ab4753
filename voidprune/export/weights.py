"""The weights of a graph: external data into the checkpoint's own file. Names, shapes and byte ranges; no bytes are read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from voidprune.errors import CheckpointError, ModelError
from voidprune.models.checkpoint import Checkpoint, TensorRecord

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor, `start` to `stop`; all where `stop` is None."""

    tensor: str
    start: int = 0
    stop: int | None = None


class GraphWeights:
    """Initializers of one graph, each made once. Raises ModelError for dtypes that have no graph."""

    def __init__(self, checkpoint: Checkpoint, tape: ir.tape.Tape) -> None:
        if checkpoint.dtype not in _DTYPES:
            raise ModelError(f"weights of dtype {checkpoint.dtype} have no ONNX graph", hint="export with --format hf")
        self.dtype = _DTYPES[checkpoint.dtype]
        self._checkpoint = checkpoint
        self._tape = tape
        self._made: dict[str, ir.Value] = {}

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small tensor inside the graph itself; the same name means the same values."""
        if name not in self._made:
            self._made[name] = self._tape.initializer(ir.tensor(array, name=name), name)
        return self._made[name]

    def stored(self, *names: str) -> ir.Value:
        """The whole tensors `names`, stacked along their first axis."""
        return self.rows([Rows(name) for name in names])

    def rows(self, parts: Sequence[Rows]) -> ir.Value:
        """The rows `parts`, stacked: one range of bytes in the checkpoint's file. Raises CheckpointError, ModelError."""
        label = "+".join(
            part.tensor if part.stop is None else f"{part.tensor}[{part.start}:{part.stop}]" for part in parts
        )
        if label not in self._made:
            self._made[label] = self._tape.initializer(self._external(label, parts), label)
        return self._made[label]

    def _external(self, label: str, parts: Sequence[Rows]) -> ir.ExternalTensor:
        ranges = []  # (begin, end) in the file, in bytes
        num_rows = 0
        for part in parts:
            record = self._record(part.tensor)
            stop = record.shape[0] if part.stop is None else part.stop
            row_bytes = record.num_bytes // record.shape[0]
            ranges.append((record.offset + part.start * row_bytes, record.offset + stop * row_bytes))
            num_rows += stop - part.start
        for (_, end), (begin, _), part in zip(ranges, ranges[1:], parts[1:], strict=False):
            assert end == begin, f"{part.tensor} does not follow what it is stacked with"
        first = self._record(parts[0].tensor)
        return ir.ExternalTensor(
            first.file.name,
            ranges[0][0],
            ranges[-1][1] - ranges[0][0],
            self.dtype,
            shape=ir.Shape([num_rows, *first.shape[1:]]),
            name=label,
            base_dir=first.file.parent,
        )

    def adjoin(self, names: Sequence[str]) -> bool:
        """Whether the tensors lie side by side in this order."""
        records = [self._record(name) for name in names]
        return all(before.offset + before.num_bytes == after.offset for before, after in itertools.pairwise(records))

    def _record(self, name: str) -> TensorRecord:
        record = self._checkpoint.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self._checkpoint.folder} lacks {name}, which its config asks for")
        if _DTYPES.get(record.dtype) is not self.dtype:
            raise ModelError(
                f"{name} is {record.dtype}; the matrices are {self._checkpoint.dtype}",
                hint="export with --precision, which makes them one",
            )
        return record
