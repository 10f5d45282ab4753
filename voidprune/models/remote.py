"""A model on the Hugging Face Hub of which only the tensors that somebody asks for are fetched. No torch.

Small files (config, tokenizer, licence) come the normal way, into huggingface_hub's own cache. Of the weights, headers are read
by range requests, and `fetch` brings the byte ranges of tensors to their places in a sparse local file:

    $HF_HOME/voidprune/models--{org}--{name}/{commit}/
        {shard}.ranges       as long as the shard; holes where nothing was fetched. Not named .safetensors: it is no whole file
        {shard}.json         the journal: of which commit, ETag and size, and which ranges are there

Whatever is in a journal is on the disk, so an interrupted fetch goes on where it stopped. The folder can be deleted at any time.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError, CheckpointError, ModelError, OutputError
from voidprune.models.checkpoint import (
    INDEX_FILE,
    OTHER_WEIGHTS,
    SMALL_FILES,
    WEIGHTS_FILE,
    Checkpoint,
    check_tensors,
    merge_shards,
    open_checkpoint,
    parse_index,
    read_json,
    refuse_pickles,
)
from voidprune.models.copying import ByteRange, merge_ranges
from voidprune.models.downloads import (
    PATIENCE,
    Patience,
    RangesIgnored,
    RemoteFile,
    Sink,
    access_hint,
    client_errors,
    fetch_range,
    fetch_start,
    fetch_whole,
    first_line,
    inspect_file,
)
from voidprune.models.families import read_architecture
from voidprune.models.tensors import Advance, TensorRecord, header_length, parse_header

_START = 1 << 18  # most headers fit into a quarter of a mebibyte: one request a shard
_PART = 1 << 25  # bytes a request: lost when a process is killed, at most, times connections
_CONNECTIONS = 8
_KIND, _VERSION = "ranges", 1


def open_remote_checkpoint(repo: str, *, cache: Path | None = None, patience: Patience = PATIENCE) -> Checkpoint:
    """A model on the Hub, pinned to the commit that is there now. Of its weights, headers only are fetched.

    Where the whole model is in huggingface_hub's cache already, that is opened. Raises ModelError, CheckpointError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(repo)
        commit, names = str(info.sha), sorted(sibling.rfilename for sibling in info.siblings or ())
        folder = Path(
            snapshot_download(
                repo,
                revision=commit,
                endpoint=constants.ENDPOINT,
                allow_patterns=list(SMALL_FILES),
                ignore_patterns=list(OTHER_WEIGHTS),
            )
        )
    except client_errors() as error:
        raise ModelError(
            f"no model {repo}: not a folder here, and the Hub says: {first_line(error)}",
            hint=access_hint(error),
        ) from error
    if "config.json" not in names:
        raise ModelError(f"{repo} holds no config.json", hint="give the Hub id of a Hugging Face causal LM")
    config = read_json(folder / "config.json")
    read_architecture(config)
    shards = _expected_tensors(repo, names, folder)
    if all((folder / shard).is_file() for shard in shards):
        return open_checkpoint(folder, name=repo)
    root = cache or Path(constants.HF_HOME) / "voidprune"
    weights = RemoteWeights(repo, commit, root / f"models--{repo.replace('/', '--')}" / commit, patience=patience)
    records = weights.open(list(shards))
    checkpoint = Checkpoint(
        folder=folder, name=repo, config=config, tensors=merge_shards(records, shards, place=repo), revision=commit
    )
    check_tensors(checkpoint)
    return checkpoint


def _expected_tensors(repo: str, names: Sequence[str], folder: Path) -> dict[str, set[str] | None]:
    """The shards of a model, with the tensors that its index expects in each."""
    if WEIGHTS_FILE in names:
        return {WEIGHTS_FILE: None}
    if INDEX_FILE in names:
        shards = parse_index(read_json(folder / INDEX_FILE), place=f"{INDEX_FILE} of {repo}")
        for shard in shards:
            if shard not in names:
                raise CheckpointError(f"{repo} lacks the shard {shard} that its index names")
        return dict(shards)
    refuse_pickles(repo, names)
    raise ModelError(f"{repo} holds no {WEIGHTS_FILE}", hint="give the Hub id of a model with safetensors weights")


@dataclass
class RemoteWeights:
    """The weight files of one commit: a `TensorSource`. `folder` holds what was fetched, and the journals."""

    repo: str
    commit: str
    folder: Path
    patience: Patience = PATIENCE
    files: dict[Path, _PartialFile] = field(default_factory=dict)

    def open(self, shards: Sequence[str]) -> dict[str, dict[str, TensorRecord]]:
        """The tensors of each shard. Raises ModelError, CheckpointError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
            opened = list(pool.map(self._open_shard, shards))
        self.files = {partial.data: partial for partial, _ in opened}
        return {shard: records for shard, (_, records) in zip(shards, opened, strict=True)}

    def _open_shard(self, shard: str) -> tuple[_PartialFile, dict[str, TensorRecord]]:
        partial = _PartialFile.open(self.folder, self.repo, shard, self.commit, patience=self.patience)
        size, place = partial.remote.size, partial.remote.place
        length = header_length(partial.read_start(8), size=size, place=place)
        content = partial.read_start(8 + length)[8:]
        return partial, parse_header(content, partial.data, size=size, source=self, place=place)

    def missing_bytes(self, records: Sequence[TensorRecord]) -> int:
        """How many bytes `fetch` would have to bring; whole shards where the server knows no ranges."""
        return sum(part.length for partial, ranges in self._by_file(records) for part in partial.missing_parts(ranges))

    def fetch(self, records: Sequence[TensorRecord], *, advance: Advance) -> None:
        """Bring what is missing, over several connections. Raises ModelError, CheckpointError, OutputError (disk)."""
        stop = threading.Event()
        lock = threading.Lock()

        def report(amount: int) -> None:
            if stop.is_set():
                raise _Stopped
            with lock:
                advance(amount)

        jobs = [(partial, part) for partial, ranges in self._by_file(records) for part in partial.missing_parts(ranges)]
        with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
            running = [pool.submit(partial.fetch, part, report) for partial, part in jobs]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _by_file(self, records: Sequence[TensorRecord]) -> list[tuple[_PartialFile, list[ByteRange]]]:
        by_file: dict[Path, list[TensorRecord]] = {}
        for record in records:
            by_file.setdefault(record.file, []).append(record)
        return [
            (self.files[file], list(merge_ranges(sorted(wanted, key=lambda record: record.offset))))
            for file, wanted in by_file.items()
        ]


class _Stopped(Exception):  # noqa: N818  no error: another connection met one
    """Ends a fetch whose result nobody waits for."""


@dataclass
class _PartialFile:
    """A shard of which some ranges are on the disk. `there` are those, [begin, end), sorted and apart."""

    remote: RemoteFile
    data: Path
    journal: Path
    there: list[tuple[int, int]]
    patience: Patience
    has_ranges: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    whole: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path, repo: str, name: str, commit: str, *, patience: Patience) -> _PartialFile:
        data, journal = folder / f"{name}.ranges", folder / f"{name}.json"
        if journal.is_file() and data.is_file():
            remote, there = _read_journal(journal, repo, name, commit)
            if data.stat().st_size == remote.size:
                return cls(remote, data, journal, there, patience)
        remote = inspect_file(repo, name, commit)
        with data.open("wb") as file:
            file.truncate(remote.size)  # a hole: takes no room on the disk
        return cls(remote, data, journal, [], patience)

    def read_start(self, length: int) -> bytes:
        """The first `length` bytes, and with them what most likely comes next."""
        wanted = min(self.remote.size, max(length, _START))
        if not any(begin == 0 and end >= min(length, wanted) for begin, end in self.there):
            content, self.has_ranges = fetch_start(self.remote, wanted, patience=self.patience)
            self._write(0, content)
            self._note(0, len(content))
        with self.data.open("rb") as file:
            return file.read(length)

    def missing_parts(self, ranges: Sequence[ByteRange]) -> list[ByteRange]:
        """What of some ranges is not there yet, cut into parts of a request each."""
        missing = []
        for wanted in ranges:
            position, end = wanted.offset, wanted.offset + wanted.length
            for begin, until in [*self.there, (end, end)]:
                if begin > position:
                    stop = min(begin, end)
                    missing += [ByteRange(start, min(_PART, stop - start)) for start in range(position, stop, _PART)]
                position = max(position, until)
                if position >= end:
                    break
        return missing if self.has_ranges or not missing else [ByteRange(0, self.remote.size)]

    def fetch(self, part: ByteRange, report: Advance) -> None:
        """Bring a part, or the whole file where the server knows no ranges."""
        try:
            if self.has_ranges:
                self._receive(part, report, lambda sink: fetch_range(
                    self.remote, part.offset, part.length, sink, patience=self.patience
                ))  # fmt: skip
                return
        except RangesIgnored:
            self.has_ranges = False
        with self.whole:
            if self.missing_parts([part]):
                everything = ByteRange(0, self.remote.size)
                self._receive(everything, report, lambda sink: fetch_whole(self.remote, sink, patience=self.patience))

    def _receive(self, part: ByteRange, report: Advance, receive: Callable[[Sink], None]) -> None:
        with self.data.open("r+b", buffering=0) as file:
            reached = part.offset

            def sink(offset: int, piece: bytes) -> None:
                nonlocal reached
                _write_at(file, piece, offset)
                report(max(0, offset + len(piece) - reached))  # what comes a second time counts once
                reached = max(reached, offset + len(piece))

            receive(sink)
            os.fsync(file.fileno())
        if part.length == self.remote.size:
            self._check_content()
        self._note(part.offset, part.offset + part.length)

    def _check_content(self) -> None:
        """The ETag of a large file is its SHA-256."""
        if re.fullmatch(r"[0-9a-f]{64}", self.remote.etag):
            with self.data.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.remote.etag:
                raise CheckpointError(f"{self.remote.place} arrived damaged: its SHA-256 is {found}")

    def _write(self, offset: int, content: bytes) -> None:
        with self.data.open("r+b", buffering=0) as file:
            _write_at(file, content, offset)
            os.fsync(file.fileno())

    def _note(self, begin: int, end: int) -> None:
        """Enter a range into the journal. Its bytes have to be on the disk."""
        with self.lock:
            bisect.insort(self.there, (begin, end))
            joined: list[tuple[int, int]] = []
            for first, last in self.there:
                if joined and first <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], max(joined[-1][1], last))
                else:
                    joined.append((first, last))
            self.there = joined
            document = {
                "schema": artifacts.schema_key(_KIND, _VERSION),
                "repo": self.remote.repo,
                "commit": self.remote.commit,
                "etag": self.remote.etag,
                "size": self.remote.size,
                "ranges": [list(pair) for pair in joined],
            }
            artifacts.write_file(self.journal, artifacts.canonical_bytes(document), overwrite=True)


def _write_at(file: FileIO, content: bytes, offset: int) -> None:
    view = memoryview(content)
    try:
        while view:
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:  # not to be taken for one of the network
        raise OutputError(f"cannot write {file.name!r}: {error.strerror}", hint="make room, or set HF_HOME") from error


def _read_journal(path: Path, repo: str, name: str, commit: str) -> tuple[RemoteFile, list[tuple[int, int]]]:
    document: dict[str, Any] = artifacts.read_document(path, kind=_KIND, version=_VERSION)
    artifacts.check_keys(document, required={"schema", "repo", "commit", "etag", "size", "ranges"}, place=str(path))
    try:
        there = [(begin, end) for begin, end in document["ranges"]]
        sizes = [document["size"], *(number for pair in there for number in pair)]
        if any(type(number) is not int or number < 0 for number in sizes):
            raise ValueError("sizes and ranges are whole numbers")
        if (document["repo"], document["commit"]) != (repo, commit) or type(document["etag"]) is not str:
            raise ValueError(f"it is of {document['repo']} at {document['commit']}")
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is broken: {error}", hint=f"delete {path.parent}") from error
    return RemoteFile(repo, name, commit, size=document["size"], etag=document["etag"]), there
