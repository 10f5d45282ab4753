"""What shells are offered, asked for in the way that their scripts ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import COMMANDS, invoke
from voidprune.demo.tasks import TASKS
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.search import SEARCHES

ROOT = Path(__file__).parents[2]
PROGRAM = "from voidprune.cli import main; main(prog_name='voidprune')"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("slim/config.json", "pictures/a.png", "profile.json", "items.jsonl", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B").mkdir(parents=True)
    return tmp_path


def offered(folder: Path, *words: str) -> list[str]:
    """`type,value` of each completion of the last word, as bash gets them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "COMP_WORDS": " ".join(("voidprune", *words)),
            "COMP_CWORD": str(len(words)),
            "_VOIDPRUNE_COMPLETE": "bash_complete",
            "HF_HUB_CACHE": str(folder / "hub"),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def plain(*names: str) -> list[str]:
    return [f"plain,{name}" for name in names]


def test_commands_and_options(folder: Path) -> None:
    assert sorted(offered(folder, "")) == sorted(plain(*COMMANDS))
    assert offered(folder, "pro") == plain("probe", "profile")
    assert offered(folder, "show", "--ver") == plain("--verify")


def test_criteria(folder: Path) -> None:
    assert offered(folder, "plan", "x", "--criterion", "") == plain(*CRITERIA, *SEARCHES)
    assert offered(folder, "plan", "x", "--criterion", "search-") == plain("search-loss", "search-task")


def test_models(folder: Path) -> None:
    assert offered(folder, "profile", "") == plain("demo", "slim", "Qwen/Qwen2.5-0.5B")
    assert offered(folder, "export", "Q") == plain("Qwen/Qwen2.5-0.5B")
    assert offered(folder, "eval", "slim", "--baseline", "d") == plain("demo")
    assert offered(folder, "heal", "/elsewhere/m") == ["dir,/elsewhere/m"]
    assert offered(folder, "plan", "") == plain("demo", "slim", "profile.json", "Qwen/Qwen2.5-0.5B")


def test_tasks_and_files(folder: Path) -> None:
    everything = plain("demo", *TASKS, "capitals", "items.jsonl", "notes.txt")
    for words in (("eval", "slim", "--tasks"), ("probe", "demo", "--tasks"), ("compare", "demo", "--dataset")):
        assert offered(folder, *words, "") == everything
    assert offered(folder, "eval", "slim", "--tasks", "so") == plain("sorting")
    assert offered(folder, "eval", "slim", "--tasks", "data/") == ["file,data/"]
    assert offered(folder, "show", "p") == ["file,p"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_ask_this_program(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0, result.output
    assert "_VOIDPRUNE_COMPLETE" in result.stdout
    assert f"{shell}_complete" in result.stdout
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=result.stdout, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_bash_takes_the_script(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "voidprune"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    script = invoke("completion", "bash").stdout + (
        '\nCOMP_WORDS=(voidprune pla); COMP_CWORD=1\n_voidprune_completion voidprune\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc"],
        input=script,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["plan"]


def test_other_shells_are_a_usage_error() -> None:
    assert invoke("completion", "tcsh").exit_code == 2
