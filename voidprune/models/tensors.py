"""Tensors in safetensors files, as bytes: what a header says, and how to read what it points at. No torch.

The format (https://huggingface.co/docs/safetensors): eight bytes N, little endian; N bytes of JSON, name -> dtype, shape,
[begin, end) offsets behind the header; the tensors, without holes. Writing is the business of `copying.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from voidprune.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 22

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F32", "F16", "BF16")
PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Names on the command line, and those of safetensors."""

Advance = Callable[[int], None]
"""Told how many more bytes are done."""


class TensorSource(Protocol):
    """Where tensors come from that are not all on this disk: a model on the Hub."""

    def fetch(self, records: Sequence[TensorRecord], *, advance: Advance) -> None:
        """Bring the bytes of these tensors to their places in their local files. What is there already is not fetched again."""

    def missing_bytes(self, records: Sequence[TensorRecord]) -> int:
        """How many bytes `fetch` would have to bring."""


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `num_bytes` bytes at `offset` (from the start of the file) of `file`.

    With a `source`, the file has only those bytes that were fetched; whoever reads it goes through `fetch_tensors` first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int
    source: TensorSource | None = field(default=None, compare=False, repr=False)


def fetch_tensors(records: Iterable[TensorRecord], *, advance: Advance = lambda _amount: None) -> None:
    """See to it that the bytes of these tensors are on this disk. Raises ModelError, CheckpointError."""
    for source, wanted in _by_source(records):
        source.fetch(wanted, advance=advance)


def missing_bytes(records: Iterable[TensorRecord]) -> int:
    """How many bytes `fetch_tensors` would have to bring."""
    return sum(source.missing_bytes(wanted) for source, wanted in _by_source(records))


def _by_source(records: Iterable[TensorRecord]) -> list[tuple[TensorSource, list[TensorRecord]]]:
    by_source: dict[int, tuple[TensorSource, list[TensorRecord]]] = {}
    for record in records:
        if record.source is not None:
            by_source.setdefault(id(record.source), (record.source, []))[1].append(record)
    return list(by_source.values())


def read_header(file: Path) -> dict[str, TensorRecord]:
    """The tensors of one safetensors file. Raises CheckpointError where header and file do not fit together."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = header_length(opened.read(8), size=size, place=str(file))
        return parse_header(opened.read(length), file, size=size)


def header_length(prefix: bytes, *, size: int, place: str) -> int:
    """How long the JSON behind the first eight bytes of a file of `size` bytes is. Raises CheckpointError."""
    if len(prefix) < 8:
        raise CheckpointError(f"{place} is {size} bytes long: no safetensors header")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > min(_MAX_HEADER, size - 8):
        raise CheckpointError(f"{place} says that its header has {length} bytes; the file has {size}")
    return length


def parse_header(
    content: bytes, file: Path, *, size: int, source: TensorSource | None = None, place: str | None = None
) -> dict[str, TensorRecord]:
    """The tensors of a file of `size` bytes by the JSON of its header. `place` is its name in errors.

    Raises CheckpointError where the two do not fit together.
    """
    place = place or str(file)
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} has a broken header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{place} has a broken header: not an object")
    header.pop("__metadata__", None)
    position = base = 8 + len(content)
    records = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = _parse_entry(name, entry, place)
        records[name] = TensorRecord(name, dtype, shape, file, base + begin, end - begin, source)
    for record in sorted(records.values(), key=lambda record: (record.offset, record.num_bytes)):
        if record.offset != position:
            raise CheckpointError(f"{place}: the data of {record.name} does not follow the tensor before it")
        position += record.num_bytes
    if position != size:
        raise CheckpointError(f"{place} is {size} bytes long; its header describes {position}: truncated or damaged")
    return records


def _parse_entry(name: str, entry: Any, place: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("sizes and offsets are whole numbers")
        expected = math.prod(shape) * DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: the header entry of {name} is broken ({error!r})") from error
    if end - begin != expected:
        raise CheckpointError(f"{place}: {name} is {dtype} {list(shape)}, {expected} bytes, but spans {end - begin}")
    return dtype, shape, (begin, end)


def read_metadata(file: Path) -> dict[str, Any]:
    """The `__metadata__` of one safetensors file; empty where it has none. Raises CheckpointError where the header is broken."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = header_length(opened.read(8), size=size, place=str(file))
        try:
            found = json.loads(opened.read(length)).get("__metadata__", {})
        except (ValueError, RecursionError, AttributeError) as error:
            raise CheckpointError(f"{file} has a broken header: {error}") from error
    return found if isinstance(found, dict) else {}


def header_hash(file: Path) -> str:
    """SHA-256 of a file's header: names, dtypes, shapes and places of all tensors. Cheap, whatever the size of the file."""
    with file.open("rb") as opened:
        prefix = opened.read(8)
        return "sha256:" + hashlib.sha256(prefix + opened.read(*struct.unpack("<Q", prefix))).hexdigest()


def precision_name(dtype: str) -> str:
    """The command line's name of a float dtype in safetensors' spelling."""
    return next(name for name, stored in PRECISIONS.items() if stored == dtype)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a float tensor, in safetensors' spelling; bfloat16 through ml_dtypes."""
    import ml_dtypes
    import numpy as np

    types: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    found: np.dtype[Any] = np.dtype(types[dtype])
    return found


def stored_dtype(record: TensorRecord, dtype: str | None) -> str:
    """The dtype of a tensor when float tensors are stored in `dtype`; as it is when that is None."""
    return dtype if dtype is not None and record.dtype in FLOAT_DTYPES else record.dtype


def stored_bytes(record: TensorRecord, dtype: str | None) -> int:
    """Bytes of a tensor when float tensors are stored in `dtype`; as it is when that is None."""
    return math.prod(record.shape) * DTYPE_BYTES[stored_dtype(record, dtype)]


def read_tensor(record: TensorRecord) -> np.ndarray[Any, Any]:
    """One float tensor, mapped from its file. Nothing is read before it is used."""
    import numpy as np

    fetch_tensors([record])
    return np.memmap(record.file, dtype=numpy_dtype(record.dtype), mode="r", offset=record.offset, shape=record.shape)


def read_rows(record: TensorRecord, start: int, stop: int) -> np.ndarray[Any, Any]:
    """The rows `start` to `stop` of a tensor of floats or bytes, as they are stored, in memory of their own.

    Not mapped: reading a model from its first row to its last takes no more memory than the largest such piece. Raises
    CheckpointError where the file ends early.
    """
    import numpy as np

    fetch_tensors([record])
    rows, *rest = record.shape
    row_bytes = record.num_bytes // rows if rows else 0
    content = bytearray((stop - start) * row_bytes)
    with record.file.open("rb", buffering=0) as file:
        file.seek(record.offset + start * row_bytes)
        view = memoryview(content)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{record.file} ended while {record.name} was being read")
            view = view[count:]
    dtype = numpy_dtype(record.dtype) if record.dtype in FLOAT_DTYPES else np.dtype(np.uint8)
    return np.frombuffer(content, dtype).reshape(stop - start, *(rest if dtype != np.uint8 else (-1,)))


def read_pieces(record: TensorRecord) -> Iterator[bytes]:
    """The bytes of one tensor in pieces of bounded size. Raises CheckpointError where its file ends early."""
    fetch_tensors([record])
    with record.file.open("rb") as file:
        file.seek(record.offset)
        left = record.num_bytes
        while left:
            piece = file.read(min(_CHUNK, left))
            if len(piece) < min(_CHUNK, left):
                raise CheckpointError(f"{record.file} ended while {record.name} was being read")
            yield piece
            left -= len(piece)


def same_bytes(one: TensorRecord, other: TensorRecord) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        first == second for first, second in zip(read_pieces(one), read_pieces(other), strict=True)
    )
