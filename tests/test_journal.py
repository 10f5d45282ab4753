"""Journals: what was finished survives a kill at any moment, and nothing else is taken for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from voidprune import journal as journal_module
from voidprune.errors import ArtifactError, OutputError
from voidprune.journal import Journal

KEY = {"model": "sha256:abc", "batch_size": 8}


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def begin(output: Path, *steps: str) -> bytes:
    """A journal in which `steps` are finished, each with 1/3 of its place as a value. Returns its bytes."""
    with Journal(output, key=KEY) as journal:
        for number, step in enumerate(steps):
            journal.record(step, {"third": number / 3})
    return partial(output).read_bytes()


def test_finished_steps_come_back_bit_by_bit(tmp_path: Path) -> None:
    begin(tmp_path / "out.json", "a", "b")
    with Journal(tmp_path / "out.json", key=dict(reversed(KEY.items()))) as journal:
        assert journal.num_finished == 2
        assert journal.get("b") == {"third": 1 / 3}
        assert journal.get("c") is None
        journal.record("c", (1, 2))
        assert journal.get("c") == [1, 2]
    with Journal(tmp_path / "out.json", key=KEY) as journal:
        assert journal.get("c") == [1, 2]
        journal.remove()
    assert sorted(tmp_path.iterdir()) == []


def test_cut_at_any_byte_only_whole_steps_are_left(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    whole = begin(output, "a", "b", "c")
    lines = whole.splitlines(keepends=True)
    for size in range(len(lines[0]), len(whole) + 1):
        partial(output).write_bytes(whole[:size])
        with Journal(output, key=KEY) as journal:
            finished = journal.num_finished
            assert sum(map(len, lines[: 1 + finished])) <= size
            assert finished == 3 or sum(map(len, lines[: 2 + finished])) > size
            for number, step in list(enumerate("abc"))[finished:]:
                journal.record(step, {"third": number / 3})
        assert partial(output).read_bytes() == whole


def test_what_follows_a_broken_line_is_done_again(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    header, first, second = begin(output, "a", "b").splitlines(keepends=True)
    for broken in (b"\0\0\0\n", b"[1]\n", b'{"step": "a"}\n', header):
        partial(output).write_bytes(header + first + broken + second)
        with Journal(output, key=KEY) as journal:
            assert (journal.num_finished, journal.get("b")) == (1, None)
        assert partial(output).read_bytes() == header + first


def test_a_journal_of_another_run_is_refused_by_name_or_begun_anew(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    begin(output, "a")
    with pytest.raises(ArtifactError, match="begun by another run: batch_size 8, not 4") as caught:
        Journal(output, key={**KEY, "batch_size": 4})
    assert caught.value.hint is not None
    assert "--overwrite" in caught.value.hint
    with Journal(output, key=KEY, overwrite=True) as journal:
        assert journal.num_finished == 1
    with Journal(output, key={**KEY, "batch_size": 4}, overwrite=True) as journal:
        assert journal.num_finished == 0


@pytest.mark.parametrize("content", [b"", b"my notes\n", b"{}\n", b'{"schema": "voidprune.profile/1"}\n'])
def test_a_file_of_somebody_else_is_never_touched(tmp_path: Path, content: bytes) -> None:
    partial(tmp_path / "out.json").write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="is not the journal of a run"):
            Journal(tmp_path / "out.json", key=KEY, overwrite=overwrite)
    assert partial(tmp_path / "out.json").read_bytes() == content


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    partial(tmp_path / "out.json").write_bytes(b'{"schema": "voidprune.journal/2", "key": {}}\n')
    with pytest.raises(ArtifactError, match=r"its format is voidprune\.journal/2, not voidprune\.journal/1"):
        Journal(tmp_path / "out.json", key=KEY)


def test_without_an_output_nothing_is_written(tmp_path: Path) -> None:
    with Journal() as journal:
        journal.record("a", 1)
        journal.remove()
    assert sorted(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="nothing can be written into"):
        Journal(tmp_path / "file" / "out.json", key=KEY)


def test_the_disk_is_waited_for_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path / "out.json", key=KEY)
    monkeypatch.setattr(journal_module.os, "fsync", lambda _: waits.append(now[0]))
    for moment in (0.1, 0.6, 1.0, 1.5, 2.5, 2.6):
        now[0] = moment
        journal.record(f"{moment}", moment)
        assert f"{moment}" in partial(tmp_path / "out.json").read_text(), "at once where another process finds it"
    journal.close()
    journal.close()
    assert waits == [1.0, 2.5, 2.6]
    journal.remove()
    assert waits == [1.0, 2.5, 2.6], "what goes away is not waited for"


def test_a_killed_process_leaves_what_it_finished(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from voidprune.journal import Journal
journal = Journal(Path({str(tmp_path)!r}) / "out.json", key={KEY!r})
journal.record("a", 1)
journal.record("b", 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9
    with Journal(tmp_path / "out.json", key=KEY) as journal:
        assert (journal.get("a"), journal.get("b")) == (1, 2)
