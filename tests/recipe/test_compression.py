"""Recipes of compressions: defaults, every key, what is refused, and those that come with voidprune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from voidprune.errors import RecipeError
from voidprune.planning.budgets import Budget
from voidprune.recipe import CompressionRecipe, parse_recipe, read_recipe
from voidprune.recipe.compression import BenchPart, DataPart, EvaluationPart, ExportPart, HealPart, PlanPart

RECIPES = Path(__file__).parents[2] / "recipes" / "compression"


def parse(**changes: Any) -> CompressionRecipe:
    whole = {"schema": "voidprune.recipe/1", "kind": "compression", "model": "demo", "plan": {"keep": 0.5}}
    document = {key: value for key, value in {**whole, **changes}.items() if value is not ...}
    recipe = parse_recipe(document, place="r.yaml", folder=Path("/data"))
    assert isinstance(recipe, CompressionRecipe)
    return recipe


def test_a_small_recipe_has_defaults() -> None:
    assert parse() == CompressionRecipe(model="demo", plan=PlanPart(Budget(keep_prefill=0.5, keep_decode=0.5)))


def test_every_key_is_read() -> None:
    recipe = parse(
        dtype="bf16",
        device="cuda:1",
        seed=3,
        alpha=0.5,
        data={"dataset": "p.jsonl", "num_samples": 9, "responses": "dataset", "max_new_tokens": 7, "batch_size": 2},
        plan={
            "keep_prefill": 0.5,
            "keep_decode": 0.75,
            "max_bytes": "700MB",
            "max_kv_bytes_per_token": 2048,
            "max_prefill_flops": "2T",
            "max_decode_bytes": "1GiB",
            "protect": [0, 1],
            "drop_layers": "7-9",
            "phases": "split",
            "criterion": "search-task",
            "boundary": "prefill",
            "single_turn": True,
            "search_evaluations": 40,
            "judging": "/elsewhere/j.jsonl",
            "num_judging": 11,
        },
        heal={"methods": ["linear", "distill"], "dataset": "demo", "num_samples": 99, "distill": {"steps": 5}},
        evaluate={"tasks": "i.jsonl", "num_items": 4, "max_new_tokens": 8, "min_score": 0.5, "max_ppl_ratio": 1.5},
        export={
            "formats": ["onnx"],
            "precision": "int4",
            "operators": "standard",
            "block_size": 128,
            "activations": "fp32",
            "zero_points": True,
            "rounding": "gptq",
            "kv_cache": "int8",
        },
        bench={"prompt_length": 5, "num_new_tokens": 6, "num_rounds": 7},
    )
    budget = Budget(
        keep_prefill=0.5,
        keep_decode=0.75,
        max_bytes=700_000_000,
        max_kv_bytes_per_token=2048,
        max_prefill_flops=2 * 10**12,
        max_decode_bytes=2**30,
        protected=frozenset({0, 1}),
        dropped=frozenset({7, 8, 9}),
    )
    assert recipe == CompressionRecipe(
        model="demo",
        dtype="bf16",
        device="cuda:1",
        seed=3,
        alpha=0.5,
        data=DataPart("/data/p.jsonl", 9, "dataset", 7, 2),
        plan=PlanPart(
            budget,
            criterion="search-task",
            boundary="prefill",
            single_turn=True,
            search_evaluations=40,
            judging="/elsewhere/j.jsonl",
            num_judging=11,
        ),
        heal=HealPart(("linear", "distill"), "demo", 99, {"steps": 5}),
        evaluation=EvaluationPart("/data/i.jsonl", 4, 8, 0.5, 1.5),
        export=ExportPart(("onnx",), "int4", "standard", 128, True, "fp32", "gptq", "int8"),
        bench=BenchPart(5, 6, 7),
    )


def test_a_benchmark_can_be_left_out() -> None:
    assert parse(bench=False).bench is None
    assert parse(bench={}).bench == BenchPart()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": ...}, "r.yaml lacks plan"),
        ({"colour": "red"}, "r.yaml has unknown keys: colour"),
        ({"plan": {"keep": 0.5, "kep": 1}}, "r.yaml: plan has unknown keys: kep"),
        ({"plan": {"keep": 0.5, "keep_decode": 1}}, "r.yaml: plan has unknown keys: keep_decode"),
        ({"plan": {"keep": 2}}, "a keep ratio of 2 is outside"),
        ({"plan": {"max_bytes": "many"}}, "r.yaml: plan: max_bytes: 'many' is no amount"),
        ({"plan": {"protect": "first"}}, "r.yaml: plan: protect: 'first' is no list of layers"),
        ({"plan": {"criterion": "taste"}}, "r.yaml: plan: criterion is 'taste'"),
        ({"heal": {}}, "r.yaml: heal lacks methods"),
        ({"heal": {"methods": ["prayer"]}}, "methods, entry 1 is 'prayer'"),
        ({"heal": {"methods": ["distill"], "distill": {"steps": [1]}}}, "distill is not a mapping of names to numbers"),
        ({"bench": True}, "r.yaml: bench is not a mapping"),
        ({"evaluate": {"max_ppl_ratio": 0.5}}, "max_ppl_ratio is not a number from 1 up"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"export": {"precision": "int3"}}, "export: precision is 'int3'"),
        ({"export": {"precision": "int4", "block_size": 64}}, "export: block_size is 64"),
        ({"export": {"precision": "int4", "rounding": "up"}}, "export: rounding is 'up'"),
        ({"export": {"kv_cache": "int4"}}, "export: kv_cache is 'int4'"),
        ({"export": {"precision": "fp16", "rounding": "gptq"}}, "rounding are of packed matrices; fp16 has none"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(**changes)
    assert message in caught.value.message


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_read_and_say_what_to_expect(path: Path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, CompressionRecipe)
    assert recipe.heal is not None
    text = path.read_text()
    assert "WHEN TO USE IT" in text
    assert "WHAT TO EXPECT" in text
    assert f"voidprune run recipes/compression/{path.name}" in text


def test_there_are_recipes_for_the_models_that_people_have() -> None:
    models = {read_recipe(path).model for path in RECIPES.glob("*.yaml")}
    assert models == {
        "demo",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
    }
