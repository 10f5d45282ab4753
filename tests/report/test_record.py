"""The record of how a folder was made: written, read back, and refused when it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from voidprune.errors import ArtifactError
from voidprune.report.record import RunRecord, read_record, write_record


def test_a_record_is_read_back_as_a_line_for_a_shell(tmp_path: Path) -> None:
    write_record(tmp_path, ["run", "my recipe.yaml", "-o", "DIR"], recipe="model: demo\n")
    assert read_record(tmp_path / "run.json") == RunRecord("voidprune run 'my recipe.yaml' -o DIR", "model: demo\n")
    write_record(tmp_path, ["demo"])
    assert read_record(tmp_path / "run.json") == RunRecord("voidprune demo")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"schema": "voidprune.run/2", "command": "", "recipe": ""}',
        '{"schema": "voidprune.run/1", "command": ""}',
        '{"schema": "voidprune.run/1", "command": 1, "recipe": ""}',
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_record(tmp_path / "run.json")
