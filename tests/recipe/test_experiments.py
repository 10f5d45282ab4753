"""Recipes: what they say is what is read, and everything else is a named error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from voidprune.errors import RecipeError
from voidprune.execution.sampling import Sampling
from voidprune.profiling.layouts import HubData
from voidprune.recipe import DataSource, parse_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def document(**changes: Any) -> dict[str, Any]:
    whole = {
        "schema": "voidprune.recipe/1",
        "kind": "adaptive-evaluation",
        "model": "demo",
        "alphas": [0.8],
        "modes": ["readout"],
        "max_new_tokens": 5,
        "datasets": {"mmlu": {"layout": "mmlu", "file": "mmlu.jsonl"}},
        "setups": {"fair": {"options": "shuffled", "scoring": "log-likelihood"}},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


def parse(**changes: Any) -> Any:
    return parse_recipe(document(**changes), place="r.yaml", folder=Path("/data"))


def test_a_small_recipe_has_defaults() -> None:
    recipe = parse()
    assert (recipe.dtype, recipe.batch_size, recipe.seed, recipe.limit) == ("fp32", 8, 0, None)
    assert recipe.datasets == {"mmlu": DataSource("mmlu", Path("/data/mmlu.jsonl"))}
    assert recipe.setups["fair"].sampling is None
    assert recipe.setups["fair"].arithmetic == "float32"


def test_json_of_a_recipe_is_the_recipe(tmp_path: Path) -> None:
    for path in [*sorted(RECIPES.glob("void-paper/*.yaml"))]:
        recipe = read_recipe(path)
        (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_document()))
        assert read_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_the_paper_s_recipes_say_what_was_published(name: str, model: str) -> None:
    path = RECIPES / "void-paper" / f"{name}.yaml"
    recipe = read_recipe(path)
    assert (recipe.model, recipe.dtype, recipe.max_new_tokens, recipe.modes) == (model, "bf16", 50, ("readout", "mask"))
    assert 0.8 in recipe.alphas
    assert {name: source.source for name, source in recipe.datasets.items()} == {
        "mmlu": HubData("cais/mmlu", "test", "all"),
        "gpqa": HubData("Idavidrein/gpqa", "train", "gpqa_diamond"),
        "boolq": HubData("google/boolq", "validation"),
    }
    published, fair = recipe.setups["published"], recipe.setups["fair"]
    assert (published.options, published.scoring, published.arithmetic) == ("file", "generate", "model")
    assert published.sampling == Sampling(0.6, 0.9, seed=recipe.seed)
    assert (fair.options, fair.scoring, fair.sampling) == ("shuffled", "log-likelihood", None)
    assert recipe.setups["fair-greedy"].sampling is None
    text = path.read_text()
    assert text.index("WHEN TO USE IT") < text.index("WHAT THE PAPER REPORTS") < text.index("WHAT TO EXPECT")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": ...}, "r.yaml lacks schema"),
        ({"schema": "voidprune.recipe/2"}, "r.yaml has the schema 'voidprune.recipe/2'"),
        ({"schema": "voidprune.profile/1"}, "r.yaml has the schema 'voidprune.profile/1'"),
        ({"schema": 1}, "r.yaml: schema is not a text"),
        ({"kind": "dance"}, "r.yaml: kind is 'dance'"),
        ({"kind": ["adaptive-evaluation"]}, "r.yaml: kind is"),
        ({"kind": ...}, "r.yaml lacks kind"),
        ({"model": ...}, "r.yaml lacks model"),
        ({"model": ""}, "r.yaml: model is not a text"),
        ({"aplhas": [1]}, "r.yaml has unknown keys: aplhas"),
        ({"dtype": "int4"}, "r.yaml: dtype is 'int4'"),
        ({"alphas": []}, "r.yaml: alphas is not a list of one value or more"),
        ({"alphas": 0.8}, "r.yaml: alphas is not a list"),
        ({"alphas": [0.8, -1]}, "r.yaml: alphas, entry 2 is not a number from 0 up"),
        ({"alphas": [float("nan")]}, "r.yaml: alphas, entry 1 is not a number"),
        ({"alphas": [float("inf")]}, "r.yaml: alphas, entry 1 is not a number"),
        ({"alphas": [True]}, "r.yaml: alphas, entry 1 is not a number"),
        ({"alphas": [1, 1.0]}, "r.yaml: alphas says a value twice"),
        ({"modes": ["static"]}, "r.yaml: modes, entry 1 is 'static'"),
        ({"max_new_tokens": 0}, "r.yaml: max_new_tokens is not a whole number from 1 up"),
        ({"max_new_tokens": 2.5}, "r.yaml: max_new_tokens is not a whole number"),
        ({"batch_size": True}, "r.yaml: batch_size is not a whole number"),
        ({"seed": "x"}, "r.yaml: seed is not a whole number"),
        ({"datasets": {}}, "r.yaml: datasets is empty"),
        ({"datasets": ["mmlu"]}, "r.yaml: datasets is not a mapping"),
        ({"datasets": {"../x": {"layout": "mmlu", "file": "f"}}}, "r.yaml: datasets: '../x' is no name"),
        ({"datasets": {3: {"layout": "mmlu", "file": "f"}}}, "r.yaml: datasets is not a mapping of names"),
        ({"datasets": {"m": {"layout": "arc", "file": "f"}}}, "r.yaml: datasets: m: layout is 'arc'"),
        ({"datasets": {"m": {"layout": "mmlu"}}}, "r.yaml: datasets: m lacks hub"),
        ({"datasets": {"m": {"layout": "mmlu", "hub": "x/y"}}}, "r.yaml: datasets: m lacks split"),
        ({"datasets": {"m": {"layout": "mmlu", "file": "f", "hub": "x/y"}}}, "datasets: m has unknown keys: hub"),
        ({"setups": {"s": {"options": "none", "scoring": "generate"}}}, "setups: s: options is 'none'"),
        ({"setups": {"s": {"options": "file", "scoring": "guess"}}}, "setups: s: scoring is 'guess'"),
        ({"setups": {"s": {"options": "file", "scoring": "generate", "top_p": 0.9}}}, "setups: s: top_p needs a temp"),
        (
            {"setups": {"s": {"options": "file", "scoring": "generate", "temperature": 0}}},
            "setups: s: a temperature of 0",
        ),
        ({"setups": {"s": {"options": "file", "scoring": "generate", "static": 1}}}, "s: static is not true or false"),
        (
            {"setups": {"s": {"options": "file", "scoring": "generate", "temperature": 1, "top_p": 2}}},
            "setups: s: a top-p of 2 is outside",
        ),
        (
            {"setups": {"s": {"options": "file", "scoring": "log-likelihood", "temperature": 1}}},
            "setups: s: log-likelihoods are not sampled",
        ),
        (
            {"setups": {"s": {"options": "file", "scoring": "generate", "temperature": 1, "static": True}}},
            "setups: s: a static schedule answers greedily",
        ),
    ],
)
def test_a_wrong_recipe_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(**changes)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a mapping"),
        (b"- 1", "is not a mapping"),
        (b"a: b: c", "is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is not YAML"),
        (b"a: 2001-99-99", "is not YAML"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "r.yaml")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        read_recipe(tmp_path / "absent.yaml")


def test_data_files_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document()))
    assert read_recipe(tmp_path / "r.yaml").datasets["mmlu"].source == tmp_path / "mmlu.jsonl"
