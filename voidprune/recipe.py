"""What a user asks for, from YAML. A recipe says its schema and its kind; each kind is a frozen value and one reader.

    schema: voidprune.recipe/1
    kind: adaptive-evaluation

JSON is YAML, so `Recipe.to_document` written as JSON is a recipe, too. Nothing is run here and nothing is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from voidprune import artifacts
from voidprune.errors import RecipeError
from voidprune.execution.sampling import Sampling
from voidprune.profiling.layouts import LAYOUTS, TEXT_LAYOUTS, HubData

SCHEMA = artifacts.schema_key("recipe", 1)
INTERVENTIONS = ("random", "freeze", "skip-attention", "switch", "shuffle")
SCOPES = ("prompt", "published")
Value = TypeVar("Value")


@dataclass(frozen=True)
class DataSource:
    """A data set: the layout of its records (a key of `LAYOUTS`), and a split on the Hub or a local file."""

    layout: str
    source: HubData | Path

    def to_document(self) -> artifacts.Document:
        if isinstance(self.source, Path):
            return {"layout": self.layout, "file": str(self.source)}
        return {
            "layout": self.layout,
            "hub": self.source.path,
            "split": self.source.split,
            **({} if self.source.config is None else {"config": self.source.config}),
        }


@dataclass(frozen=True)
class Setup:
    """How questions are asked and answers read.

    `options`: "file" (as in the record; GPQA's right answer is then always the last) or "shuffled". `scoring`: "generate" or
    "log-likelihood". Without a `sampling` generation is greedy. `arithmetic`: LAC's, "float32" or "model". `static`: also run the
    schedule of the same mean use.
    """

    options: str
    scoring: str
    arithmetic: str
    sampling: Sampling | None
    static: bool

    def to_document(self) -> artifacts.Document:
        sampling = self.sampling
        return {
            "options": self.options,
            "scoring": self.scoring,
            "arithmetic": self.arithmetic,
            "static": self.static,
            **({} if sampling is None else {"temperature": sampling.temperature, "top_p": sampling.top_p}),
        }


@dataclass(frozen=True)
class AdaptiveRecipe:
    """LAC at run time on public benchmarks: every data set under every set-up, each a document of its own."""

    model: str
    dtype: str
    alphas: tuple[float, ...]
    modes: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    seed: int
    limit: int | None
    datasets: Mapping[str, DataSource]
    setups: Mapping[str, Setup]

    def to_document(self) -> artifacts.Document:
        return {
            "schema": SCHEMA,
            "kind": "adaptive-evaluation",
            "model": self.model,
            "dtype": self.dtype,
            "alphas": list(self.alphas),
            "modes": list(self.modes),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **({} if self.limit is None else {"limit": self.limit}),
            "datasets": {name: source.to_document() for name, source in self.datasets.items()},
            "setups": {name: setup.to_document() for name, setup in self.setups.items()},
        }


@dataclass(frozen=True)
class ProbeSource:
    """What a probe asks: a `task` by name, or text in a layout: a key of `TEXT_LAYOUTS`, or "rows", a calibration file."""

    max_new_tokens: int
    task: str | None = None
    layout: str = "rows"
    source: HubData | Path | None = None

    def to_document(self) -> artifacts.Document:
        length = {"max_new_tokens": self.max_new_tokens}
        if self.source is None:
            return {"task": self.task, **length}
        return {**DataSource(self.layout, self.source).to_document(), **length}


@dataclass(frozen=True)
class ProbeRecipe:
    """Interventions on earlier tokens' states at every depth (arXiv 2409.03621), a document a data set."""

    model: str
    dtype: str
    interventions: tuple[str, ...]
    scopes: tuple[str, ...]
    margin: float
    batch_size: int
    seed: int
    limit: int | None
    datasets: Mapping[str, ProbeSource]

    def to_document(self) -> artifacts.Document:
        return {
            "schema": SCHEMA,
            "kind": "probe",
            "model": self.model,
            "dtype": self.dtype,
            "interventions": list(self.interventions),
            "scopes": list(self.scopes),
            "margin": self.margin,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **({} if self.limit is None else {"limit": self.limit}),
            "datasets": {name: source.to_document() for name, source in self.datasets.items()},
        }


Recipe = AdaptiveRecipe | ProbeRecipe


class _Section:
    """A mapping of a recipe that is read key by key; `finish` refuses what nobody asked for. `place` is for errors."""

    def __init__(self, value: Any, place: str) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RecipeError(f"{place} is not a mapping of names to values")
        self._values = value
        self._asked: set[str] = set()
        self.place = place

    def take(self, key: str, read: Callable[[Any, str], Value], default: Value | None = None) -> Value:
        self._asked.add(key)
        if key not in self._values:
            if default is None:
                raise RecipeError(f"{self.place} lacks {key}")
            return default
        return read(self._values[key], f"{self.place}: {key}")

    def take_optional(self, key: str, read: Callable[[Any, str], Value]) -> Value | None:
        return self.take(key, read) if key in self._values else None

    def finish(self) -> None:
        if unknown := self._values.keys() - self._asked:
            raise RecipeError(
                f"{self.place} has unknown keys: {', '.join(sorted(unknown))}",
                hint=f"known here: {', '.join(sorted(self._asked))}",
            )


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError, naming the key."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", hint="give the file of a recipe") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(document, place=str(path), folder=path.parent)


def parse_recipe(document: Any, *, place: str, folder: Path) -> Recipe:
    """A recipe from its parsed YAML; data files are looked for from `folder`. Raises RecipeError."""
    section = _Section(document, place)
    schema = section.take("schema", _text)
    if schema != SCHEMA:
        newer = schema.startswith("voidprune.recipe/")
        raise RecipeError(
            f"{place} has the schema {schema!r}, not {SCHEMA!r}", hint="upgrade voidprune" if newer else None
        )
    kind = section.take("kind", _one_of(tuple(_READERS)))
    return _READERS[kind](section, folder)


def _read_adaptive(section: _Section, folder: Path) -> AdaptiveRecipe:
    seed = section.take("seed", _integer(None), default=0)
    recipe = AdaptiveRecipe(
        model=section.take("model", _text),
        dtype=section.take("dtype", _one_of(("fp32", "fp16", "bf16")), default="fp32"),
        alphas=section.take("alphas", _list_of(_number(0))),
        modes=section.take("modes", _list_of(_one_of(("readout", "mask")))),
        max_new_tokens=section.take("max_new_tokens", _integer(1)),
        batch_size=section.take("batch_size", _integer(1), default=8),
        seed=seed,
        limit=section.take_optional("limit", _integer(1)),
        datasets=section.take("datasets", _map_of(lambda value, place: _read_source(value, place, folder))),
        setups=section.take("setups", _map_of(lambda value, place: _read_setup(value, place, seed))),
    )
    section.finish()
    return recipe


def _read_probe(section: _Section, folder: Path) -> ProbeRecipe:
    recipe = ProbeRecipe(
        model=section.take("model", _text),
        dtype=section.take("dtype", _one_of(("fp32", "fp16", "bf16")), default="fp32"),
        interventions=section.take("interventions", _list_of(_one_of(INTERVENTIONS)), default=INTERVENTIONS),
        scopes=section.take("scopes", _list_of(_one_of(SCOPES)), default=SCOPES),
        margin=section.take("margin", _number(0), default=0.01),
        batch_size=section.take("batch_size", _integer(1), default=8),
        seed=section.take("seed", _integer(None), default=0),
        limit=section.take_optional("limit", _integer(1)),
        datasets=section.take("datasets", _map_of(lambda value, place: _read_probe_source(value, place, folder))),
    )
    section.finish()
    if not 0 < recipe.margin < 1:
        raise RecipeError(f"{section.place}: margin is {recipe.margin:g}, outside of (0, 1)")
    return recipe


def _read_probe_source(value: Any, place: str, folder: Path) -> ProbeSource:
    section = _Section(value, place)
    max_new_tokens = section.take("max_new_tokens", _integer(1), default=64)
    task = section.take_optional("task", _text)
    if task is not None:
        section.finish()
        return ProbeSource(max_new_tokens, task)
    layout = section.take("layout", _one_of(("rows", *TEXT_LAYOUTS)), default="rows")
    file = section.take_optional("file", _text)
    source: HubData | Path
    if file is not None or layout == "rows":
        source = (folder / section.take("file", _text)).absolute()
    else:
        source = HubData(
            path=section.take("hub", _text),
            split=section.take("split", _text),
            config=section.take_optional("config", _text),
        )
    section.finish()
    return ProbeSource(max_new_tokens, None, layout, source)


def _read_source(value: Any, place: str, folder: Path) -> DataSource:
    section = _Section(value, place)
    layout = section.take("layout", _one_of(tuple(LAYOUTS)))
    file = section.take_optional("file", _text)
    if file is not None:
        section.finish()
        return DataSource(layout, (folder / file).absolute())
    hub = HubData(
        path=section.take("hub", _text),
        split=section.take("split", _text),
        config=section.take_optional("config", _text),
    )
    section.finish()
    return DataSource(layout, hub)


def _read_setup(value: Any, place: str, seed: int) -> Setup:
    section = _Section(value, place)
    temperature = section.take_optional("temperature", _number(0))
    top_p = section.take_optional("top_p", _number(0))
    setup = Setup(
        options=section.take("options", _one_of(("file", "shuffled"))),
        scoring=section.take("scoring", _one_of(("generate", "log-likelihood"))),
        arithmetic=section.take("arithmetic", _one_of(("float32", "model")), default="float32"),
        sampling=_read_sampling(temperature, top_p, seed, place),
        static=section.take("static", _boolean, default=False),
    )
    section.finish()
    if setup.sampling is not None and setup.scoring != "generate":
        raise RecipeError(f"{place}: log-likelihoods are not sampled", hint="leave temperature and top_p out")
    if setup.sampling is not None and setup.static:
        raise RecipeError(f"{place}: a static schedule answers greedily", hint="leave temperature out, or static")
    return setup


def _read_sampling(temperature: float | None, top_p: float | None, seed: int, place: str) -> Sampling | None:
    if temperature is None:
        if top_p is not None:
            raise RecipeError(f"{place}: top_p needs a temperature")
        return None
    try:
        return Sampling(temperature, 1.0 if top_p is None else top_p, seed)
    except ValueError as error:
        raise RecipeError(f"{place}: {error}") from error


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{place} is not a text")
    return value


def _boolean(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{place} is not true or false")
    return value


def _integer(lowest: int | None) -> Callable[[Any, str], int]:
    def read(value: Any, place: str) -> int:
        if type(value) is not int or (lowest is not None and value < lowest):
            raise RecipeError(f"{place} is not a whole number{'' if lowest is None else f' from {lowest} up'}")
        return value

    return read


def _number(lowest: float) -> Callable[[Any, str], float]:
    def read(value: Any, place: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value < lowest:
            raise RecipeError(f"{place} is not a number from {lowest:g} up")
        return float(value)

    return read


def _one_of(names: Sequence[str]) -> Callable[[Any, str], str]:
    def read(value: Any, place: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise RecipeError(f"{place} is {value!r}", hint=f"known here: {', '.join(names)}")
        return value

    return read


def _list_of(read_one: Callable[[Any, str], Value]) -> Callable[[Any, str], tuple[Value, ...]]:
    def read(value: Any, place: str) -> tuple[Value, ...]:
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{place} is not a list of one value or more")
        found = tuple(read_one(one, f"{place}, entry {number}") for number, one in enumerate(value, start=1))
        if len(set(found)) < len(found):
            raise RecipeError(f"{place} says a value twice")
        return found

    return read


def _map_of(read_one: Callable[[Any, str], Value]) -> Callable[[Any, str], dict[str, Value]]:
    """Names become parts of file names."""

    def read(value: Any, place: str) -> dict[str, Value]:
        section = _Section(value, place)
        if not value:
            raise RecipeError(f"{place} is empty")
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise RecipeError(f"{place}: {name!r} is no name", hint="use letters, digits, - and _")
        return {name: section.take(name, read_one) for name in value}

    return read


_READERS: dict[str, Callable[[_Section, Path], Recipe]] = {
    "adaptive-evaluation": _read_adaptive,
    "probe": _read_probe,
}
