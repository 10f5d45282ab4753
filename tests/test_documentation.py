"""The README's commands work as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from voidprune.cli import main
from voidprune.models.families import FAMILIES
from voidprune.pipeline.tasks import task_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every line of a shell block that calls voidprune, and the one in the running text."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("voidprune ")]
    lines += [found for found in re.findall(r"`(voidprune export [^`]+)`", README) if "MODEL" in found]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = task_rows("demo", num_items=6)
    items = [
        json.dumps(
            {"prompt": row.messages[0]["content"], "response": row.response, "answer": row.answer, "task": row.group}
        )
        for row in rows
    ]
    for name in ("prompts.jsonl", "items.jsonl"):
        (tmp_path / name).write_text("\n".join(items))
    training = [row.messages[0]["content"] for row in task_rows("yes-no", num_items=30, split="training")]
    (tmp_path / "training.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in training))
    found = commands()
    assert len(found) >= 8
    for arguments in found:
        arguments = ["demo" if argument == "MODEL" else argument for argument in arguments]
        if "-o" in arguments and (tmp_path / arguments[arguments.index("-o") + 1]).exists():
            arguments.append("--overwrite")
        if "--goal" in arguments:
            arguments += ["--max-loss", "0.9"]  # three items a task to judge by cannot show that less is lost
        if arguments[0] == "run":  # minutes of work: tests/pipeline/test_compression.py runs a smaller one
            arguments[1] = str(ROOT / arguments[1])
            arguments.append("--dry-run")
        if "distill" in arguments:
            arguments += ["--steps", "4"]
        result = CliRunner().invoke(main, arguments, prog_name="voidprune", catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"


def test_the_table_of_families_is_true() -> None:
    rows = re.findall(r"^\| (`.*) \| yes \| (yes|no) \|$", README, re.MULTILINE)
    found = {name: graphs for names, graphs in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == {model_type: "yes" if "onnx" in spec.formats else "no" for model_type, spec in FAMILIES.items()}


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
