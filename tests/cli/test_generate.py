"""`voidprune generate`: one answer or many, as text or JSON, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.test_cli import expect_error, invoke
from voidprune.cli import main
from voidprune.export.bundle import export_bundle
from voidprune.pipeline.models import open_model
from voidprune.schedule import full_schedule

FIRST, SECOND = "Sort from smallest to largest: 91, 97, 73", "Is 9 larger than 3?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("generate") / "bundle"
    model = open_model("demo")
    export_bundle(model, full_schedule(model.identity), target, verify=lambda _: None)
    return target


def answer(*arguments: object) -> str:
    result = invoke("generate", *arguments, "--provider", "cpu")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    return result.stdout


def test_several_prompts_are_answered_in_order(folder: Path, tmp_path: Path) -> None:
    alone = [answer(folder, "--prompt", text) for text in (FIRST, SECOND, FIRST)]
    together = "--- 1\n" + alone[0] + "--- 2\n" + alone[1] + "--- 3\n" + alone[2]
    prompts = [part for text in (FIRST, SECOND, FIRST) for part in ("--prompt", text)]
    assert answer(folder, *prompts) == together
    assert answer(folder, *prompts, "--batch-size", 2) == together
    assert answer("demo", *prompts) == together
    (tmp_path / "prompts.txt").write_text(f"{FIRST}\n\n{SECOND}\n\n{FIRST}\n")
    assert answer(folder, "--prompts", tmp_path / "prompts.txt") == together
    rows = [{"prompt": FIRST}, {"messages": [{"role": "user", "content": SECOND}]}, {"instruction": FIRST}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert answer(folder, "--prompts", tmp_path / "prompts.jsonl") == together
    documents = [json.loads(line) for line in answer(folder, *prompts, "--json").splitlines()]
    assert documents == [
        {"prompt": text, "response": said.removesuffix("\n"), "ended_by": "end token"}
        for text, said in zip((FIRST, SECOND, FIRST), alone, strict=True)
    ]


def test_a_prompt_from_standard_input(folder: Path) -> None:
    arguments = ["generate", str(folder), "--prompt", "-", "--provider", "cpu"]
    assert CliRunner().invoke(main, arguments, input=FIRST).stdout == answer(folder, "--prompt", FIRST)


def test_what_ends_an_answer(folder: Path) -> None:
    whole = json.loads(answer(folder, "--prompt", FIRST, "--json"))["response"]
    cut = json.loads(answer(folder, "--prompt", FIRST, "--json", "--max-new-tokens", 3))
    assert cut["ended_by"] == "length"
    assert whole.startswith(cut["response"])
    stopped = json.loads(answer(folder, "--prompt", FIRST, "--json", "--stop", ", 9", "--stop", "7,"))
    assert stopped["ended_by"] == "stopped"
    assert stopped["response"] == whole[: min(whole.index(", 9"), whole.index("7,") if "7," in whole else 99)]


def test_samples_follow_the_seed(folder: Path) -> None:
    hot = (folder, "--prompt", FIRST, "--temperature", 3)
    assert answer(*hot) == answer(*hot) == answer("demo", *hot[1:])
    assert len({answer(*hot, "--seed", seed) for seed in range(4)}) > 1
    assert answer(*hot, "--top-k", 1) == answer(folder, "--prompt", FIRST)
    assert answer(folder, "--prompt", FIRST, "--top-p", 0.0001) == answer(folder, "--prompt", FIRST)


def test_the_context_is_a_limit_before_anything_runs(folder: Path) -> None:
    long = "9, " * 300
    for model in (folder, "demo"):
        expect_error("generate", model, "--prompt", long, message="there is room for 512")
        expect_error("generate", model, "--prompt", FIRST, "--max-new-tokens", 600, message="may have 600")
    result = expect_error("generate", folder, "--prompt", FIRST, "--max-new-tokens", 600, message="there is room for")
    number = result.stderr.split()[-1]
    assert answer(folder, "--prompt", FIRST, "--max-new-tokens", number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt, --prompts and --chat"),
        (["--prompt", "x", "--chat"], "give one of"),
        (["--chat", "--json"], "--json does not go with --chat"),
        (["--prompt", "x", "--context", "9"], "--context goes with --chat"),
        (["--prompt", "x", "--stop", ""], "an empty text ends everything"),
        (["--prompt", "x", "--temperature", "0"], "--temperature"),
        (["--prompt", "x", "--temperature", "nan"], "a temperature of nan is no number above 0"),
        (["--prompt", "x", "--temperature", "inf"], "a temperature of inf is no number above 0"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], message: str) -> None:
    result = invoke("generate", "demo", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_show_verifies_every_file(folder: Path, tmp_path: Path) -> None:
    assert "all files are as they were exported" in invoke("show", folder, "--verify").stderr
    expect_error("show", tmp_path, "--verify", message="is not a bundle")
