"""The weights of a graph: external data into the checkpoint's own file. Names, shapes and byte ranges; no bytes are read.

A matrix is dense, in the dtype of the graph, or packed (`models/packed.py`); which, is up to the checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from voidprune.errors import CheckpointError, ModelError
from voidprune.models.checkpoint import Checkpoint, TensorRecord
from voidprune.models.packed import BlockFormat, PackedRecord

_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor, `start` to `stop`; all where `stop` is None."""

    tensor: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [out, in] of rows of packed tensors, all in one format. Its parts become initializers as operators ask for them."""

    rows: tuple[Rows, ...]
    blocks: BlockFormat
    shape: tuple[int, int]

    @property
    def num_blocks(self) -> int:
        """Of one row."""
        return self.blocks.num_blocks(self.shape[1])

    @property
    def block_length(self) -> int:
        """Numbers of one block."""
        return self.blocks.numbers_in_block(self.shape[1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's packed numbers."""
        return self.num_blocks * self.block_length * self.blocks.bits // 8

    @property
    def is_padded(self) -> bool:
        """Whether the last block of a row has more numbers than the matrix."""
        return self.shape[1] % self.block_length != 0


Matrix = ir.Value | PackedMatrix
"""[out, in]: dense, or packed."""


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
        records = [self._float_record(part.tensor) for part in parts]
        return self._initializer(_label(parts), parts, records, self.dtype, records[0].shape[1:])

    def matrix(self, parts: Sequence[Rows]) -> Matrix:
        """The same of matrices, which may be packed. Raises CheckpointError, ModelError."""
        records = [self._record(part.tensor) for part in parts]
        packed = [record for record in records if isinstance(record, PackedRecord)]
        if not packed:
            return self.rows(parts)
        blocks, columns = packed[0].blocks, packed[0].shape[1]
        assert [(record.blocks, record.shape[1]) for record in packed] == [(blocks, columns)] * len(parts)
        num_rows = sum(_stop(part, record) - part.start for part, record in zip(parts, packed, strict=True))
        return PackedMatrix(tuple(parts), blocks, (num_rows, columns))

    def is_packed_in_blocks(self, tensor: str) -> bool:
        """Whether `matrix` gives a packed one of its rows, each of them several blocks."""
        record = self._record(tensor)
        return isinstance(record, PackedRecord) and not record.blocks.whole_rows

    def packed_numbers(self, matrix: PackedMatrix, dtype: ir.DataType, row_shape: Sequence[int]) -> ir.Value:
        """The packed numbers as a tensor [out, *row_shape] of `dtype`: the same bytes have more than one name in ONNX."""
        records = self._packed_records(matrix)
        label = f"{_label(matrix.rows)}.{dtype.name}.{'x'.join(map(str, row_shape))}"
        return self._initializer(label, matrix.rows, records, dtype, row_shape)

    def scales(self, matrix: PackedMatrix) -> ir.Value:
        """[out, blocks]; [out] where every row is one block."""
        records = [record.scales for record in self._packed_records(matrix)]
        label = f"{_label(matrix.rows)}.scales"
        row_shape = matrix.blocks.scales_shape(*matrix.shape)[1:]
        return self._initializer(label, matrix.rows, records, self.dtype, row_shape)

    def zero_points(self, matrix: PackedMatrix, dtype: ir.DataType, row_shape: Sequence[int]) -> ir.Value | None:
        """Zero points as a tensor [out, *row_shape] of `dtype`; None where the blocks have none of their own."""
        records = [record.zero_points for record in self._packed_records(matrix) if record.zero_points is not None]
        if not records:
            return None
        label = f"{_label(matrix.rows)}.zero_points.{dtype.name}"
        return self._initializer(label, matrix.rows, records, dtype, row_shape)

    def _packed_records(self, matrix: PackedMatrix) -> list[PackedRecord]:
        records = [self._record(part.tensor) for part in matrix.rows]
        return [record for record in records if isinstance(record, PackedRecord)]

    def _initializer(
        self,
        label: str,
        parts: Sequence[Rows],
        records: Sequence[TensorRecord],
        dtype: ir.DataType,
        row_shape: Sequence[int],
    ) -> ir.Value:
        if label not in self._made:
            self._made[label] = self._tape.initializer(_external(label, parts, records, dtype, row_shape), label)
        return self._made[label]

    def adjoin(self, names: Sequence[str]) -> bool:
        """Whether the tensors lie side by side in this order."""
        records = [self._record(name) for name in names]
        return all(before.offset + before.num_bytes == after.offset for before, after in itertools.pairwise(records))

    def _record(self, name: str) -> TensorRecord:
        record = self._checkpoint.tensors.get(name)
        if record is None:
            raise CheckpointError(f"{self._checkpoint.folder} lacks {name}, which its config asks for")
        return record

    def _float_record(self, name: str) -> TensorRecord:
        record = self._record(name)
        if _DTYPES.get(record.dtype) is not self.dtype:
            raise ModelError(
                f"{name} is {record.dtype}; the matrices are {self._checkpoint.dtype}",
                hint="export with --precision, which makes them one",
            )
        return record


def _label(parts: Sequence[Rows]) -> str:
    return "+".join(part.tensor if part.stop is None else f"{part.tensor}[{part.start}:{part.stop}]" for part in parts)


def _stop(part: Rows, record: TensorRecord) -> int:
    return record.shape[0] if part.stop is None else part.stop


def _external(
    label: str, parts: Sequence[Rows], records: Sequence[TensorRecord], dtype: ir.DataType, row_shape: Sequence[int]
) -> ir.ExternalTensor:
    ranges = []  # (begin, end) in the file, in bytes
    num_rows = 0
    for part, record in zip(parts, records, strict=True):
        stop = _stop(part, record)
        row_bytes = record.num_bytes // record.shape[0]
        ranges.append((record.offset + part.start * row_bytes, record.offset + stop * row_bytes))
        num_rows += stop - part.start
    for (_, end), (begin, _), part in zip(ranges, ranges[1:], parts[1:], strict=False):
        assert end == begin, f"{part.tensor} does not follow what it is stacked with"
    file = records[0].file
    return ir.ExternalTensor(
        file.name,
        ranges[0][0],
        ranges[-1][1] - ranges[0][0],
        dtype,
        shape=ir.Shape([num_rows, *row_shape]),
        name=label,
        base_dir=file.parent,
    )
