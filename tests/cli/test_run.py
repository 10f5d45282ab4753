"""`voidprune run` as a user meets it: the paper's recipe on the demo model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import expect_error, invoke

RECIPE = Path(__file__).parents[2] / "recipes" / "void-paper" / "qwen2.5-7b-instruct.yaml"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "boolq.jsonl"
    record = {"question": "does ann like tea", "passage": "Ann likes tea.", "answer": True}
    path.write_text(f"{json.dumps(record)}\n" * 3)
    return path


def test_the_paper_s_recipe_on_the_demo_model(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "out"
    options = ("--model", "demo", "--dtype", "fp32", "--limit", 1, "--alpha", 0.8, "--batch-size", 2, "-q")
    arguments = ("run", RECIPE, "-o", output, "--data", f"boolq={data}", *options)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line.startswith("wrote")] == [
        f"wrote {output / f'boolq-{setup}.json'}" for setup in ("published", "fair", "fair-greedy")
    ]
    recipe = json.loads((output / "recipe.json").read_bytes())
    assert (recipe["model"], recipe["limit"], recipe["alphas"], recipe["batch_size"]) == ("demo", 1, [0.8], 2)
    assert recipe["datasets"] == {"boolq": {"layout": "boolq", "file": str(data)}}
    again = invoke(*arguments)
    assert again.exit_code == 0
    assert again.stdout == result.stdout.replace("wrote", "kept")
    other = (value if value != 0.8 else 0.5 for value in arguments)
    expect_error(*other, message="holds the results of another recipe")


@pytest.mark.parametrize("entry", ["boolq", "boolq=", "arc=f.jsonl"])
def test_data_is_named(tmp_path: Path, entry: str) -> None:
    result = invoke("run", RECIPE, "-o", tmp_path / "out", "--data", entry)
    assert result.exit_code == 2
    assert "give NAME=FILE with one of mmlu, gpqa, boolq" in result.stderr


def test_alpha_is_a_number(tmp_path: Path) -> None:
    result = invoke("run", RECIPE, "-o", tmp_path / "out", "--alpha", "nan")
    assert result.exit_code == 2
    assert "--alpha is not a number" in result.stderr


def test_bad_recipes_and_data_are_named(tmp_path: Path) -> None:
    expect_error("run", tmp_path / "absent.yaml", "-o", tmp_path / "out", message="cannot read")
    (tmp_path / "r.yaml").write_text(RECIPE.read_text() + "\nalpha: 0.8\n")
    expect_error("run", tmp_path / "r.yaml", "-o", tmp_path / "out", message="has unknown keys: alpha")
    absent = f"boolq={tmp_path / 'absent.jsonl'}"
    expect_error("run", RECIPE, "-o", tmp_path / "out", "--data", absent, message="cannot read")


COMPRESSION = Path(__file__).parents[2] / "recipes" / "compression" / "demo.yaml"


def test_a_dry_run_prints_the_steps_and_writes_nothing(tmp_path: Path) -> None:
    result = invoke("run", COMPRESSION, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["profile", "plan", "heal", "evaluate", "export", "bench", "report"]
    assert lines[0].split(maxsplit=3) == ["profile", "run", "profile.json", "not done yet"]
    assert lines[2].split(maxsplit=3) == ["heal", "run", "healed", "schedule.json will be new"]
    assert not (tmp_path / "out").exists()


def test_a_compression_runs_and_is_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "schema: voidprune.recipe/1\nkind: compression\nmodel: demo\n"
        "data: {dataset: demo, num_samples: 2, responses: dataset}\n"
        "plan: {keep: 0.75, criterion: last-n}\nbench: false\n"
        "evaluate: {tasks: yes-no, num_items: 2, max_new_tokens: 4}\n"
    )
    arguments = ("run", recipe, "-o", tmp_path / "out", "-q")
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    steps = ["profile", "plan", "evaluate", "export", "report"]
    assert [line.split()[0] for line in first.stdout.splitlines()] == steps
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    again = invoke(*arguments)
    assert [line.split()[:2] for line in again.stdout.splitlines()] == [[step, "kept"] for step in steps]
    other = invoke(*arguments, "--rerun", "export")
    assert [line.split()[1] for line in other.stdout.splitlines()][:3] == ["kept"] * 3
    expect_error(*arguments, "--rerun", "bench", message="there is no step 'bench'")


@pytest.mark.parametrize("option", [("--limit", 3), ("--alpha", 0.5), ("--data", "a=b"), ("--overwrite",)])
def test_options_of_experiments_are_refused_for_a_compression(tmp_path: Path, option: tuple[object, ...]) -> None:
    result = invoke("run", COMPRESSION, "-o", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert f"{option[0]} does not go with a recipe of this kind" in result.stderr


@pytest.mark.parametrize("option", [("--dry-run",), ("--rerun", "plan")])
def test_options_of_compressions_are_refused_for_an_experiment(tmp_path: Path, option: tuple[object, ...]) -> None:
    result = invoke("run", RECIPE, "-o", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert f"{option[0]} does not go with a recipe of this kind" in result.stderr
