"""From the statistics of a phase to the layers that stay. **Add a criterion here**: one pure function and its row.

A criterion either scores every layer, a higher score meaning that the layer matters more, or chooses a set of layers as a whole.
Scores are comparable within one criterion and phase only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from voidprune.errors import BudgetError
from voidprune.profiling.profile import LayerStatistics

Scores = tuple[float, ...]


class Part(StrEnum):
    """What is left out of a layer that does not stay."""

    LAYER = "layer"
    ATTENTION = "attention"
    MLP = "mlp"


@dataclass(frozen=True)
class Criterion:
    """A way to choose layers, and what is left out of the others. `source` is where the idea is from.

    `score(statistics, seed)` gives one number a layer; `select(statistics, num_kept, seed)` the layers that stay, ascending.
    A criterion has one of the two.
    """

    name: str
    summary: str
    source: str
    needs_profile: bool = True
    part: Part = Part.LAYER
    score: Callable[[LayerStatistics, int], Scores] | None = None
    select: Callable[[LayerStatistics, int, int], tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        assert (self.score is None) != (self.select is None), "a criterion scores or selects"

    def choose(self, statistics: LayerStatistics, num_kept: int, *, seed: int = 0) -> tuple[int, ...]:
        """The `num_kept` layers that stay whole, ascending."""
        if self.score is not None:
            return top_layers(self.score(statistics, seed), num_kept)
        assert self.select is not None
        return self.select(statistics, num_kept, seed)


def top_layers(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` best layers, ascending. Of equal scores the earlier layer is kept."""
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))


def score_lac(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.activation_frequency


def score_block_influence(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.block_influence


def score_relative_norm(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.relative_norm_change


def score_attention(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.attention_influence


def score_mlp(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.mlp_influence


def select_around_span(statistics: LayerStatistics, num_kept: int, seed: int) -> tuple[int, ...]:
    """All but the contiguous layers over which the state of the last token turns least; of equal ones, the latest go."""
    num_layers = statistics.num_layers
    length = num_layers - num_kept
    if not length:
        return tuple(range(num_layers))
    distances = statistics.angular_distances(length)
    start = min(range(len(distances)), key=lambda first: (distances[first], -first))
    return (*range(start), *range(start + length, num_layers))


def score_last_n(statistics: LayerStatistics, seed: int) -> Scores:
    """The last layers go first, but never the very last one, which prepares the state for the head."""
    num_layers = statistics.num_layers
    return tuple(float(num_layers if layer == num_layers - 1 else -layer) for layer in range(num_layers))


def score_first_n(statistics: LayerStatistics, seed: int) -> Scores:
    """The mirror image: the first layers go first, but never the very first one, which lifts the embedding into the stream."""
    return tuple(float(statistics.num_layers if layer == 0 else layer) for layer in range(statistics.num_layers))


def select_evenly(statistics: LayerStatistics, num_kept: int, seed: int) -> tuple[int, ...]:
    """From the first to the last layer in equal steps, halves rounded up; a single layer is the last."""
    last = statistics.num_layers - 1
    if num_kept == 1:
        return (last,)
    gaps = num_kept - 1
    return tuple((2 * step * last + gaps) // (2 * gaps) for step in range(num_kept))


def score_random(statistics: LayerStatistics, seed: int) -> Scores:
    generator = random.Random(seed)
    return tuple(generator.random() for _ in range(statistics.num_layers))


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("lac", "activation frequency under LAC", "arXiv 2505.14467", score=score_lac),
        Criterion(
            "block-influence",
            "1 - cosine of the states before and after the layer",
            "arXiv 2403.03853",
            score=score_block_influence,
        ),
        Criterion(
            "relative-norm",
            "length of the change over length of the state",
            "baseline of arXiv 2403.03853",
            score=score_relative_norm,
        ),
        Criterion(
            "angular",
            "the contiguous span over which the last token turns least goes",
            "arXiv 2403.17887",
            select=select_around_span,
        ),
        Criterion(
            "attention-cosine",
            "attention alone is left out, where it turns the state least",
            "arXiv 2406.15786",
            part=Part.ATTENTION,
            score=score_attention,
        ),
        Criterion(
            "mlp-cosine",
            "the MLP alone is left out, where it turns the state least",
            "arXiv 2406.15786",
            part=Part.MLP,
            score=score_mlp,
        ),
        Criterion(
            "last-n",
            "control: the last layers go, but not the very last",
            "arXiv 2403.17887",
            needs_profile=False,
            score=score_last_n,
        ),
        Criterion(
            "first-n",
            "control: the first layers go, but not the very first",
            "mirror image of last-n",
            needs_profile=False,
            score=score_first_n,
        ),
        Criterion(
            "evenly-spaced",
            "control: what stays is spread evenly, ends included",
            "arXiv 2404.06954",
            needs_profile=False,
            select=select_evenly,
        ),
        Criterion("random", "control: a seeded shuffle", "no source", needs_profile=False, score=score_random),
    )
}


def find_criterion(name: str) -> Criterion:
    if name not in CRITERIA:
        raise BudgetError(f"there is no criterion {name!r}", hint=f"choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
