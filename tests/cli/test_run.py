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
