"""Recipes that repeat an experiment: LAC token by token on public benchmarks, and interventions at every depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import RecipeError
from voidprune.execution.sampling import Sampling
from voidprune.profiling.layouts import LAYOUTS, TEXT_LAYOUTS, HubData
from voidprune.recipe.sections import SCHEMA, Section, boolean, integer, list_of, map_of, number, one_of, text

INTERVENTIONS = ("random", "freeze", "skip-attention", "switch", "shuffle")
SCOPES = ("prompt", "published")


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


def read_adaptive(section: Section, folder: Path) -> AdaptiveRecipe:
    seed = section.take("seed", integer(None), default=0)
    recipe = AdaptiveRecipe(
        model=section.take("model", text),
        dtype=section.take("dtype", one_of(("fp32", "fp16", "bf16")), default="fp32"),
        alphas=section.take("alphas", list_of(number(0))),
        modes=section.take("modes", list_of(one_of(("readout", "mask")))),
        max_new_tokens=section.take("max_new_tokens", integer(1)),
        batch_size=section.take("batch_size", integer(1), default=8),
        seed=seed,
        limit=section.take_optional("limit", integer(1)),
        datasets=section.take("datasets", map_of(lambda value, place: _read_source(value, place, folder))),
        setups=section.take("setups", map_of(lambda value, place: _read_setup(value, place, seed))),
    )
    section.finish()
    return recipe


def read_probe(section: Section, folder: Path) -> ProbeRecipe:
    recipe = ProbeRecipe(
        model=section.take("model", text),
        dtype=section.take("dtype", one_of(("fp32", "fp16", "bf16")), default="fp32"),
        interventions=section.take("interventions", list_of(one_of(INTERVENTIONS)), default=INTERVENTIONS),
        scopes=section.take("scopes", list_of(one_of(SCOPES)), default=SCOPES),
        margin=section.take("margin", number(0), default=0.01),
        batch_size=section.take("batch_size", integer(1), default=8),
        seed=section.take("seed", integer(None), default=0),
        limit=section.take_optional("limit", integer(1)),
        datasets=section.take("datasets", map_of(lambda value, place: _read_probe_source(value, place, folder))),
    )
    section.finish()
    if not 0 < recipe.margin < 1:
        raise RecipeError(f"{section.place}: margin is {recipe.margin:g}, outside of (0, 1)")
    return recipe


def _read_probe_source(value: Any, place: str, folder: Path) -> ProbeSource:
    section = Section(value, place)
    max_new_tokens = section.take("max_new_tokens", integer(1), default=64)
    task = section.take_optional("task", text)
    if task is not None:
        section.finish()
        return ProbeSource(max_new_tokens, task)
    layout = section.take("layout", one_of(("rows", *TEXT_LAYOUTS)), default="rows")
    file = section.take_optional("file", text)
    source: HubData | Path
    if file is not None or layout == "rows":
        source = (folder / section.take("file", text)).absolute()
    else:
        source = HubData(
            path=section.take("hub", text),
            split=section.take("split", text),
            config=section.take_optional("config", text),
        )
    section.finish()
    return ProbeSource(max_new_tokens, None, layout, source)


def _read_source(value: Any, place: str, folder: Path) -> DataSource:
    section = Section(value, place)
    layout = section.take("layout", one_of(tuple(LAYOUTS)))
    file = section.take_optional("file", text)
    if file is not None:
        section.finish()
        return DataSource(layout, (folder / file).absolute())
    hub = HubData(
        path=section.take("hub", text),
        split=section.take("split", text),
        config=section.take_optional("config", text),
    )
    section.finish()
    return DataSource(layout, hub)


def _read_setup(value: Any, place: str, seed: int) -> Setup:
    section = Section(value, place)
    temperature = section.take_optional("temperature", number(0))
    top_p = section.take_optional("top_p", number(0))
    setup = Setup(
        options=section.take("options", one_of(("file", "shuffled"))),
        scoring=section.take("scoring", one_of(("generate", "log-likelihood"))),
        arithmetic=section.take("arithmetic", one_of(("float32", "model")), default="float32"),
        sampling=_read_sampling(temperature, top_p, seed, place),
        static=section.take("static", boolean, default=False),
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
