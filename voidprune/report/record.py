"""`run.json`: the one command that made a folder, and the recipe that it followed. What a report shows under "Make it again"."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from voidprune import artifacts
from voidprune.errors import ArtifactError

KIND, VERSION, FILE = "run", 1, "run.json"


@dataclass(frozen=True)
class RunRecord:
    """`command` is one line for a shell, with DIR for the folder; `recipe` the text of a recipe file, empty where none was."""

    command: str
    recipe: str = ""


def write_record(folder: Path, arguments: Sequence[str], *, recipe: str = "") -> None:
    """Write down that `voidprune` was called with `arguments`. An older record is replaced."""
    document = {
        "schema": artifacts.schema_key(KIND, VERSION),
        "command": shlex.join(["voidprune", *arguments]),
        "recipe": recipe,
    }
    artifacts.write_file(folder / FILE, artifacts.canonical_bytes(document), overwrite=True)


def read_record(file: Path) -> RunRecord:
    """Raises ArtifactError."""
    document = artifacts.read_document(file, kind=KIND, version=VERSION)
    artifacts.check_keys(document, required={"schema", "command", "recipe"}, place=str(file))
    command, recipe = document["command"], document["recipe"]
    if not isinstance(command, str) or not isinstance(recipe, str):
        raise ArtifactError(f"{file}: command and recipe are not texts")
    return RunRecord(command, recipe)
