"""Every way to choose layers, side by side on one model at equal cost, and which of them wins by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import voidprune
from voidprune import artifacts
from voidprune.errors import BudgetError
from voidprune.journal import Journal
from voidprune.pipeline.planning import propose_schedules, search_budget
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.trials import Trials
from voidprune.planning.budgets import Budget, num_kept, spent
from voidprune.planning.costs import baseline_costs, schedule_costs
from voidprune.planning.objectives import Grades
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.profile import Profile
from voidprune.quality.noninferiority import accuracy_loss, perplexity_loss
from voidprune.schedule import Schedule

VERSION = 2
NUM_REPLICATES = 2000


@dataclass(frozen=True)
class Scope:
    """What is held equal between the rivals, and what it means to keep a share of the layers there."""

    name: str
    summary: str
    limit: str  # a name of `budgets.spent`

    def budget(self, trials: Trials, keep: float) -> Budget:
        """As much as the model costs when it runs `keep` of its layers: that share counted from the first, the last one kept."""
        count = num_kept(keep, trials.whole.num_layers)
        layers = Budget(
            keep_prefill=None if self.name == "decode" else count / trials.whole.num_layers,
            keep_decode=None if self.name == "prefill" else count / trials.whole.num_layers,
            shared=self.name == "bytes",
        )
        like = plan_schedule(
            trials.checkpoint.identity,
            None,
            criterion="last-n",
            budget=layers,
            boundary=trials.whole.boundary,
            single_turn=trials.whole.single_turn,
        )
        cost = spent(like, trials.sizes)[self.limit]
        match self.name:
            case "bytes":
                return Budget(max_bytes=cost, shared=True)
            case "decode":
                return Budget(max_decode_bytes=cost)
            case _:
                return Budget(max_prefill_flops=cost)


SCOPES: dict[str, Scope] = {
    scope.name: scope
    for scope in (
        Scope("bytes", "equal bytes: layers leave both phases", "bytes"),
        Scope("decode", "equal bytes read per output token: decode alone is cut", "decode bytes"),
        Scope("prefill", "equal arithmetic for the prompt: prefill alone is cut", "prefill FLOPs"),
    )
}


@dataclass(frozen=True)
class Entry:
    """One criterion at one budget. `margin` is set for the winner: its lead over the best other, with a 95 % interval."""

    scope: str
    keep: float
    criterion: str
    schedule: Schedule
    grades: Grades
    margin: tuple[float, float, float] | None = None


def compare_criteria(
    trials: Trials,
    profile: Profile | None,
    *,
    keeps: Sequence[float],
    scopes: Sequence[str] = tuple(SCOPES),
    searches: Sequence[str] = ("loss",),
    max_evaluations: int | None = None,
    seed: int = 0,
    journal: Journal | None = None,
    track: Track = untracked,
) -> list[Entry]:
    """Every ranking criterion and every search, at every budget of every scope, graded on the judging samples.

    Rankings that cannot meet a budget are left out of it. A search starts from the whole model and from what the rankings
    propose, so that on the choosing samples it is never worse than they are; `max_evaluations` bounds its refinement.
    """
    entries = []
    for scope in scopes:
        for keep in keeps:
            budget = SCOPES[scope].budget(trials, keep)
            rivals = propose_schedules(trials, profile, budget, seed=seed)
            for objective in searches:
                found = search_budget(
                    trials,
                    budget,
                    objective=objective,
                    proposals=list(rivals.values()),
                    max_evaluations=max_evaluations,
                    journal=journal,
                    track=track,
                )
                rivals[f"search-{objective}"] = found.schedule
            with track(f"judging at {scope} {keep:g}", len(rivals), "schedules") as advance:
                graded = []
                for name, schedule in rivals.items():
                    graded.append(Entry(scope, keep, name, schedule, trials.judge.grade(schedule)))
                    advance(1)
            entries += name_winner(graded, trials.groups, seed=seed)
    return entries


def name_winner(entries: Sequence[Entry], groups: Mapping[str, Sequence[int]], *, seed: int = 0) -> list[Entry]:
    """The entries of one budget, best first, the first with its margin.

    The score is the mean accuracy over tasks where there are answers, and the loss where there are none or accuracies are equal.
    """

    def score(entry: Entry) -> tuple[float, float]:
        asked = entry.grades.right is not None
        return (entry.grades.error(groups) if asked else 0.0), entry.grades.loss(groups)

    if not entries:
        raise BudgetError("no criterion meets the budget", hint="allow more")
    ranked = sorted(entries, key=score)
    if len(ranked) > 1:
        ranked[0] = replace(ranked[0], margin=measure_margin(ranked[0].grades, ranked[1].grades, groups, seed=seed))
    return ranked


def measure_margin(
    best: Grades, other: Grades, groups: Mapping[str, Sequence[int]], *, seed: int = 0
) -> tuple[float, float, float]:
    """(lead, lower, upper): by how much `best` leads in mean accuracy, or in loss (nats a token) where nothing was asked.

    95 % percentile interval of a paired bootstrap over the items of each group.
    """
    generator = np.random.default_rng(seed)
    leads = np.zeros(NUM_REPLICATES + 1)
    for items in groups.values():
        index = np.array(items)
        if best.right is not None and other.right is not None:
            lead = (best.right[index].astype(float) - other.right[index]) / len(index)
        else:
            lead = (other.likelihoods.nll[index] - best.likelihoods.nll[index]) / best.likelihoods.num_tokens[
                index
            ].sum()
        picks = generator.integers(len(index), size=(NUM_REPLICATES, len(index)))
        leads[0] += lead.sum()
        leads[1:] += lead[picks].sum(axis=1)
    lower, upper = np.quantile(leads[1:], (0.025, 0.975)) / len(groups)
    return float(leads[0] / len(groups)), float(lower), float(upper)


def comparison_document(trials: Trials, entries: Sequence[Entry], *, dataset: str) -> artifacts.Document:
    """The comparison as an artefact: every entry with its costs beside the whole model's, its quality, and the margins."""
    whole = trials.judge.grade(trials.whole)
    return {
        "schema": artifacts.schema_key("comparison", VERSION),
        "model": trials.checkpoint.identity.to_document(),
        "dataset": dataset,
        "num_choosing": len(trials.choosing),
        "num_judging": len(trials.judging),
        "measure": "accuracy" if trials.asks else "loss",
        "whole": {
            "costs": _costs(baseline_costs(trials.sizes, trials.whole)),
            **_quality(trials, whole, whole),
        },
        "rows": [
            {
                "scope": entry.scope,
                "keep": entry.keep,
                "criterion": entry.criterion,
                "prefill": [str(action) for action in entry.schedule.prefill],
                "decode": [str(action) for action in entry.schedule.decode],
                "costs": _costs(schedule_costs(trials.sizes, entry.schedule)),
                **_quality(trials, whole, entry.grades),
                "margin": None if entry.margin is None else list(entry.margin),
            }
            for entry in entries
        ],
        "written_by": f"voidprune {voidprune.__version__}",
    }


def _costs(costs: Any) -> dict[str, int]:
    return {name: int(value) for name, value in vars(costs).items()}


def _quality(trials: Trials, whole: Grades, grades: Grades) -> dict[str, Any]:
    loss = perplexity_loss(whole.likelihoods.nll, grades.likelihoods.nll, grades.likelihoods.num_tokens)
    quality: dict[str, Any] = {
        "loss": grades.loss(trials.groups),
        "perplexity_ratio": 1 + loss.estimate,
        "perplexity_ratio_upper": 1 + loss.upper,
        "accuracy": None,
    }
    if grades.right is not None and whole.right is not None:
        quality["accuracy"] = {
            task: {
                "share": float(grades.right[items].mean()),
                "num_items": len(items),
                "drop_upper": accuracy_loss(whole.right[items], grades.right[items]).upper,
            }
            for task, items in trials.groups.items()
        }
    return quality
