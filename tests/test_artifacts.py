"""Canonical JSON, hashes, and writes that happen completely or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune import artifacts
from voidprune.errors import ArtifactError, OutputError

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half a surrogate pair is a Python string, but no text that UTF-8 can hold.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcde"), inner, max_size=3),
    max_leaves=8,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- bytes


@given(st.dictionaries(st.text("abcdefg", min_size=1), plain, max_size=4))
def test_canonical_bytes_are_the_same_for_any_order_of_keys(document: dict[str, Any]) -> None:
    content = artifacts.canonical_bytes(document)
    assert artifacts.canonical_bytes(dict(reversed(document.items()))) == content
    assert json.loads(content) == document
    assert content.endswith(b"\n")


def test_canonical_bytes_are_these() -> None:
    document = {"b": [0.1, 1e-7, 1e22, 3], "a": {"é": None, "t": True}}
    expected = (
        '{\n  "a": {\n    "t": true,\n    "é": null\n  },\n  "b": [\n    0.1,\n    1e-07,\n    1e+22,\n    3\n  ]\n}\n'
    )
    assert artifacts.canonical_bytes(document) == expected.encode()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_written(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.canonical_bytes({"loss": number})


def test_hashes(tmp_path: Path) -> None:
    content = b"voidprune" * 100_000
    (tmp_path / "file").write_bytes(content)
    assert artifacts.file_hash(tmp_path / "file") == "sha256:" + hashlib.sha256(content).hexdigest()


# ---- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "here is not JSON"),
        (b"{", "here is not JSON"),
        (b"\xff\xfe", "here is not JSON"),
        (b"[1]", "here holds a JSON list, not an object"),
        (b"3", "here holds a JSON int, not an object"),
        (b'{"x": NaN}', "here holds NaN, which is not a number"),
        (b'{"x": [-Infinity]}', "here holds -Infinity, which is not a number"),
        (b"{}", 'here is not a thing: its schema is None, not "voidprune.thing/3"'),
        (b'{"schema": "voidprune.other/3"}', "here is not a thing: its schema is 'voidprune.other/3'"),
        (b'{"schema": "voidprune.thing/4"}', "here has thing format 4; this version of voidprune reads format 3"),
        (b'{"schema": "voidprune.thing/2"}', "here has thing format 2"),
        (b'{"schema": "voidprune.thing/"}', "here has thing format "),
    ],
)
def test_hostile_content_has_a_named_error(content: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(message)):
        artifacts.parse_document(content, kind="thing", version=3, place="here")


@pytest.mark.parametrize(
    "content",
    [
        b'{"schema": "voidprune.thing/3", "x": 1e999}',
        b'{"schema": "voidprune.thing/3", "x": ' + b"9" * 5000 + b"}",
        b'{"schema": "voidprune.thing/3", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        '{"schema": "voidprune.thing/²"}'.encode(),
    ],
    ids=["overflow", "5000 digits", "depth", "superscript version"],
)
def test_content_that_breaks_the_parser_has_a_named_error(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        artifacts.parse_document(content, kind="thing", version=3, place="here")


def test_hint_says_which_side_is_old() -> None:
    with pytest.raises(ArtifactError) as newer:
        artifacts.parse_document(b'{"schema": "voidprune.thing/4"}', kind="thing", version=3, place="here")
    assert newer.value.hint == "upgrade voidprune"
    with pytest.raises(ArtifactError) as older:
        artifacts.parse_document(b'{"schema": "voidprune.thing/2"}', kind="thing", version=3, place="here")
    assert older.value.hint == "make the file again"


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*absent\.json: No such file"):
        artifacts.read_document(tmp_path / "absent.json", kind="thing", version=1)
    with pytest.raises(ArtifactError, match=r"cannot read .*: Is a directory"):
        artifacts.read_document(tmp_path, kind="thing", version=1)


def test_keys_are_checked_by_name() -> None:
    artifacts.check_keys({"a": 1, "c": 2}, required={"a"}, optional={"b", "c"}, place="here")
    with pytest.raises(ArtifactError, match="here lacks a, b"):
        artifacts.check_keys({"c": 1}, required={"b", "a", "c"}, place="here")
    with pytest.raises(ArtifactError, match="here has unknown keys: x, y"):
        artifacts.check_keys({"a": 1, "y": 1, "x": 1}, required={"a"}, place="here")


# ---- files


def test_write_file_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    artifacts.write_file(path, b"one")
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["file.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_write_file_refuses_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OutputError) as caught:
        artifacts.write_file(path, b"new")
    assert caught.value.message == f"{path} exists"
    assert caught.value.hint == "choose another --output, or add --overwrite"
    assert path.read_bytes() == b"old"
    artifacts.write_file(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    with pytest.raises(OutputError, match="is a folder, not a file"):
        artifacts.write_file(tmp_path, b"new", overwrite=True)
    assert names(tmp_path) == ["file"]


def test_write_file_below_a_file_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="nothing can be written into"):
        artifacts.write_file(tmp_path / "file" / "below", b"x")


@pytest.mark.parametrize("name", ["a" * 300, "a" * 250, "é" * 120, f"{'a' * 300}/x", "bb/" * 2000 + "x"])
def test_a_name_that_is_too_long_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    for check in (
        lambda path: artifacts.check_output_file(path, overwrite=False),
        lambda path: artifacts.check_output_folder(path, overwrite=False, marker="m"),
        lambda path: artifacts.write_file(path, b"x"),
    ):
        with pytest.raises(OutputError, match="too long to be written"):
            check(tmp_path / name)
    with pytest.raises(OutputError, match="too long"), artifacts.staged_folder(tmp_path / name, marker="m"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


def test_the_longest_name_that_is_let_through_can_be_written(tmp_path: Path) -> None:
    longest = "a" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 32)
    artifacts.write_file(tmp_path / longest, b"x")
    with artifacts.staged_folder(tmp_path / f"b{longest[1:]}", marker="m"):
        pass
    assert names(tmp_path) == [longest, f"b{longest[1:]}"]


@pytest.mark.parametrize("place", ["/proc/x.json", "/proc/new/x.json", "/dev/null/x"])
def test_where_nobody_makes_files_is_said_at_once(place: str) -> None:
    """The permissions of /proc allow root everything."""
    with pytest.raises(OutputError, match="nothing can be written into"):
        artifacts.check_output_file(Path(place), overwrite=False)
    with pytest.raises(OutputError, match="nothing can be written into"):
        artifacts.check_output_folder(Path(place), overwrite=False, marker="m")


# ---- folders


class Interrupted(BaseException):
    """Stands for Ctrl-C: no subclass of Exception."""


def test_staged_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "below" / "out"
    with artifacts.staged_folder(final, marker="old") as stage:
        (stage / "file").write_text("x")
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("y")
        assert not final.exists()
        assert stage.parent == final.parent, "a sibling, so that renaming is atomic"
    assert names(final) == ["file", "sub"]
    assert names(final.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_staged_folder_vanishes_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def build() -> None:
        with artifacts.staged_folder(tmp_path / "out", marker="old") as stage:
            (stage / "file").write_text("x")
            raise error

    with pytest.raises(error):
        build()
    assert names(tmp_path) == []


def test_staged_folder_refuses_what_is_there(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "mine").write_text("old")
    with pytest.raises(OutputError, match="exists"), artifacts.staged_folder(final, marker="old"):
        pytest.fail("the block must not run")
    assert (final / "mine").read_text() == "old"
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="is a file, not a folder"),
        artifacts.staged_folder(tmp_path / "file", marker="old", overwrite=True),
    ):
        pytest.fail("the block must not run")


def test_staged_folder_may_fill_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with artifacts.staged_folder(tmp_path / "out", marker="old") as stage:
        (stage / "file").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_old_folder_is_kept_until_the_new_one_stands(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    with artifacts.staged_folder(final, marker="old", overwrite=True) as stage:
        (stage / "new").write_text("new")
        assert names(final) == ["old"]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("precious")
    with (
        pytest.raises(OutputError, match="was not written by this command: it holds no old"),
        artifacts.staged_folder(tmp_path / "out", marker="old", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "thesis").read_text() == "precious"


def test_old_folder_survives_an_interrupt_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    rename, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise Interrupted
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(Interrupted), artifacts.staged_folder(final, marker="old", overwrite=True) as stage:
        (stage / "new").write_text("new")
    assert names(final) == ["old"]
    assert names(tmp_path) == ["out"]


def test_old_folder_survives_a_failed_overwrite(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")

    def build() -> None:
        with artifacts.staged_folder(final, marker="old", overwrite=True) as stage:
            (stage / "new").write_text("new")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build()
    assert names(final) == ["old"]
    assert names(tmp_path) == ["out"]


def test_killed_build_leaves_no_folder_under_the_final_name(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from voidprune.artifacts import staged_folder
with staged_folder(Path({str(tmp_path)!r}) / "out", marker="old") as stage:
    (stage / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()


def test_what_killed_processes_left_is_removed_and_what_runs_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    abandoned = tmp_path / ".out.voidprune-abandoned"
    (abandoned / "deep").mkdir(parents=True)
    bystander = tmp_path / ".out.original"
    bystander.mkdir()
    with artifacts.staged_folder(target, marker="m") as running:
        assert not abandoned.exists()
        (running / "m").write_text("first")
        with artifacts.staged_folder(tmp_path / "out", marker="m"):
            assert running.exists(), "somebody builds there"
        assert bystander.exists()
        for path in target.iterdir():
            path.unlink()
    assert (target / "m").read_text() == "first"
    bystander.rmdir()
