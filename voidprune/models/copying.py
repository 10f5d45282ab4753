"""Write safetensors files by copying byte ranges of others. No torch, and no tensor is decoded unless its dtype changes.

Bytes go from file to file inside the kernel where the system can do that. Memory does not grow with the model, nor with its
largest tensor. The same tensors give the same bytes, header included.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voidprune.errors import CheckpointError
from voidprune.models.tensors import (
    FLOAT_DTYPES,
    Advance,
    TensorRecord,
    fetch_tensors,
    numpy_dtype,
    read_header,
    read_pieces,
    stored_bytes,
    stored_dtype,
)

if TYPE_CHECKING:
    import numpy as np

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PAGE = 4096  # headers are padded so that the data starts on a page and can be mapped by others
_PIECE = 1 << 26  # bytes that go in one call: often enough for a progress bar, seldom enough to cost nothing
_CHUNK = 1 << 24  # bytes in memory at once, where some have to be

NamedTensors = Sequence[tuple[str, TensorRecord]]
"""(name in the new file, where the bytes are now), in the order in which they are written."""


def write_weights(
    groups: Iterable[NamedTensors],
    folder: Path,
    *,
    max_shard_bytes: int,
    dtype: str | None = None,
    advance: Advance = lambda _amount: None,
) -> dict[str, str]:
    """Write tensors into a folder as Hugging Face does: one file where all fits into `max_shard_bytes`, else shards and index.

    The tensors of a group stay next to each other in one file. Returns `sha256:<hex>` of each weight file, by name: hashed
    while it was being written. `advance` is told the bytes of tensors written. Raises as `copy_tensors` does.
    """
    shards = cut_shards(groups, max_shard_bytes=max_shard_bytes, dtype=dtype)
    if len(shards) == 1:
        return {WEIGHTS_FILE: copy_and_hash(shards[0], folder / WEIGHTS_FILE, dtype=dtype, advance=advance)}
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        hashes[file] = copy_and_hash(shard, folder / file, dtype=dtype, advance=advance)
        weight_map |= {name: file for name, _ in shard}
    total = sum(stored_bytes(record, dtype) for shard in shards for _, record in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def cut_shards(
    groups: Iterable[NamedTensors], *, max_shard_bytes: int, dtype: str | None = None
) -> list[list[tuple[str, TensorRecord]]]:
    """Fill shards in order, none beyond `max_shard_bytes` of tensors, except where a single group is larger than that."""
    shards: list[list[tuple[str, TensorRecord]]] = [[]]
    filled = 0
    for group in groups:
        size = sum(stored_bytes(record, dtype) for _, record in group)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    return shards


def copy_tensors(
    tensors: Iterable[tuple[str, TensorRecord]],
    target: Path,
    *,
    dtype: str | None = None,
    advance: Advance = lambda _amount: None,
) -> dict[str, TensorRecord]:
    """Write a safetensors file with these tensors, in this order, under these names.

    Without `dtype`, byte ranges are copied and no tensor is decoded; neighbours in the source go in one range. With it, float
    tensors are converted piece by piece. Returns the new records.
    Raises CheckpointError where a finite value becomes infinite in `dtype`, naming the tensor, and where a source ends early.
    """
    _write_file(list(tensors), target, dtype=dtype, written=lambda _offset, length: advance(length))
    return read_header(target)


def copy_and_hash(tensors: NamedTensors, target: Path, *, dtype: str | None, advance: Advance) -> str:
    """`copy_tensors`, and the `sha256:<hex>` of the new file: read back, by a second thread, while it is still in memory."""
    digest = hashlib.sha256()
    # hashlib and the kernel's copy both let other threads run, so the hash costs time only where the disk is faster than it.
    with ThreadPoolExecutor(max_workers=1) as behind, _opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as again:
        jobs = []

        def hash_piece(offset: int, length: int) -> None:
            for start in range(offset, offset + length, _CHUNK):
                digest.update(os.pread(again, min(_CHUNK, offset + length - start), start))

        def written(offset: int, length: int) -> None:
            jobs.append(behind.submit(hash_piece, offset, length))
            if offset:
                advance(length)

        _write_file(tensors, target, dtype=dtype, written=written)
        for job in jobs:
            job.result()
    read_header(target)
    return "sha256:" + digest.hexdigest()


Written = Callable[[int, int], None]
"""Told the offset and the length of every piece of the new file, in order."""


def _write_file(tensors: NamedTensors, target: Path, *, dtype: str | None, written: Written) -> None:
    fetch_tensors(record for _, record in tensors)
    header = encode_header(tensors, dtype=dtype)
    with _opened(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as out:
        _write_all(out, header)
        written(0, len(header))
        position = len(header)

        def done(length: int) -> None:
            nonlocal position
            written(position, length)
            position += length

        for file, group in itertools.groupby((record for _, record in tensors), key=lambda record: record.file):
            with _opened(file, os.O_RDONLY) as source:
                if dtype is None:
                    for byte_range in merge_ranges(group):
                        _copy_range(source, out, byte_range, place=file, done=done)
                else:
                    for record in group:
                        _convert(source, out, record, dtype, done=done)


def encode_header(tensors: NamedTensors, *, dtype: str | None = None) -> bytes:
    """The header of a safetensors file of these tensors: `encode_entries`."""
    return encode_entries(
        [(name, stored_dtype(record, dtype), record.shape, stored_bytes(record, dtype)) for name, record in tensors]
    )


def encode_entries(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length and the JSON that a safetensors file starts with, padded to a whole number of pages.

    `tensors`: (name, dtype, shape, bytes), in the order in which they follow.
    """
    position, entries = 0, {}
    for name, dtype, shape, num_bytes in tensors:
        end = position + num_bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def overwrite_tensors(tensors: Iterable[tuple[TensorRecord, np.ndarray[Any, Any]]]) -> set[Path]:
    """Give tensors of files of ours new values, in their own dtypes. Returns the files that changed; what hashes were known of them
    are no more.

    Raises CheckpointError where a value is not finite in the tensor's dtype, naming it.
    """
    import numpy as np

    changed = set()
    for record, values in tensors:
        assert values.shape == record.shape, record.name
        with np.errstate(over="ignore"):
            converted = values.astype(numpy_dtype(record.dtype))
        if not np.isfinite(converted).all():
            raise CheckpointError(
                f"{record.name} has values that are infinite in {record.dtype}",
                hint="give the model in bf16 or fp32 (voidprune export --precision)",
            )
        with _opened(record.file, os.O_WRONLY) as out:
            os.lseek(out, record.offset, os.SEEK_SET)
            _write_all(out, converted.tobytes())
        changed.add(record.file)
    return changed


@dataclass(frozen=True)
class ByteRange:
    """`length` bytes from `offset` of a file."""

    offset: int
    length: int


def merge_ranges(records: Iterable[TensorRecord]) -> Iterator[ByteRange]:
    """The ranges of tensors of one file, in the order given, neighbours joined. Empty ones are left out."""
    offset = length = 0
    for record in records:
        if record.offset != offset + length:
            if length:
                yield ByteRange(offset, length)
            offset, length = record.offset, 0
        length += record.num_bytes
    if length:
        yield ByteRange(offset, length)


# ---- from file to file

_Copy = Callable[[int, int, int, int], int]
"""(source, target, offset in the source, length) -> bytes copied to where the target stands; 0 at the end of the source."""


def _copy_in_file_system(source: int, out: int, offset: int, length: int) -> int:
    return os.copy_file_range(source, out, length, offset)


def _copy_in_kernel(source: int, out: int, offset: int, length: int) -> int:
    return os.sendfile(out, source, offset, length)


def _copy_through_memory(source: int, out: int, offset: int, length: int) -> int:
    piece = os.pread(source, min(length, _CHUNK), offset)
    _write_all(out, piece)
    return len(piece)


_COPIES: tuple[_Copy, ...] = (
    *((_copy_in_file_system,) if hasattr(os, "copy_file_range") else ()),
    *((_copy_in_kernel,) if hasattr(os, "sendfile") else ()),
    _copy_through_memory,
)
# What a system says that cannot copy this way between these two files. Anything else (no space, broken disk) is an error.
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EPERM,
           errno.ETXTBSY, errno.ENOTSOCK, errno.EOVERFLOW}  # fmt: skip


def _copy_range(source: int, out: int, byte_range: ByteRange, *, place: Path, done: Callable[[int], None]) -> None:
    copies = list(_COPIES)
    offset, left = byte_range.offset, byte_range.length
    while left:
        try:
            copied = copies[0](source, out, offset, min(left, _PIECE))
        except OSError as error:
            if error.errno not in _CANNOT or len(copies) == 1:
                raise
            copied = 0
        if copied == 0:
            del copies[0]  # some file systems say 0 where they mean that they cannot
            if not copies:
                raise CheckpointError(f"{place} ended while it was being copied")
            continue
        done(copied)
        offset, left = offset + copied, left - copied


def _write_all(out: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(out, view) :]


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    """A file descriptor for the duration of a block."""
    descriptor = os.open(file, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---- another dtype


def _convert(source: int, out: int, record: TensorRecord, dtype: str, *, done: Callable[[int], None]) -> None:
    import numpy as np

    if record.dtype not in FLOAT_DTYPES or record.dtype == dtype:
        for byte_range in merge_ranges([record]):
            _copy_range(source, out, byte_range, place=record.file, done=done)
        return
    before, after = numpy_dtype(record.dtype), numpy_dtype(dtype)
    for content in read_pieces(record):
        wide = np.frombuffer(content, dtype=before).astype(np.float32)
        with np.errstate(over="ignore"):
            converted = wide.astype(after)
        if not np.array_equal(np.isfinite(wide), np.isfinite(converted)):
            raise CheckpointError(
                f"{record.name} has values that are infinite in {dtype}", hint="export with --precision bf16 or fp32"
            )
        _write_all(out, converted.tobytes())
        done(converted.nbytes)
