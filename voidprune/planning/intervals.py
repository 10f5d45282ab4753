"""How sure a ranking is: profiles resampled, block by block. No torch here.

A profile keeps its sums in blocks of samples. A replicate draws as many blocks as there are, with replacement, within each group,
and asks the criterion again: how its answers scatter is how much they owe to the samples that happened to be taken (bootstrap,
Efron 1979, percentile intervals). Groups of a single block are resampled together, as if they were one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voidprune.planning.budgets import parse_layers
from voidprune.planning.criteria import CRITERIA, Criterion, Part
from voidprune.profiling.profile import MEASURES, LayerStatistics, Profile, sum_statistics
from voidprune.schedule import LayerAction, Phase, Schedule

NUM_REPLICATES = 1000
COVERAGE = 0.95

Array = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Cut:
    """Where the kept layers of a phase end, and how sure that is.

    `last_kept` is the layer of lowest score that stays, `first_dropped` that of highest score that goes; None for a criterion
    that chooses a set. `confidence`: the share of replicates in which the one still ranks before the other, or in which the
    same set is chosen. `intervals`: of the two scores. Both None where the profile has too few samples to say.
    """

    last_kept: int | None
    first_dropped: int | None
    scores: tuple[float, float] | None
    intervals: tuple[Interval, Interval] | None
    confidence: float | None

    @property
    def verdict(self) -> str:
        if self.confidence is None:
            return "too few samples"
        return "a fact" if self.confidence >= COVERAGE else "likely" if self.confidence >= 0.75 else "a coin toss"


def resample_statistics(
    profile: Profile, phases: Collection[Phase], *, seed: int = 0, num_replicates: int = NUM_REPLICATES
) -> tuple[LayerStatistics, ...] | None:
    """Replicates of the statistics of the given phases together; None where the samples fill fewer than two blocks."""
    strata = _strata(profile, phases)
    if strata is None:
        return None
    generator = np.random.default_rng(seed)
    total = np.zeros((num_replicates, 2 + len(_flatten(strata[0][0]))))
    for cells in strata:
        sums = np.array([(cell.num_tokens, cell.num_spans, *_flatten(cell)) for cell in cells])
        draws = generator.multinomial(len(cells), [1 / len(cells)] * len(cells), size=num_replicates)
        total += draws @ sums
    return tuple(_unflatten(row, profile.model.num_layers) for row in total.tolist())


def score_intervals(criterion: Criterion, replicates: Sequence[LayerStatistics], *, seed: int = 0) -> list[Interval]:
    """The interval of each layer's score in which COVERAGE of the replicates lie."""
    scores_RL = _scores(criterion, replicates, seed)
    low, high = np.quantile(scores_RL, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def order_probabilities(criterion: Criterion, replicates: Sequence[LayerStatistics], *, seed: int = 0) -> Array:
    """[L, L]: the share of replicates in which layer a ranks before layer b. Equal scores are a coin toss: they count half."""
    scores_RL = _scores(criterion, replicates, seed)
    above_LL = [
        (mine_R1 > scores_RL).mean(axis=0) + (mine_R1 == scores_RL).mean(axis=0) / 2
        for mine_R1 in np.split(scores_RL, scores_RL.shape[1], axis=1)
    ]
    return np.array(above_LL)


def find_cut(
    criterion: Criterion,
    statistics: LayerStatistics,
    replicates: Sequence[LayerStatistics] | None,
    kept: Collection[int],
    *,
    fixed: Collection[int] = (),
    seed: int = 0,
) -> Cut | None:
    """The edge of the layers `kept`, of those that the criterion chose: not `fixed` by the user. None where it had no choice."""
    dropped = set(range(statistics.num_layers)) - {*kept, *fixed}
    kept = set(kept) - set(fixed)
    if not kept or not dropped:
        return None
    if criterion.score is None:
        again = None if replicates is None else _stability(criterion, replicates, kept, seed)
        return Cut(None, None, None, None, again)
    scores = criterion.score(statistics, seed)
    last_kept = max(kept, key=lambda layer: (-scores[layer], layer))
    first_dropped = min(dropped, key=lambda layer: (-scores[layer], layer))
    pair = scores[last_kept], scores[first_dropped]
    if replicates is None:
        return Cut(last_kept, first_dropped, pair, None, None)
    intervals = score_intervals(criterion, replicates, seed=seed)
    confidence = float(order_probabilities(criterion, replicates, seed=seed)[last_kept, first_dropped])
    return Cut(last_kept, first_dropped, pair, (intervals[last_kept], intervals[first_dropped]), confidence)


def schedule_cuts(profile: Profile, schedule: Schedule) -> dict[Phase, Cut]:
    """The cut of each phase in which layers go, for a schedule that a criterion made from this profile; else nothing."""
    criterion = CRITERIA.get(str(schedule.origin.get("criterion")))
    if criterion is None or not criterion.needs_profile:
        return {}
    named = (schedule.origin.get(name) for name in ("protected", "dropped"))
    fixed = frozenset[int]().union(*(parse_layers(str(layers)) for layers in named if layers is not None))
    cuts = {}
    for phase in Phase:
        seen = tuple(Phase) if schedule.origin.get("phases") == "shared" else (phase,)
        statistics = sum_statistics(map(profile.statistics, seen), num_layers=profile.model.num_layers)
        kept = [layer for layer, action in enumerate(schedule.actions(phase)) if _keeps(action, criterion.part)]
        cut = find_cut(criterion, statistics, resample_statistics(profile, seen), kept, fixed=fixed)
        if cut is not None:
            cuts[phase] = cut
    return cuts


def _keeps(action: LayerAction, part: Part) -> bool:
    return {Part.LAYER: action.executes, Part.ATTENTION: action.attends, Part.MLP: action.runs_mlp}[part]


def _stability(criterion: Criterion, replicates: Sequence[LayerStatistics], kept: Collection[int], seed: int) -> float:
    """The share of replicates in which the criterion keeps just these layers."""
    expected = tuple(sorted(kept))
    return float(np.mean([criterion.choose(one, len(expected), seed=seed) == expected for one in replicates]))


def _strata(profile: Profile, phases: Collection[Phase]) -> list[list[LayerStatistics]] | None:
    """The blocks with samples, of the given phases together, in sets that are resampled each on its own; at least two a set."""
    strata: list[list[LayerStatistics]] = []
    alone: list[LayerStatistics] = []
    for by_phase in profile.groups.values():
        cells = [
            sum_statistics(parts, num_layers=profile.model.num_layers)
            for parts in zip(*(by_phase[phase] for phase in phases), strict=True)
        ]
        cells = [cell for cell in cells if cell.num_tokens]
        if len(cells) > 1:
            strata.append(cells)
        else:
            alone += cells
    if len(alone) > 1:
        strata.append(alone)
    elif strata:
        strata[0] = strata[0] + alone
    return strata or None


def _flatten(statistics: LayerStatistics) -> tuple[float, ...]:
    return tuple(value for name in (*MEASURES, "span_distance") for value in getattr(statistics, name))


def _unflatten(row: Sequence[float], num_layers: int) -> LayerStatistics:
    num_tokens, num_spans, *sums = row
    parts = [tuple(sums[start : start + num_layers]) for start in range(0, len(MEASURES) * num_layers, num_layers)]
    return LayerStatistics(
        num_tokens=int(num_tokens),
        active=tuple(map(int, parts[0])),
        **dict(zip(MEASURES[1:], parts[1:], strict=True)),
        num_spans=int(num_spans),
        span_distance=tuple(sums[len(MEASURES) * num_layers :]),
    )


def _scores(criterion: Criterion, replicates: Sequence[LayerStatistics], seed: int) -> Array:
    assert criterion.score is not None, "only criteria that rank have scores"
    return np.array([criterion.score(one, seed) for one in replicates])
