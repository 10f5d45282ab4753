"""Recipes of the main job: which model, on which data, how small, healed how, exported as what: the commands' options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from voidprune.errors import BudgetError, RecipeError
from voidprune.execution.kv_cache import KV_CACHES
from voidprune.models.packed import ACTIVATIONS, BLOCK_SIZES, PACKED_PRECISIONS, ROUNDINGS
from voidprune.planning.budgets import Budget, parse_amount, parse_layers
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.search import GOALS, SEARCHES
from voidprune.recipe.sections import Section, boolean, integer, list_of, number, one_of, text

HEALING_METHODS = ("linear", "distill")
PRECISION_NAMES = ("keep", "fp32", "fp16", "bf16", *PACKED_PRECISIONS)


@dataclass(frozen=True)
class DataPart:
    """What the model is shown when it is profiled, searched and healed, unless a part has a `dataset` of its own.

    `dataset` is a file, a generated task, or None for the prompts that ship with the package.
    """

    dataset: str | None = None
    num_samples: int | None = None
    responses: str = "generate"
    max_new_tokens: int = 64
    batch_size: int = 16


@dataclass(frozen=True)
class PlanPart:
    """How layers are chosen: the options of `voidprune plan`. `judging` is a dataset to judge by."""

    budget: Budget
    criterion: str | None = None
    goal: str | None = None
    max_loss: float | None = None
    boundary: str = "decode"
    single_turn: bool = False
    search_evaluations: int | None = None
    judging: str | None = None
    num_judging: int | None = None


@dataclass(frozen=True)
class HealPart:
    """How weights are healed: the options of `voidprune heal`. `settings` are those of distillation."""

    methods: tuple[str, ...]
    dataset: str | None = None
    num_samples: int | None = None
    settings: Mapping[str, int | float | str] | None = None


@dataclass(frozen=True)
class EvaluationPart:
    """What quality is measured on, and what it must be for anything to be exported."""

    tasks: str = "demo"
    num_items: int | None = None
    max_new_tokens: int = 64
    min_score: float | None = None
    max_ppl_ratio: float | None = None


@dataclass(frozen=True)
class ExportPart:
    """What is written: the options of `voidprune export`. No `formats`: all that the family has.

    `block_size`, `zero_points`, `activations` and `rounding` are of packed matrices; `kv_cache` is how graphs hold keys and values.
    """

    formats: tuple[str, ...] = ()
    precision: str = "keep"
    operators: str = "ort"
    block_size: int = 32
    zero_points: bool = False
    activations: str | None = None
    rounding: str = "nearest"
    kv_cache: str = "keep"


@dataclass(frozen=True)
class BenchPart:
    """How it is timed: the options of `voidprune bench`."""

    prompt_length: int = 128
    num_new_tokens: int = 32
    num_rounds: int = 15


@dataclass(frozen=True)
class CompressionRecipe:
    """Profile, plan, heal, evaluate, export, bench, report. A part that is None is left out."""

    model: str
    plan: PlanPart
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    alpha: float = 0.8
    data: DataPart = DataPart()
    heal: HealPart | None = None
    evaluation: EvaluationPart = EvaluationPart()
    export: ExportPart = ExportPart()
    bench: BenchPart | None = BenchPart()


def read_compression(section: Section, folder: Path) -> CompressionRecipe:
    """Files are looked for from `folder`. Raises RecipeError."""
    dataset = _dataset(folder)
    recipe = CompressionRecipe(
        model=section.take("model", text),
        plan=section.take("plan", _part(lambda part: _read_plan(part, dataset))),
        dtype=section.take_optional("dtype", one_of(("fp32", "fp16", "bf16"))),
        device=section.take_optional("device", text),
        seed=section.take("seed", integer(None), default=0),
        alpha=section.take("alpha", number(0), default=0.8),
        data=section.take("data", _part(lambda part: _read_data(part, dataset)), default=DataPart()),
        heal=section.take_optional("heal", _part(lambda part: _read_heal(part, dataset))),
        evaluation=section.take(
            "evaluate", _part(lambda part: _read_evaluation(part, dataset)), default=EvaluationPart()
        ),
        export=section.take("export", _part(_read_export), default=ExportPart()),
        bench=_read_bench(section),
    )
    section.finish()
    return recipe


def _part(read: Callable[[Section], Any]) -> Callable[[Any, str], Any]:
    def read_all(value: Any, place: str) -> Any:
        section = Section(value, place)
        found = read(section)
        section.finish()
        return found

    return read_all


def _dataset(folder: Path) -> Callable[[Any, str], str]:
    """A task by its name, or a file beside the recipe by its absolute path."""

    def read(value: Any, place: str) -> str:
        name = text(value, place)
        return str((folder / name).absolute()) if "." in name or "/" in name else name

    return read


def _read_data(part: Section, dataset: Callable[[Any, str], str]) -> DataPart:
    return DataPart(
        dataset=part.take_optional("dataset", dataset),
        num_samples=part.take_optional("num_samples", integer(2)),
        responses=part.take("responses", one_of(("generate", "dataset")), default="generate"),
        max_new_tokens=part.take("max_new_tokens", integer(1), default=64),
        batch_size=part.take("batch_size", integer(1), default=16),
    )


def _read_plan(part: Section, dataset: Callable[[Any, str], str]) -> PlanPart:
    keep = part.take_optional("keep", number(0))
    limits = [field.name for field in fields(Budget) if field.name.startswith("max_")]
    try:
        budget = Budget(
            keep_prefill=part.take_optional("keep_prefill", number(0)) if keep is None else keep,
            keep_decode=part.take_optional("keep_decode", number(0)) if keep is None else keep,
            **{name: part.take_optional(name, _amount) for name in limits},
            protected=part.take("protect", _layers, default=frozenset()),
            dropped=part.take("drop_layers", _layers, default=frozenset()),
            shared=part.take("phases", one_of(("split", "shared")), default="split") == "shared",
        )
    except BudgetError as error:
        raise RecipeError(f"{part.place}: {error.message}", hint=error.hint) from error
    return PlanPart(
        budget=budget,
        criterion=part.take_optional("criterion", one_of((*CRITERIA, *SEARCHES))),
        goal=part.take_optional("goal", one_of(tuple(GOALS))),
        max_loss=part.take_optional("max_loss", number(0)),
        boundary=part.take("boundary", one_of(("decode", "prefill")), default="decode"),
        single_turn=part.take("single_turn", boolean, default=False),
        search_evaluations=part.take_optional("search_evaluations", integer(1)),
        judging=part.take_optional("judging", dataset),
        num_judging=part.take_optional("num_judging", integer(1)),
    )


def _amount(value: Any, place: str) -> int:
    try:
        return parse_amount(str(value))
    except BudgetError as error:
        raise RecipeError(f"{place}: {error.message}", hint=error.hint) from error


def _layers(value: Any, place: str) -> frozenset[int]:
    written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        return parse_layers(written)
    except BudgetError as error:
        raise RecipeError(f"{place}: {error.message}", hint=error.hint) from error


def _read_heal(part: Section, dataset: Callable[[Any, str], str]) -> HealPart:
    return HealPart(
        methods=part.take("methods", list_of(one_of(HEALING_METHODS))),
        dataset=part.take_optional("dataset", dataset),
        num_samples=part.take_optional("num_samples", integer(2)),
        settings=part.take_optional("distill", _settings),
    )


def _settings(value: Any, place: str) -> dict[str, int | float | str]:
    if not isinstance(value, dict) or not all(type(one) in (int, float, str) for one in value.values()):
        raise RecipeError(f"{place} is not a mapping of names to numbers and texts")
    return dict(value)


def _read_evaluation(part: Section, dataset: Callable[[Any, str], str]) -> EvaluationPart:
    return EvaluationPart(
        tasks=part.take("tasks", dataset, default="demo"),
        num_items=part.take_optional("num_items", integer(1)),
        max_new_tokens=part.take("max_new_tokens", integer(1), default=64),
        min_score=part.take_optional("min_score", number(0)),
        max_ppl_ratio=part.take_optional("max_ppl_ratio", number(1)),
    )


def _read_export(part: Section) -> ExportPart:
    found = ExportPart(
        formats=part.take("formats", list_of(one_of(("hf", "onnx"))), default=()),
        precision=part.take("precision", one_of(PRECISION_NAMES), default="keep"),
        operators=part.take("operators", one_of(("ort", "standard")), default="ort"),
        block_size=part.take("block_size", _block_size, default=32),
        zero_points=part.take("zero_points", boolean, default=False),
        activations=part.take_optional("activations", one_of(ACTIVATIONS)),
        rounding=part.take("rounding", one_of(ROUNDINGS), default="nearest"),
        kv_cache=part.take("kv_cache", one_of(KV_CACHES), default="keep"),
    )
    is_packed = found.precision in PACKED_PRECISIONS
    if not is_packed and found != ExportPart(found.formats, found.precision, found.operators, kv_cache=found.kv_cache):
        raise RecipeError(
            f"{part.place}: block_size, zero_points, activations and rounding are of packed matrices;"
            f" {found.precision} has none",
            hint=f"choose a precision of {', '.join(PACKED_PRECISIONS)}",
        )
    return found


def _block_size(value: Any, place: str) -> int:
    if type(value) is not int or value not in BLOCK_SIZES:
        raise RecipeError(f"{place} is {value!r}", hint=f"known here: {', '.join(map(str, BLOCK_SIZES))}")
    return value


def _read_bench(section: Section) -> BenchPart | None:
    """`bench: false`: no benchmark."""
    if section.switched_off("bench"):
        return None
    return section.take("bench", _part(_read_bench_part), default=BenchPart())


def _read_bench_part(part: Section) -> BenchPart:
    return BenchPart(
        prompt_length=part.take("prompt_length", integer(1), default=128),
        num_new_tokens=part.take("num_new_tokens", integer(2), default=32),
        num_rounds=part.take("num_rounds", integer(1), default=15),
    )
