"""Versioned JSON in and out, hashes, and writes that either happen completely or not at all.

Every JSON file of ours carries `"schema": "voidprune.<kind>/<int>"`. The bytes are canonical: the same value gives the same
bytes (keys sorted, two spaces, shortest round-trip floats, no NaN, one newline at the end). What the fields mean is known by
the module that owns the kind, not here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from voidprune.errors import ArtifactError, OutputError

Document = dict[str, Any]
_PIECE = 1 << 20


def canonical_bytes(document: Mapping[str, Any]) -> bytes:
    """The one way to write `document`. Raises ValueError on NaN or infinity: no measurement of ours may hold one."""
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def file_hash(path: Path, *, advance: Callable[[int], None] = lambda _bytes: None) -> str:
    """`sha256:<hex>` of a file, read in pieces. `advance` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            advance(len(piece))
    return f"sha256:{digest.hexdigest()}"


def schema_key(kind: str, version: int) -> str:
    return f"voidprune.{kind}/{version}"


def parse_document(content: bytes, *, kind: str, version: int, place: str) -> Document:
    """Parse one of our JSON files and check what it says it is.

    Raises ArtifactError: not JSON, not an object, NaN, another kind, a newer version.
    """

    def refuse_constant(name: str) -> Any:
        raise ArtifactError(f"{place} holds {name}, which is not a number", hint="make the file again")

    def parse_float(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse_constant(digits)

    try:
        document = json.loads(content, parse_constant=refuse_constant, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{place} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{place} holds a JSON {type(document).__name__}, not an object")
    declared = document.get("schema")
    expected = schema_key(kind, version)
    if declared == expected:
        return document
    family, _, number = str(declared).rpartition("/")
    if family != f"voidprune.{kind}":
        raise ArtifactError(f'{place} is not a {kind}: its schema is {declared!r}, not "{expected}"')
    raise ArtifactError(
        f"{place} has {kind} format {number}; this version of voidprune reads format {version}",
        hint="upgrade voidprune" if number.isdecimal() and int(number) > version else "make the file again",
    )


def read_document(path: Path, *, kind: str, version: int) -> Document:
    """Read and check one of our JSON files from disk."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return parse_document(content, kind=kind, version=version, place=str(path))


def check_keys(
    document: Mapping[str, Any], *, required: Iterable[str], optional: Iterable[str] = (), place: str
) -> None:
    """Refuse missing and unknown keys, naming them."""
    required = set(required)
    if missing := required - document.keys():
        raise ArtifactError(f"{place} lacks {', '.join(sorted(missing))}")
    if unknown := document.keys() - required - set(optional):
        raise ArtifactError(
            f"{place} has unknown keys: {', '.join(sorted(unknown))}",
            hint="a newer version may have written the file; otherwise remove the keys",
        )


def write_file(path: Path, content: bytes, *, overwrite: bool = False) -> None:
    """Write a file beside its final name, flush it to the disk, then rename it into place. Raises OutputError."""
    check_output_file(path, overwrite=overwrite)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Say early, before hours of work, that a file cannot be written there. Raises OutputError."""
    _check_name(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file", hint="give the name of a file with --output")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", hint="choose another --output, or add --overwrite")
    _check_parent(path)


def check_output_folder(path: Path, *, overwrite: bool, marker: str) -> None:
    """The same for a folder. Only an empty folder, or with `overwrite` one of ours, which holds the file `marker`, may be there."""
    _check_name(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder", hint="choose another --output")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"{path} exists", hint="choose another --output, or add --overwrite")
        if not (path / marker).is_file():
            raise OutputError(
                f"{path} was not written by this command: it holds no {marker}", hint="choose another --output"
            )
    _check_parent(path)


def _check_name(path: Path) -> None:
    """Refuse names that are too long for the disk, or would be while their file or folder is being written."""
    try:
        parent = _nearest_parent(path)
        limit = os.pathconf(parent, "PC_NAME_MAX")
        names = path.absolute().parts[len(parent.parts) :]
        if all(len(os.fsencode(name)) <= limit for name in names) and len(os.fsencode(path.name)) <= limit - _RESERVED:
            return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    raise OutputError(f"the name {_abridge(str(path))} is too long to be written", hint="choose a shorter --output")


_RESERVED = 32
"""Bytes of a name that `write_file`, `staged_folder` and journals add for as long as they write."""


def _abridge(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}...{text[-36:]}"


def _nearest_parent(path: Path) -> Path:
    """The folder that is there, below which the others will have to be made."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_parent(path: Path) -> None:
    """What a folder says of its own permissions is not enough: in /proc, say, nobody makes a file, whoever may write there."""
    parent = _nearest_parent(path)
    refused = OutputError(f"nothing can be written into {parent}", hint="choose another --output")
    if not parent.is_dir():
        raise refused
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise refused from error


@contextlib.contextmanager
def staged_folder(path: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to build in; renamed to `path` when the block ends well, removed when it does not.

    A folder under the final name is therefore always complete. An old folder, which has to hold the file `marker`, is only
    removed after the new one stands. Raises OutputError.
    """
    check_output_folder(path, overwrite=overwrite, marker=marker)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        stage = Path(tempfile.mkdtemp(dir=path.parent, prefix=_stage_prefix(path)))
        try:
            stage.chmod(0o777 & ~_umask())
            with _locked(stage):
                yield stage
            for file in stage.rglob("*"):
                if file.is_file():
                    _flush(file)
            _replace_folder(path, stage)
            _flush(path.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stage_prefix(path: Path) -> str:
    return f".{path.name}.voidprune-"


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they built `path` left beside it: maybe many gigabytes."""
    prefix = _stage_prefix(path)
    for folder in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        with contextlib.suppress(OSError), _locked(folder):  # locked already: somebody is building there
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder for the duration of the block. The system lets go of it when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _replace_folder(path: Path, stage: Path) -> None:
    if not path.exists():
        os.replace(stage, path)
        return
    retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.replace(path, retired / "folder")
    try:
        os.replace(stage, path)
    except BaseException:
        os.replace(retired / "folder", path)
        retired.rmdir()
        raise
    shutil.rmtree(retired)


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses becomes an error of ours; other errors of the block stay what they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="make room, or choose another --output"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
