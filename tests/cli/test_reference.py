"""docs/cli.md is what the commands say of themselves, and their examples are command lines that work."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.command_lines import parse_command
from tests.test_cli import COMMANDS
from voidprune.cli import main
from voidprune.cli.reference import read_help, render_reference
from voidprune.pipeline.tasks import task_rows

ROOT = Path(__file__).parents[2]
NEXT_COMMANDS = re.compile(r" (?:>|&&|\|) .*")  # what a shell does with the output


def examples(name: str) -> list[list[str]]:
    """The arguments of each example of a command, with the demo model where they say MODEL."""
    lines = [NEXT_COMMANDS.sub("", line) for line in read_help(main.commands[name]).examples]
    words = [shlex.split(line) for line in lines]
    assert all(line[0] == "voidprune" for line in words), lines
    return [["demo" if word == "MODEL" else word for word in line[1:]] for line in words]


def test_the_page_is_made_of_the_commands() -> None:
    found = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert found == render_reference(main), "make docs writes it anew"


def test_the_page_has_every_command_with_every_option() -> None:
    page = render_reference(main)
    sections = dict(re.findall(r"^## voidprune (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(COMMANDS) == sorted(main.commands)
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1] in sections[name]
        assert f"](#voidprune-{name})" in page


def test_exit_codes_come_first() -> None:
    page = render_reference(main)
    assert page.index("## Exit codes") < page.index("## Commands") < page.index("## voidprune bench")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [0, 1, 2, 3, 143]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    found = examples(name)
    assert any(arguments[0] == name for arguments in found), f"{name} has no example of its own"
    for command, *arguments in found:
        assert not parse_command(command, arguments).args


# What each example needs to be short, instead of minutes; a dry run or another test where it cannot be short.
QUICK = {
    "profile": ["--num-samples", "4", "--max-new-tokens", "6", "--device", "cpu"],
    "probe": ["--num-samples", "1", "--intervention", "freeze", "--depths", "9-11"],
    "compare": ["--scope", "decode", "--search-evaluations", "0", "--max-new-tokens", "4", "--responses", "dataset"],
    "heal": ["--max-new-tokens", "4"],
    "generate": ["--max-new-tokens", "4"],
    "eval": ["--max-new-tokens", "8", "--min-score", "0", "--max-ppl-ratio", "1000000"],
    "bench": [
        "--prompt-lengths",
        "4",
        "--context-lengths",
        "4",
        "--new-tokens",
        "2",
        "--rounds",
        "2",
        "--max-spread",
        "100",
    ],
    "run": ["--dry-run"],
}
IN_THEIR_ORDER = (
    "profile", "plan", "export", "show", "diff", "generate", "eval", "bench", "compare", "probe", "heal", "run",
    "families", "completion", "report",
)  # fmt: skip


def test_the_first_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but `demo`, which takes minutes (tests/test_walkthrough.py), and `doctor`, which judges the machine (test_doctor.py)."""
    assert sorted(IN_THEIR_ORDER) == sorted(set(COMMANDS) - {"demo", "doctor"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    rows = task_rows("demo", num_items=8)
    items = [
        {"prompt": row.messages[0]["content"], "response": row.response, "answer": row.answer, "task": row.group}
        for row in rows
    ]
    for name, some in {"prompts.jsonl": items, "items.jsonl": items[::4]}.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, some)))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for name in IN_THEIR_ORDER:
        arguments = [*examples(name)[0], *QUICK.get(name, [])]
        if name == "profile":
            arguments[1] = "demo"  # what it names is on the Hub
        if name == "diff":
            (tmp_path / "other.json").write_bytes((tmp_path / "schedule.json").read_bytes())
        if name == "report":
            arguments[1] = "."
        result = CliRunner().invoke(main, arguments, prog_name="voidprune", catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
        assert max(map(len, result.stdout.splitlines())) <= 80 or name in ("families", "completion", "run"), arguments
