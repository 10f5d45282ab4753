"""The recipes that come with voidprune, run as they are on small models of their families and small files of the same layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import build_model
from voidprune.errors import DatasetError, OutputError
from voidprune.pipeline.models import demo_folder
from voidprune.pipeline.recipes import Finished, run_recipe
from voidprune.recipe import AdaptiveRecipe, DataSource, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "void-paper"
RECORDS: dict[str, list[dict[str, Any]]] = {
    "mmlu": [
        {"question": f"{number} + 1?", "subject": "s", "choices": ["0", str(number + 1), "50", "60"], "answer": 1}
        for number in range(3)
    ],
    "gpqa": [
        {
            "Question": f"Question {number}?",
            "Correct Answer": "iron",
            **{f"Incorrect Answer {wrong}": f"wood {wrong}" for wrong in (1, 2, 3)},
        }
        for number in range(3)
    ],
    "boolq": [
        {"question": "does ann like tea", "passage": f"Ann likes {what}.", "answer": what == "tea"}
        for what in ("tea", "rice", "soup")
    ],
}

Load = Callable[..., AdaptiveRecipe]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A recipe with a small model of its own family, the demo's tokenizer, local data, and less of everything."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def make(recipe: str, family: str, *datasets: str, **changes: Any) -> AdaptiveRecipe:
        model = folder / family
        if not model.exists():
            build_model(family, model, vocab_size=606, bos_token_id=1, eos_token_id=4, max_position_embeddings=512)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(demo_folder() / name, model / name)
        loaded = read_recipe(RECIPES / f"{recipe}.yaml")
        sources = {name: DataSource(loaded.datasets[name].layout, folder / f"{name}.jsonl") for name in datasets}
        small = {"model": str(model), "alphas": (0.8,), "max_new_tokens": 6, "limit": 2, "datasets": sources}
        return replace(loaded, **{**small, **changes})

    return make


def run(recipe: AdaptiveRecipe, folder: Path, **options: Any) -> list[Finished]:
    return list(run_recipe(recipe, folder, **options))


@pytest.mark.parametrize(
    ("name", "family", "dataset"),
    [
        ("llama-3-8b-instruct", "llama", "mmlu"),
        ("mistral-7b-instruct-v0.3", "mistral", "gpqa"),
        ("qwen2.5-7b-instruct", "qwen2", "boolq"),
    ],
)
def test_the_recipe_of_each_family(load: Load, tmp_path: Path, name: str, family: str, dataset: str) -> None:
    """In bf16, as the recipe says, with every set-up."""
    recipe = load(name, family, dataset)
    finished = run(recipe, tmp_path / "out")
    assert [one.file.name for one in finished] == [f"{dataset}-{setup}.json" for setup in recipe.setups]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["recipe.json", *(one.file.name for one in finished)]
    )
    assert read_recipe(tmp_path / "out" / "recipe.json") == recipe
    published, fair, greedy = (one.document for one in finished)
    assert published["settings"]["sampling"] == {"temperature": 0.6, "top_p": 0.9, "top_k": None, "seed": 0}
    assert published["settings"]["arithmetic"] == "model"
    assert [run["name"] for run in published["runs"][1:]] == ["readout", "fixed readout", "mask", "random layers"]
    assert "static, as mask" in [run["name"] for run in fair["runs"]]
    assert set(fair["runs"][0]["usage"]) == {"scored"}
    assert set(greedy["runs"][0]["usage"]) == {"generated"}
    labels = {"True", "False"} if dataset == "boolq" else set("ABCD")
    for document in (published, fair, greedy):
        assert (document["dtype"], document["num_samples"]) == ("bf16", 2)
        for one in document["runs"]:
            assert set(one["answers"][dataset]) <= labels | {"none"}
            assert one["accuracy"][dataset]["num_items"] == sum(one["answers"][dataset].values()) == 2


def test_a_run_goes_on_where_it_was_stopped(load: Load, tmp_path: Path) -> None:
    recipe = load("llama-3-8b-instruct", "llama", "mmlu", "boolq", modes=("readout",), max_new_tokens=3, limit=1)
    recipe = replace(recipe, setups={name: recipe.setups[name] for name in ("published", "fair")})
    whole = run(recipe, tmp_path / "whole")
    steps = run_recipe(recipe, tmp_path / "stopped")
    first = next(steps)
    steps.close()
    assert [path.name for path in (tmp_path / "stopped").glob("*-*.json")] == [first.file.name]
    resumed = run(recipe, tmp_path / "stopped")
    assert [one.was_there for one in resumed] == [True] + [False] * 3
    for one, other in zip(whole, resumed, strict=True):
        assert other.file.name == one.file.name
        assert other.file.read_bytes() == one.file.read_bytes()


def test_other_data_is_measured_again(load: Load, tmp_path: Path) -> None:
    recipe = load("llama-3-8b-instruct", "llama", "mmlu", modes=("readout",), max_new_tokens=1)
    data = tmp_path / "data.jsonl"
    recipe = replace(recipe, datasets={"mmlu": DataSource("mmlu", data)}, setups={"fair": recipe.setups["fair"]})
    recipe = replace(recipe, setups={"fair": replace(recipe.setups["fair"], static=False)})
    data.write_text(json.dumps(RECORDS["mmlu"][0]))
    run(recipe, tmp_path / "out")
    assert [one.was_there for one in run(recipe, tmp_path / "out")] == [True]
    data.write_text(json.dumps(RECORDS["mmlu"][1]))
    assert [one.was_there for one in run(recipe, tmp_path / "out")] == [False]


def test_a_folder_belongs_to_one_recipe(load: Load, tmp_path: Path) -> None:
    recipe = load("llama-3-8b-instruct", "llama", "mmlu", modes=("readout",), max_new_tokens=1, limit=1)
    recipe = replace(recipe, setups={"published": recipe.setups["published"]})
    run(recipe, tmp_path / "out")
    other = replace(recipe, alphas=(0.3,))
    with pytest.raises(OutputError, match="holds the results of another recipe"):
        run(other, tmp_path / "out")
    (tmp_path / "out" / "notes.json").write_text("{}")
    other = replace(other, setups={"again": recipe.setups["published"]})
    (finished,) = run(other, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mmlu-again.json",
        "notes.json",
        "recipe.json",
    ]
    assert not finished.was_there
    assert [one["alpha"] for one in finished.document["runs"]] == [None, 0.3, 0.3]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="was not written by this command"):
        run(recipe, tmp_path / "mine", overwrite=True)


def test_missing_data_is_named_before_the_model_is_loaded(load: Load, tmp_path: Path) -> None:
    recipe = load("llama-3-8b-instruct", "llama", "mmlu", model="/nonexistent")
    recipe = replace(recipe, datasets={"mmlu": DataSource("mmlu", tmp_path / "absent.jsonl")})
    with pytest.raises(DatasetError, match=r"absent\.jsonl"):
        run(recipe, tmp_path / "out")
