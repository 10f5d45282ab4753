"""What breaks in a child is an answer of one line, and no secret is in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from voidprune.doctor.children import Failure, redact, run_examination

PATIENCE = 3600.0
"""Seconds for a child that does answer, on a machine of which nobody knows how busy it is."""
BROKEN = {
    "crashing": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "hanging": "import time\ntime.sleep(3600)",
    "raising": "raise RuntimeError('first line\\nsecond line')",
    "leaving": "raise SystemExit('no licence')",
    "quitting": "import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos._exit(3)",
    "chatty": "print('hello from a package')",
    "unnamed": "import os\nos.kill(os.getpid(), 40)",
    "garbling": "import os\nos.write(2, b'no \\xff text')\nos._exit(4)",
}


@pytest.fixture
def _broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("_broken_packages")
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("crashing", "it crashes (SIGSEGV)"),
        ("raising", "RuntimeError: first line"),
        ("leaving", "SystemExit: no licence"),
        ("quitting", "out of luck"),
        ("unnamed", "it crashes (signal 40)"),
        ("garbling", "no \ufffd text"),
        ("absent_module", "ModuleNotFoundError: No module named 'absent_module'"),
    ],
)
def test_a_module_that_cannot_be_imported(module: str, said: str) -> None:
    with pytest.raises(Failure, match=r".") as caught:
        run_examination("import", module, timeout=PATIENCE)
    assert str(caught.value) == said


@pytest.mark.usefixtures("_broken_packages")
def test_a_module_that_hangs_is_given_up() -> None:
    with pytest.raises(Failure, match="no answer in 1 s"):
        run_examination("import", "hanging", timeout=1)


@pytest.mark.usefixtures("_broken_packages")
def test_what_a_module_prints_is_no_answer() -> None:
    assert run_examination("import", "chatty", timeout=PATIENCE) == {}


def test_a_file_in_the_working_directory_is_not_what_is_imported() -> None:
    Path("json.py").write_text("raise RuntimeError('the wrong file')")
    try:
        assert run_examination("import", "json", timeout=PATIENCE) == {}
    finally:
        Path("json.py").unlink()


def test_secrets_are_taken_out() -> None:
    said = redact("GET https://user:secret@hub.example/x with hf_abcDEF123 failed")
    assert said == "GET https://hub.example/x with hf_... failed"
