"""What is known of each layer in each phase: how often LAC calls it active, and where every criterion ranks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voidprune import artifacts
from voidprune.planning.criteria import CRITERIA, Criterion
from voidprune.plots.drawing import Drawing
from voidprune.plots.heat_map import Group, Row, cell_width, draw_heat_map
from voidprune.profiling.profile import LayerStatistics, Profile, empty_statistics
from voidprune.schedule import Phase, Schedule


@dataclass(frozen=True)
class Ranking:
    """One criterion in one phase. `phase` None: the same in both.

    `standing[l]`: the share of budgets, of 1 to L - 1 layers kept, within which layer l stays: 1 goes last, 0 goes first. It is
    there for every criterion, also for those that choose sets; `scores` only for those that score layers one by one.
    """

    criterion: str
    phase: Phase | None
    scores: tuple[float, ...] | None
    standing: tuple[float, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """1 stays longest; equal standings share the better rank."""
        return tuple(1 + sum(other > mine for other in self.standing) for mine in self.standing)


@dataclass(frozen=True)
class LayerFacts:
    """`frequency`: LAC's activation frequency by phase, None where the profile saw no token of it."""

    num_layers: int
    alpha: float | None
    frequency: dict[Phase, tuple[float, ...] | None]
    rankings: tuple[Ranking, ...]

    def to_document(self) -> artifacts.Document:
        return {
            "alpha": self.alpha,
            "activation_frequency": {
                str(phase): None if values is None else list(values) for phase, values in self.frequency.items()
            },
            "rankings": [
                {
                    "criterion": one.criterion,
                    "phase": "both" if one.phase is None else str(one.phase),
                    "scores": None if one.scores is None else list(one.scores),
                    "standing": list(one.standing),
                }
                for one in self.rankings
            ],
        }


def rank_layers(profile: Profile | None, num_layers: int, *, seed: int = 0) -> LayerFacts:
    """By every criterion; by none without a profile, for controls alone say nothing."""
    rankings: list[Ranking] = []
    statistics = {phase: None if profile is None else profile.statistics(phase) for phase in Phase}
    for criterion in CRITERIA.values() if profile is not None else ():
        if not criterion.needs_profile and criterion.name != "random":
            rankings.append(_rank(criterion, empty_statistics(num_layers), None, seed))
            continue
        for number, phase in enumerate(Phase):
            if not criterion.needs_profile:
                # As the planner does: another order in each phase.
                rankings.append(_rank(criterion, empty_statistics(num_layers), phase, 2 * seed + number))
            elif (seen := statistics[phase]) is not None and seen.num_tokens:
                rankings.append(_rank(criterion, seen, phase, seed))
    return LayerFacts(
        num_layers=num_layers,
        alpha=None if profile is None else profile.lac.alpha,
        frequency={
            phase: seen.activation_frequency if seen is not None and seen.num_tokens else None
            for phase, seen in statistics.items()
        },
        rankings=tuple(rankings),
    )


def _rank(criterion: Criterion, statistics: LayerStatistics, phase: Phase | None, seed: int) -> Ranking:
    num_layers = statistics.num_layers
    scores = None if criterion.score is None else criterion.score(statistics, seed)
    stays = [0] * num_layers
    if scores is not None:
        ranked = sorted(range(num_layers), key=lambda layer: (-scores[layer], layer))
        for rank, layer in enumerate(ranked):
            stays[layer] = num_layers - 1 - rank
    else:
        for num_kept in range(1, num_layers):
            for layer in criterion.choose(statistics, num_kept, seed=seed):
                stays[layer] += 1
    standing = tuple(count / max(1, num_layers - 1) for count in stays)
    return Ranking(criterion.name, phase, scores if criterion.needs_profile else None, standing)


def draw_layers(facts: LayerFacts, schedule: Schedule | None, *, model: str) -> Drawing:
    """The heat map of activation frequency and of every ranking, with the schedule over it."""
    groups = []
    seen = [phase for phase in Phase if facts.frequency[phase] is not None]
    if seen:
        rows = tuple(_frequency_row(facts, phase) for phase in seen)
        heading = f"how often LAC calls a layer active (alpha {facts.alpha:g}): % of the phase's tokens"
        groups.append(Group("LAC frequency", rows, heading))
    kind = None
    for name, criterion in CRITERIA.items():
        rankings = [ranking for ranking in facts.rankings if ranking.criterion == name]
        if not rankings:
            continue
        heading = ""
        if kind != criterion.needs_profile:
            kind = criterion.needs_profile
            heading = (
                "criteria: the fuller the colour, the longer a layer stays"
                if kind
                else "controls, which look at nothing"
            )
        groups.append(Group(name, tuple(map(_ranking_row, rankings)), heading))
    return draw_heat_map(
        groups,
        schedule,
        num_layers=facts.num_layers,
        title=f"{model}: layers by phase and criterion",
        description=describe_layers(facts, schedule),
    )


def describe_layers(facts: LayerFacts, schedule: Schedule | None) -> str:
    """The picture in words."""
    told = [f"A heat map of {facts.num_layers} layers."]
    for phase in Phase:
        if (values := facts.frequency[phase]) is not None:
            told.append(f"In {phase} LAC is least active in layers {_list(_lowest(values))}.")
        if schedule is not None:
            left_out = [layer for layer, action in enumerate(schedule.actions(phase)) if not action.executes]
            told.append(f"The schedule leaves {_list(left_out) if left_out else 'nothing'} out of {phase}.")
    return " ".join(told)


def _lowest(values: Sequence[float], count: int = 3) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda layer: values[layer])[:count])


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _frequency_row(facts: LayerFacts, phase: Phase) -> Row:
    values = facts.frequency[phase] or ()
    wide = cell_width(facts.num_layers) >= 24
    return Row(
        phase,
        values,
        tuple(f"{value * 100:.0f}" if wide else "" for value in values),
        tuple(f"layer {layer}, {phase}: active for {value:.1%} of tokens" for layer, value in enumerate(values)),
    )


def _ranking_row(ranking: Ranking) -> Row:
    cell, ranks = cell_width(len(ranking.standing)), ranking.ranks
    phase = "both phases" if ranking.phase is None else str(ranking.phase)
    titles = []
    for layer, rank in enumerate(ranks):
        score = "" if ranking.scores is None else f", score {ranking.scores[layer]:.4g}"
        titles.append(f"layer {layer}, {phase}: {ranking.criterion} ranks it {rank} of {len(ranks)}{score}")
    if cell >= 36 and ranking.scores is not None:
        texts = [f"{score:.3f}".removeprefix("0") if score < 1 else f"{score:.3g}" for score in ranking.scores]
    else:
        texts = [str(rank) if cell >= 18 else "" for rank in ranks]
    return Row(ranking.phase, ranking.standing, tuple(texts), tuple(titles))
