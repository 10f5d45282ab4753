"""The finished steps of a long run, on disk as they finish, so that a run that was killed goes on where it stopped.

Beside the output there lies `<output>.partial`, one JSON object a line:

    {"key": {...}, "schema": "voidprune.journal/1"}      what determines every value of the run
    {"step": "...", "value": ...}                        a finished step, appended

A run that is killed loses no step that was recorded, and one whose machine fails the last second at most. A last line that was torn
is cut off and its step is done again. What the steps are, and that a step gives the same value
whenever it is run, is the business of the caller. Floats come back bit by bit.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from voidprune import artifacts
from voidprune.errors import ArtifactError

KIND, VERSION = "journal", 1
SYNC_SECONDS = 1.0
"""Between waits for the disk: one takes milliseconds, and so may a batch on a GPU."""


class Journal:
    """Values by step. Without an output it remembers nothing and writes nothing: every step is run.

    `key` is a JSON object of everything that determines the values: a journal of another key is refused by name, or begun anew
    with `overwrite`. Call `remove` once the output stands. Raises ArtifactError, OutputError.
    """

    def __init__(
        self, output: Path | None = None, *, key: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        self.path = None if output is None else output.with_name(output.name + ".partial")
        self._values: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if self.path is None:
            return
        header = {"schema": artifacts.schema_key(KIND, VERSION), "key": json.loads(json.dumps(key or {}))}
        with artifacts.disk_errors(self.path):
            if self.path.exists():
                self._check_header(header, overwrite=overwrite)
            if not self.path.exists():
                artifacts.write_file(self.path, _line(header))
            os.truncate(self.path, self._load())
            self._file = self.path.open("ab")
        self._synced = time.monotonic()

    def _check_header(self, expected: Mapping[str, Any], *, overwrite: bool) -> None:
        assert self.path is not None
        found = _read_header(self.path)
        if found is None:
            raise ArtifactError(
                f"{self.path} is not the journal of a run", hint="move it away, or choose another --output"
            )
        if found == expected:
            return
        if not overwrite:
            raise ArtifactError(
                f"{self.path} was begun by another run: {_difference(found, expected)}",
                hint="repeat that run to finish it, or add --overwrite to begin anew",
            )
        self.path.unlink()

    def _load(self) -> int:
        """Read the steps, and return how many bytes of the file are whole lines."""
        assert self.path is not None
        header, *lines = self.path.read_bytes().splitlines(keepends=True)
        size = len(header)
        for line in lines:
            record = _parse(line)
            if record is None or record.keys() != {"step", "value"}:
                break
            self._values[record["step"]] = record["value"]
            size += len(line)
        return size

    def get(self, step: str) -> Any:
        """The value of a step, or None where it was not finished."""
        return self._values.get(step)

    def record(self, step: str, value: Any) -> None:
        """Keep the value of a finished step: a JSON value, but not None.

        Tuples become lists, as they would in a run that is resumed.
        """
        assert value is not None
        if self._file is None:
            return
        assert self.path is not None
        line = _line({"step": step, "value": value})
        with artifacts.disk_errors(self.path):
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        self._values[step] = json.loads(line)["value"]

    @property
    def num_finished(self) -> int:
        return len(self._values)

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            assert self.path is not None
            with artifacts.disk_errors(self.path):
                self._sync()
            self._file.close()

    def remove(self) -> None:
        """The output stands: nothing is left to resume."""
        if self._file is not None:
            self._file.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole line as an object; None where it was torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _read_header(path: Path) -> dict[str, Any] | None:
    """The first line, which was written whole; None where it is not that of a journal."""
    with path.open("rb") as file:
        header = _parse(file.readline())
    kind = str((header or {}).get("schema")).partition("/")[0]
    return header if kind == f"voidprune.{KIND}" else None


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    one, other = found.get("key"), expected["key"]
    if found["schema"] != expected["schema"] or not isinstance(one, dict):
        return f"its format is {found['schema']}, not {expected['schema']}"
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return ", ".join(f"{name} {one.get(name)!r}, not {other.get(name)!r}" for name in names)
