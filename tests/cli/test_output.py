"""What a terminal gets, a pipe, and a terminal without colours: commands run in a pseudo-terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.tables import wide_profile, wide_schedule
from voidprune.cli.output import describe_progress
from voidprune.profiling.profile import write_profile
from voidprune.schedule import write_schedule

COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def run_in_terminal(
    *arguments: object, command: tuple[str, ...] = ("-m", "voidprune"), piped: str = "", **variables: str
) -> tuple[str, str]:
    """What a terminal shows, and what comes out of the stream that is no terminal: `piped` is "stdout", "stderr" or none."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "COLORTERM")}
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdin=terminal,
        stdout=subprocess.PIPE if piped == "stdout" else terminal,
        stderr=subprocess.PIPE if piped == "stderr" else terminal,
        env={**kept, "TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(controller, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(controller)
    out, err = process.communicate()
    assert process.returncode == 0, shown.decode() + (err or b"").decode()
    return shown.decode(), (out or err or b"").decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_profile(folder / "profile.json", wide_profile(32))
    write_schedule(folder / "a.json", wide_schedule(32))
    write_schedule(folder / "b.json", wide_schedule(32, seed=1))
    return folder


@pytest.mark.parametrize("arguments", [("show", "profile.json"), ("show", "a.json"), ("diff", "a.json", "b.json")])
def test_colours_only_where_they_are_wanted(folder: Path, arguments: tuple[str, ...]) -> None:
    command = (arguments[0], *(folder / name for name in arguments[1:]))
    coloured, _ = run_in_terminal(*command)
    plain, _ = run_in_terminal(*command, NO_COLOR="1")
    dumb, _ = run_in_terminal(*command, TERM="dumb")
    _, piped = run_in_terminal(*command, piped="stdout", COLUMNS="80")
    assert COLOURS.search(coloured)
    assert not COLOURS.search(plain)
    assert "\x1b" not in dumb
    assert "\x1b" not in piped
    assert CODES.sub("", plain).replace("\r", "") == dumb.replace("\r", "") == piped
    for text in (coloured, plain, dumb):
        assert max(cell_len(CODES.sub("", line)) for line in text.splitlines()) <= 80


def test_a_heat_map_without_colours_says_the_same(folder: Path) -> None:
    """Digits on colours, shades without: both give the order of the layers."""
    rows = []
    for variables in ({}, {"NO_COLOR": "1"}):
        shown, _ = run_in_terminal("show", folder / "profile.json", **variables)
        (row, *_) = [line for line in CODES.sub("", shown).splitlines() if line.startswith("active prefill")]
        rows.append(row.rstrip("\r\n")[15:].ljust(64))
    digits = [int(rows[0][place + 1]) for place in range(0, 64, 2)]
    shades = [" ░▒▓█".index(rows[1][place]) for place in range(0, 64, 2)]
    assert [digit // 2 for digit in digits] == shades


def test_what_a_terminal_cannot_show_is_no_traceback(folder: Path) -> None:
    shown, _ = run_in_terminal("show", folder / "profile.json", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert "what layers do in each phase" in shown
    assert "Traceback" not in shown


PROFILE = ("profile", "demo", "--num-samples", 4, "--max-new-tokens", 6, "--device", "cpu", "--batch-size", 1)


def test_progress_has_a_rate_and_the_time_taken_and_goes_to_stderr(tmp_path: Path) -> None:
    shown, results = run_in_terminal(*PROFILE, "-o", tmp_path / "p.json", piped="stdout")
    told = CODES.sub("", shown)
    for pattern in (r"generating .* 100% .* samples/s \d:\d\d:\d\d", r"tracing .* 100% .* tokens/s \d:\d\d:\d\d"):
        assert re.search(pattern, told), told
    assert max(cell_len(line) for line in re.split(r"[\r\n]", told)) <= 80
    assert "prefill" in results
    assert "samples/s" not in results


def test_progress_of_a_step_that_is_not_done_has_the_time_left() -> None:
    """A bar is drawn once more when it ends, and this one ends half done: no need to catch it on its way."""
    script = """
from voidprune.cli.output import progress_bars

with progress_bars(quiet=False)("generating", 4, "samples") as advance:
    advance(2)
"""
    shown, results = run_in_terminal(command=("-c", script), piped="stdout")
    assert re.search(r"generating .* 50% .* samples/s \d:\d\d:\d\d left", CODES.sub("", shown)), shown
    assert results == ""


@pytest.mark.parametrize("quiet", [("-q",), ()])
def test_progress_is_silent_when_asked_and_on_a_pipe(tmp_path: Path, quiet: tuple[str, ...]) -> None:
    shown, piped = run_in_terminal(*PROFILE, *quiet, "-o", tmp_path / "p.json", piped="stdout" if quiet else "stderr")
    assert "samples/s" not in shown
    assert ("prefill" in piped) if quiet else piped == ""
    if quiet:
        assert shown == ""


@pytest.mark.parametrize(
    ("unit", "done", "total", "rate", "elapsed", "told"),
    [
        ("items", 0, 10, None, 3.0, ("", "", "")),
        ("items", 0, None, None, 3.0, ("", "", "0:00:03")),
        ("items", 5, 10, None, 2.0, ("50%", "2.5 items/s", "0:00:02 left")),
        ("items", 5, 10, 0.01, 2.0, ("50%", "0.01 items/s", "0:08:20 left")),
        ("items", 10, 10, 12345.6, 3725.0, ("100%", "12,346 items/s", "1:02:05")),
        ("runs", 4, 3, 1.0, 9.0, ("100%", "1 runs/s", "0:00:09")),
        ("schedules", 1234, None, 20.0, 61.4, ("1,234 schedules", "20 schedules/s", "0:01:01")),
        ("bytes", 5_000_000, 20_000_000, 1e6, 5.0, ("25%", "1.00 MB/s", "0:00:15 left")),
    ],
)
def test_how_far_how_fast_how_long(
    unit: str, done: float, total: float | None, rate: float | None, elapsed: float, told: tuple[str, str, str]
) -> None:
    assert describe_progress(unit, done=done, total=total, rate=rate, elapsed=elapsed) == told
