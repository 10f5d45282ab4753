"""Profile to one score a layer. **Add a criterion here**: one pure function and its row.

A higher score means that the layer matters more. Scores are comparable within one criterion and phase only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from voidprune.errors import BudgetError
from voidprune.profiling.profile import LayerStatistics

Scores = tuple[float, ...]


@dataclass(frozen=True)
class Criterion:
    """A way to rank layers. `score` gets the statistics of the phase and a seed; `source` is where the idea is from."""

    name: str
    summary: str
    source: str
    needs_profile: bool
    score: Callable[[LayerStatistics, int], Scores]


def score_lac(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.activation_frequency


def score_block_influence(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.block_influence


def score_relative_norm(statistics: LayerStatistics, seed: int) -> Scores:
    return statistics.relative_norm_change


def score_last_n(statistics: LayerStatistics, seed: int) -> Scores:
    """The last layers go first, but never the very last one, which prepares the state for the head."""
    num_layers = len(statistics.active)
    return tuple(float(num_layers if layer == num_layers - 1 else -layer) for layer in range(num_layers))


def score_random(statistics: LayerStatistics, seed: int) -> Scores:
    generator = random.Random(seed)
    return tuple(generator.random() for _ in statistics.active)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("lac", "activation frequency under LAC", "arXiv 2505.14467", True, score_lac),
        Criterion(
            "block-influence",
            "1 - cosine of the states before and after",
            "arXiv 2403.03853",
            True,
            score_block_influence,
        ),
        Criterion("relative-norm", "length of the change over length of the state", "", True, score_relative_norm),
        Criterion("last-n", "control: drop the last layers but the very last", "arXiv 2403.17887", False, score_last_n),
        Criterion("random", "control: a seeded shuffle", "", False, score_random),
    )
}


def find_criterion(name: str) -> Criterion:
    if name not in CRITERIA:
        raise BudgetError(f"there is no criterion {name!r}", hint=f"choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
