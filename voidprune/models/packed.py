"""Matrices in 4 or 8 bits, packed block by block as onnxruntime's `MatMulNBits` reads them, or row by row as `QGemm` does.

Read here, made in `export/`.

A matrix [N, K] of Hugging Face's [out, in] order is cut along K into blocks of `block_size` numbers, the last one padded with
zeros. A block has a scale and whole numbers q of `bits` bits, and means scale * (q - zero point); without zero points
of its own that is 2^(bits-1). Layout (onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits):

- `{name}`: U8 [N, blocks, block_size * bits / 8], of two numbers in a byte the first in the lower half
- `{matrix}.scales`: floats [N, blocks]
- `{matrix}.zero_points`, where there are any: U8 [N, ceil(blocks * bits / 8)], packed alike, each row by itself

Where a whole row is the block, numbers are signed, I8 [N, K], and mean scale * q; scales are [N].

A file may hold a matrix twice, once for each phase: `{matrix}.weight` is then what decode reads, `{matrix}.rows.weight`, row by
row, what prefill does.

The file is a safetensors file; its metadata say how each matrix is packed. Scales, and everything else in it, are floats of one
dtype, in which the graphs compute: F32, or F16 or BF16 for devices (`activation_dtype`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voidprune.errors import CheckpointError
from voidprune.models.tensors import FLOAT_DTYPES, PRECISIONS, TensorRecord, read_header, read_metadata, read_rows
from voidprune.schedule import Phase

if TYPE_CHECKING:
    import numpy as np

PACKED_PRECISIONS = ("int8", "int4", "mixed", "w8a8", "w8a8-int4")
"""Names on the command line."""
FOUR_BIT_PRECISIONS = ("int4", "mixed", "w8a8-int4")
"""Those in which layers may have matrices in 4 bits."""
PACKED_DTYPE = "NBITS"
"""What stands for a dtype in the record of a packed matrix: nothing that reads floats takes it for one."""
BITS = (4, 8)
ROUNDINGS = ("nearest", "gptq")
"""How matrices in 4 bits may be rounded."""
BLOCK_SIZES = (32, 128)
ACTIVATIONS = ("int8", "fp32", "fp16", "bf16")
"""What products round the other factor to; in "fp16" and "bf16" the graphs compute everything in these 16 bits."""
METADATA_KEY = "voidprune.packed"


def multiplies_rows(precision: str, phase: Phase) -> bool:
    """Whether a phase multiplies whole numbers by the layers' matrices, packed row by row; else they are packed in blocks."""
    return precision == "w8a8" or (precision == "w8a8-int4" and phase is Phase.PREFILL)


def differs_by_phase(precision: str) -> bool:
    """Whether each phase has matrices of its own."""
    return multiplies_rows(precision, Phase.PREFILL) != multiplies_rows(precision, Phase.DECODE)


def activation_dtype(activations: str) -> str:
    """The dtype in which graphs with such activations compute, and in which what is not packed is stored."""
    return "F32" if activations == "int8" else PRECISIONS[activations]


def packed_file(precision: str) -> str:
    """The name of the file with the matrices of a precision."""
    return f"model.{precision}.safetensors"


@dataclass(frozen=True)
class BlockFormat:
    """How one matrix is packed. `block_size` None: every row is one block, of signed numbers in 8 bits."""

    bits: int
    block_size: int | None
    zero_points: bool

    def __post_init__(self) -> None:
        rows_fit = self.block_size is not None or (self.bits == 8 and not self.zero_points)
        known = self.bits in BITS and self.block_size in (*BLOCK_SIZES, None)
        types = type(self.bits), type(self.block_size or 0), type(self.zero_points)
        if not known or not rows_fit or types != (int, int, bool):  # 8.0 is 8, and shifts nothing
            raise ValueError(f"{self} is no way to pack a matrix")

    @property
    def whole_rows(self) -> bool:
        return self.block_size is None

    @property
    def dtype(self) -> str:
        """Of the packed numbers, as safetensors calls it."""
        return "I8" if self.whole_rows else "U8"

    @property
    def middle(self) -> int:
        """The zero point of blocks that have none of their own."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest whole number that `bits` hold."""
        return (1 << self.bits) - 1

    def numbers_in_block(self, columns: int) -> int:
        """Of a matrix with so many columns."""
        return columns if self.block_size is None else self.block_size

    def num_blocks(self, columns: int) -> int:
        """Of one row."""
        return -(-columns // self.numbers_in_block(columns))

    def numbers_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the tensor with the packed numbers of a matrix."""
        if self.whole_rows:
            return rows, columns
        return rows, self.num_blocks(columns), self.numbers_in_block(columns) * self.bits // 8

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        return (rows,) if self.whole_rows else (rows, self.num_blocks(columns))

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of one row's zero points."""
        return -(-self.num_blocks(columns) * self.bits // 8)


@dataclass(frozen=True, kw_only=True)
class PackedRecord(TensorRecord):
    """A packed matrix: `shape` is [N, K], `offset` and `num_bytes` are those of its packed numbers."""

    blocks: BlockFormat
    scales: TensorRecord
    zero_points: TensorRecord | None

    @property
    def stored_parts(self) -> tuple[TensorRecord, ...]:
        """Everything that is stored of the matrix, as its file's header has it."""
        return tuple(part for part in (self, self.scales, self.zero_points) if part is not None)


def side_name(matrix: str, part: str) -> str:
    """The name of a matrix's scales or zero points: `model.norm.weight` gives `model.norm.scales`."""
    return f"{matrix.removesuffix('.weight')}.{part}"


_ROWS = ".rows.weight"


def rows_name(matrix: str) -> str:
    """The name of what prefill reads of a matrix that decode reads in blocks."""
    return f"{matrix.removesuffix('.weight')}{_ROWS}"


def find_packed(folder: Path) -> Path | None:
    """The file with packed matrices in a folder, None where it has none."""
    return next((folder / name for name in map(packed_file, PACKED_PRECISIONS) if (folder / name).is_file()), None)


def read_packed(file: Path, phase: Phase = Phase.DECODE) -> dict[str, TensorRecord]:
    """The tensors that a phase reads of a file with packed matrices, scales and zero points inside the records of their matrices.

    Raises CheckpointError where header, metadata and tensors do not fit together.
    """
    records = read_header(file)
    described = _read_formats(file)
    tensors = dict(records)
    floats = next((record.dtype for record in records.values() if record.dtype in FLOAT_DTYPES), "F32")
    for name, (blocks, columns) in described.items():
        parts = [name, side_name(name, "scales")] + ([side_name(name, "zero_points")] if blocks.zero_points else [])
        if missing := [part for part in parts if part not in records]:
            raise CheckpointError(f"{file} lacks {missing[0]}, which its metadata speak of")
        packed, scales, *zero_points = (tensors.pop(part) for part in parts)
        rows = packed.shape[0] if packed.shape else 0
        expected = [
            (packed, blocks.dtype, blocks.numbers_shape(rows, columns)),
            (scales, floats, blocks.scales_shape(rows, columns)),
            *((part, "U8", (rows, blocks.zero_point_bytes(columns))) for part in zero_points),
        ]
        for part, dtype, shape in expected:
            if (part.dtype, part.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{file}: {part.name} is {part.dtype} {list(part.shape)}; its metadata ask for {dtype} {list(shape)}"
                )
        tensors[name] = PackedRecord(
            name=name,
            dtype=PACKED_DTYPE,
            shape=(rows, columns),
            file=file,
            offset=packed.offset,
            num_bytes=packed.num_bytes,
            blocks=blocks,
            scales=scales,
            zero_points=zero_points[0] if zero_points else None,
        )
    in_rows = {name.removesuffix(_ROWS) + ".weight": tensors.pop(name) for name in described if name.endswith(_ROWS)}
    if lost := [name for name in in_rows if not isinstance(tensors.get(name), PackedRecord)]:
        raise CheckpointError(f"{file} holds {lost[0]} for prefill and lacks it for decode")
    return tensors | in_rows if phase is Phase.PREFILL else tensors


def describe_formats(matrices: Mapping[str, tuple[BlockFormat, int]]) -> dict[str, str]:
    """Metadata of a file with these packed matrices: name -> how, and how many columns."""
    entries = {
        name: [blocks.bits, blocks.block_size, blocks.zero_points, columns]
        for name, (blocks, columns) in matrices.items()
    }
    return {METADATA_KEY: json.dumps(entries, separators=(",", ":"))}


def _read_formats(file: Path) -> dict[str, tuple[BlockFormat, int]]:
    try:
        entries = json.loads(read_metadata(file)[METADATA_KEY])
        formats = {}
        for name, (bits, block_size, zero_points, columns) in entries.items():
            if type(columns) is not int or columns < 1:
                raise ValueError(f"{columns!r} columns")
            formats[name] = BlockFormat(bits=bits, block_size=block_size, zero_points=zero_points), columns
        return formats
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata of {file} do not say how its matrices are packed ({error!r})", hint="export the model again"
        ) from error


def dequantize_rows(record: PackedRecord, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The rows `start` to `stop` of a packed matrix as float32, [rows, K]. Raises CheckpointError where the file ends early."""
    import numpy as np

    packed, scales = read_rows(record, start, stop), read_rows(record.scales, start, stop).reshape(stop - start, -1)
    numbers = unpack(packed.reshape(stop - start, -1), record.blocks)
    blocks = numbers.reshape(*scales.shape, record.blocks.numbers_in_block(record.shape[1])).astype(np.float32)
    if record.zero_points is None:
        blocks -= record.blocks.middle
    else:
        points = unpack(read_rows(record.zero_points, start, stop), record.blocks)
        blocks -= points[:, : scales.shape[1], np.newaxis]
    blocks *= scales[:, :, np.newaxis]
    return blocks.reshape(stop - start, -1)[:, : record.shape[1]]


def unpack(content: np.ndarray[Any, np.dtype[np.uint8]], blocks: BlockFormat) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Whole numbers from 0 out of bytes [..., n]: [..., n * 8 / bits], of two in a byte the lower half first."""
    import numpy as np

    if blocks.whole_rows:
        return content ^ np.uint8(blocks.middle)  # signed: the same bits but for the first
    if blocks.bits == 8:
        return content
    halves = np.stack([content & np.uint8(15), content >> np.uint8(4)], axis=-1)
    return halves.reshape(*content.shape[:-1], 2 * content.shape[-1])


def pack(numbers: np.ndarray[Any, np.dtype[np.uint8]], blocks: BlockFormat) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What `unpack` undoes; an odd last number gets a zero beside it."""
    import numpy as np

    if blocks.whole_rows:
        return numbers ^ np.uint8(blocks.middle)
    if blocks.bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros_like(numbers[..., :1])], axis=-1)
    return numbers[..., 0::2] | (numbers[..., 1::2] << np.uint8(4))
