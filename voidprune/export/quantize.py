"""Matrices in 4 or 8 bits: which get how many, and the one file that both graphs read.

Weights go through memory a few rows at a time, straight from the source's files, whatever the size of the model; how they lie in
the new file is said in `models/packed.py`. The same source gives the same bytes. Matrices that
were rounded on samples come from elsewhere, as a whole (`healing/rounding.py`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from voidprune.errors import CheckpointError
from voidprune.export.block_rounding import Rounded, cut_rows, quantize_rows, restore_numbers
from voidprune.models.checkpoint import Checkpoint, TensorRecord, layer_tensor_groups
from voidprune.models.copying import encode_entries
from voidprune.models.packed import (
    BlockFormat,
    activation_dtype,
    describe_formats,
    multiplies_rows,
    pack,
    rows_name,
    side_name,
)
from voidprune.models.tensors import DTYPE_BYTES, Advance, fetch_tensors, numpy_dtype, read_rows, stored_bytes
from voidprune.schedule import Phase


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's matrices."""

    attention: int
    mlp: int


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's matrices are packed: bits of each kept layer, in order, and of embedding and head.

    `precision` names the file; `activations` is one of ACTIVATIONS: "int8" where the graphs round what they multiply with the
    matrices, else what they compute in.
    In a phase that multiplies rows (`packed.multiplies_rows`) each row of the layers' matrices is one block, of 8 bits: `layers`,
    `block_size` and `zero_points` are of the other matrices alone.
    """

    precision: str
    layers: tuple[LayerBits, ...]
    head: int
    block_size: int = 32
    zero_points: bool = False
    activations: str = "int8"

    @property
    def dtype(self) -> str:
        """Of scales, and of everything that is not packed."""
        return activation_dtype(self.activations)

    @property
    def head_format(self) -> BlockFormat:
        """Of embedding and head."""
        return BlockFormat(bits=self.head, block_size=self.block_size, zero_points=self.zero_points)

    def layer_format(self, bits: int, phase: Phase) -> BlockFormat:
        """Of a layer's matrix, of `bits`, as a phase reads it."""
        if multiplies_rows(self.precision, phase):
            return BlockFormat(bits=8, block_size=None, zero_points=False)
        return BlockFormat(bits=bits, block_size=self.block_size, zero_points=self.zero_points)


_SCALE_ERROR = 2.0**-8
"""Of weights, relative: as much may scales in 16 bits change where rounding changes less. bfloat16 itself is off by 2^-9."""
UNIFORM_BITS = {"int4": 4, "int8": 8, "w8a8": 8, "w8a8-int4": 4}
"""Precisions in which all matrices have the same bits."""


def uniform_packing(precision: str, num_layers: int, **settings: Any) -> Packing:
    """All matrices in the same bits: a precision of UNIFORM_BITS. `settings`: fields of Packing."""
    bits = UNIFORM_BITS[precision]
    return Packing(precision, (LayerBits(bits, bits),) * num_layers, bits, **settings)


def layer_weights(source: Checkpoint, kept: Sequence[int]) -> list[LayerBits]:
    """How many weights the matrices of attention and of the MLP of each layer hold."""
    counts = [[0, 0] for _ in kept]
    for group in layer_tensor_groups(source, kept):
        for name, record in group:
            part = _part_of(source, name)
            place = source.architecture.spec.tensors.layer_of(name)
            if part is not None and place is not None:
                counts[place[0]][part] += record.shape[0] * record.shape[1]
    return [LayerBits(*pair) for pair in counts]


def average_bits(layers: Sequence[LayerBits], weights: Sequence[LayerBits]) -> float:
    """Bits of an average weight of the layers' matrices."""
    pairs = list(zip(layers, weights, strict=True))
    used = sum(bits.attention * counts.attention + bits.mlp * counts.mlp for bits, counts in pairs)
    return used / sum(counts.attention + counts.mlp for counts in weights)


@dataclass(frozen=True)
class WeightErrors:
    """How far matrices, as decode reads them, are from what they were made of, summed in squares: of each (error, weights)."""

    squares: Mapping[str, tuple[float, float]]

    @property
    def relative(self) -> float:
        """Root of the mean square error over that of the weights, all matrices together."""
        error, weights = (sum(pair[part] for pair in self.squares.values()) for part in (0, 1))
        return float(np.sqrt(error / weights)) if weights else 0.0


@dataclass(frozen=True)
class _Entry:
    """One tensor of the new file. `source` None: written beside another, whose scales or zero points it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorRecord | None = None
    blocks: BlockFormat | None = None

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


def packed_bytes(source: Checkpoint, kept: Sequence[int], packing: Packing) -> int:
    """Bytes of the tensors that `write_packed` writes."""
    return sum(entry.num_bytes for entry in _list_entries(source, kept, packing))


def packed_record_bytes(
    source: Checkpoint, record: TensorRecord, packing: Packing, phases: Collection[Phase] = tuple(Phase)
) -> int:
    """Bytes that these phases read of one tensor of the source once it is packed with all its layers: numbers, scales and zero
    points, or floats."""
    formats = {matrix_format(source, record.name, packing, phase) for phase in phases}
    dtype = packing.dtype
    return sum(
        stored_bytes(record, dtype) if blocks is None else _matrix_bytes(record, blocks, dtype) for blocks in formats
    )


def _matrix_bytes(record: TensorRecord, blocks: BlockFormat, dtype: str) -> int:
    rows, columns = record.shape
    scales = math.prod(blocks.scales_shape(rows, columns)) * DTYPE_BYTES[dtype]
    zero_points = rows * blocks.zero_point_bytes(columns) if blocks.zero_points else 0
    return math.prod(blocks.numbers_shape(rows, columns)) + scales + zero_points


def write_packed(
    source: Checkpoint,
    kept: Sequence[int],
    file: Path,
    packing: Packing,
    *,
    rounded: Mapping[str, Rounded] = MappingProxyType({}),
    advance: Advance = lambda _amount: None,
) -> WeightErrors:
    """Write all that the graphs of the layers `kept` (ascending, original numbers) need: packed matrices, the rest as floats.

    What one product spans lies side by side: q, k, v, then their scales, then their zero points; where the phases differ, all that
    decode reads of them before all that prefill does. Matrices in `rounded`, by their names in the new file, are written as they
    are given; the others are rounded to nearest. `advance` is told the bytes of tensors written. Raises CheckpointError
    where a weight is not finite, naming its tensor.
    """
    entries = list(_list_entries(source, kept, packing))
    fetch_tensors(entry.source for entry in entries if entry.source is not None)
    formats = {
        entry.name: (entry.blocks, entry.source.shape[1])
        for entry in entries
        if entry.blocks is not None and entry.source is not None
    }
    header = encode_entries(
        [(entry.name, entry.dtype, entry.shape, entry.num_bytes) for entry in entries],
        metadata=describe_formats(formats),
    )
    assert rounded.keys() <= formats.keys(), "matrices are named as in the new file"
    in_rows = {rows_name(entry.name) for entry in entries}
    offsets, position = {}, len(header)
    for entry in entries:
        offsets[entry.name] = position
        position += entry.num_bytes
    squares: dict[str, tuple[float, float]] = {}
    with file.open("wb") as opened, ThreadPoolExecutor(os.cpu_count()) as threads:
        opened.write(header)
        opened.truncate(position)
        opened.flush()
        write = functools.partial(_write_at, opened.fileno(), advance)
        floats = numpy_dtype(packing.dtype)
        for entry in entries:
            if entry.source is None:
                continue
            job = functools.partial(_write_rows, write, entry, offsets, floats, rounded.get(entry.name))
            found = list(threads.map(job, *zip(*cut_rows(entry.source.shape), strict=True)))
            if entry.blocks is None:
                continue
            error, without, weights = (sum(part) for part in zip(*found, strict=True))
            if error > 4 * without + _SCALE_ERROR**2 * weights:
                raise CheckpointError(
                    f"{entry.source.name} has blocks whose scales are too small for {floats.name}",
                    hint="choose --activations bf16 or fp32",
                )
            if entry.name not in in_rows:
                squares[entry.name] = error, weights
    return WeightErrors(squares)


def _list_entries(source: Checkpoint, kept: Sequence[int], packing: Packing) -> Iterator[_Entry]:
    names = source.architecture.spec.tensors
    for group in layer_tensor_groups(source, kept):
        if names.layer_of(group[0][0]) is None and not group[0][0].startswith(
            (f"{names.embedding}.", f"{names.final_norm}.", f"{names.head}.")
        ):
            continue  # a vision tower, which no graph reads
        decode, prefill = (
            [matrix_format(source, name, packing, phase) for name, _ in group] for phase in _STORED_ORDER
        )
        yield from _group_entries(
            [(name, record, blocks) for (name, record), blocks in zip(group, decode, strict=True)], packing.dtype
        )
        if prefill != decode:
            names_in_rows = [(rows_name(name), record) for name, record in group]
            in_rows = [(*named, blocks) for named, blocks in zip(names_in_rows, prefill, strict=True)]
            yield from _group_entries(in_rows, packing.dtype)


_STORED_ORDER = (Phase.DECODE, Phase.PREFILL)


def _group_entries(group: Sequence[tuple[str, TensorRecord, BlockFormat | None]], dtype: str) -> Iterator[_Entry]:
    """What one product spans, side by side; floats in `dtype`."""
    yield from (
        _Entry(name, dtype, record.shape, record)
        if blocks is None
        else _Entry(name, blocks.dtype, blocks.numbers_shape(*record.shape), record, blocks)
        for name, record, blocks in group
    )
    matrices = [(name, record.shape, blocks) for name, record, blocks in group if blocks is not None]
    for name, (rows, columns), blocks in matrices:
        yield _Entry(side_name(name, "scales"), dtype, blocks.scales_shape(rows, columns))
    for name, (rows, columns), blocks in matrices:
        if blocks.zero_points:
            yield _Entry(side_name(name, "zero_points"), "U8", (rows, blocks.zero_point_bytes(columns)))


def matrix_format(source: Checkpoint, name: str, packing: Packing, phase: Phase) -> BlockFormat | None:
    """How a phase reads a tensor of the new checkpoint, by its name there; None for norms and biases, which are not packed."""
    names = source.architecture.spec.tensors
    if name in (f"{names.embedding}.weight", f"{names.head}.weight"):
        return packing.head_format
    part, place = _part_of(source, name), names.layer_of(name)
    if part is None or place is None:
        return None
    bits = packing.layers[place[0]]
    return packing.layer_format((bits.attention, bits.mlp)[part], phase)


def _part_of(source: Checkpoint, name: str) -> int | None:
    """0 for a matrix of attention, 1 for one of an MLP, None for every other tensor."""
    names = source.architecture.spec.tensors
    place = names.layer_of(name)
    if place is None or not name.endswith(".weight"):
        return None
    suffix = place[1].removesuffix(".weight")
    if suffix in names.attention_matrices:
        return 0
    return 1 if suffix in names.mlp_matrices else None


def _write_at(descriptor: int, advance: Advance, content: np.ndarray[Any, Any], offset: int) -> None:
    view = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data  # a buffer has no bfloat16
    advance(len(view))
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_rows(
    write: Callable[[np.ndarray[Any, Any], int], None],
    entry: _Entry,
    offsets: Mapping[str, int],
    floats: np.dtype[Any],
    given: Rounded | None,
    start: int,
    stop: int,
) -> tuple[float, float, float]:
    """Some rows of a tensor, at their places. Returns the squares of the error, of what it were with scales in float32, and of the
    weights."""
    assert entry.source is not None
    weights = read_rows(entry.source, start, stop).astype(np.float32)
    if not np.isfinite(weights).all():
        raise CheckpointError(
            f"{entry.source.name} has values that are not finite", hint="export with --precision keep"
        )

    def put(name: str, rows: np.ndarray[Any, Any]) -> None:
        row_bytes = rows.nbytes // max(1, len(rows))
        write(rows, offsets[name] + start * row_bytes)

    if entry.blocks is None:
        put(entry.name, _as_floats(weights, floats, entry.source))
        return 0.0, 0.0, 0.0
    found = quantize_rows(weights, entry.blocks) if given is None else given.rows(start, stop)
    scales = _as_floats(found.scales, floats, entry.source)
    stored = found._replace(scales=scales.astype(np.float32))
    put(entry.name, pack(found.numbers.reshape(stop - start, -1), entry.blocks))
    put(side_name(entry.name, "scales"), scales)
    if found.zero_points is not None:
        put(side_name(entry.name, "zero_points"), pack(found.zero_points, entry.blocks))
    errors = [
        _sum_squares(restore_numbers(one, entry.blocks)[:, : weights.shape[1]] - weights)
        for one in ((found,) if floats == np.float32 else (stored, found))
    ]
    return errors[0], errors[-1], _sum_squares(weights)


def _sum_squares(values: np.ndarray[Any, Any]) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _as_floats(values: np.ndarray[Any, Any], floats: np.dtype[Any], source: TensorRecord) -> np.ndarray[Any, Any]:
    """Float32 in the dtype `floats`. Raises CheckpointError where a value is too large for it."""
    if floats == values.dtype:
        return values
    with np.errstate(over="ignore"):
        stored = values.astype(floats)
    if not np.isfinite(stored.astype(np.float32)).all():
        raise CheckpointError(
            f"{source.name} has values that are too large for {floats.name}", hint="choose --activations bf16 or fp32"
        )
    return stored
