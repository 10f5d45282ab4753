"""Is a schedule as good as the whole model, up to a stated loss? Answered for the same items under both, one-sided at 95 %.

Not finding a difference is no proof that there is none: a bound holds only where the upper end of what may have been lost is
below it. So few items can never prove much, and `num_items_needed` says how many it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.6448536
"""95 % quantile of the normal distribution."""

NUM_REPLICATES = 2000

MIN_SAMPLES = 10
"""Samples below which the bootstrap is not to be believed: of normal differences, its 95 % are 92 at ten and 89 at five."""


@dataclass(frozen=True)
class Loss:
    """What a schedule loses: the estimate, and the upper end of its one-sided 95 % interval."""

    estimate: float
    upper: float


@dataclass(frozen=True)
class Comparison:
    """A schedule beside the whole model. `perplexity` is the relative increase, `accuracy` the drop by task.

    `holds`: every upper end is within the bound: on perplexity `bound` itself, on accuracy `bound` of the whole model's.
    """

    bound: float
    perplexity: Loss
    accuracy: Mapping[str, Loss]
    whole_accuracy: Mapping[str, float]

    @property
    def holds(self) -> bool:
        return self.perplexity.upper <= self.bound and all(
            loss.upper <= self.bound * self.whole_accuracy[task] for task, loss in self.accuracy.items()
        )

    @property
    def worst(self) -> str:
        """The figure that is furthest from its bound, in words."""
        shares = {
            f"accuracy on {task}": (loss, self.bound * self.whole_accuracy[task])
            for task, loss in self.accuracy.items()
        }
        shares["perplexity"] = (self.perplexity, self.bound)
        name, (loss, bound) = max(shares.items(), key=lambda entry: entry[1][0].upper - entry[1][1])
        verb = "up" if name == "perplexity" else "down"
        return f"{name} {verb} {loss.estimate:.2%}, at most {loss.upper:.2%} (allowed {bound:.2%})"


def perplexity_loss(
    whole_nll: np.ndarray[Any, Any],
    pruned_nll: np.ndarray[Any, Any],
    num_tokens: np.ndarray[Any, Any],
    *,
    seed: int = 0,
) -> Loss:
    """Relative increase of perplexity; paired bootstrap over samples. `*_nll` [N] in nats, summed over `num_tokens` [N]."""
    difference = pruned_nll - whole_nll
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(difference), size=(NUM_REPLICATES, len(difference)))
    means = difference[picks].sum(axis=1) / num_tokens[picks].sum(axis=1)
    return Loss(
        estimate=math.expm1(difference.sum() / num_tokens.sum()), upper=math.expm1(float(np.quantile(means, 0.95)))
    )


def accuracy_loss(whole_right: np.ndarray[Any, Any], pruned_right: np.ndarray[Any, Any]) -> Loss:
    """Drop in the share of right answers, for paired items, [N] bool.

    Wald's interval after half an item is added to each cell of the paired table, so that it does not vanish where nothing was
    lost: Agresti and Min 2005, doi 10.1002/sim.1781.
    """
    num_items = len(whole_right)
    lost = int((whole_right & ~pruned_right).sum())
    won = int((~whole_right & pruned_right).sum())
    total = num_items + 2
    center = (lost - won) / total
    spread = math.sqrt(((lost + won + 1) / total - center**2) / total)
    return Loss(estimate=(lost - won) / num_items, upper=center + Z * spread)


def num_items_needed(bound: float) -> int:
    """Items of a task that show that accuracy falls by at most `bound`, in absolute terms, where not one of them is lost."""
    return math.ceil(Z / bound - 2)


def compare_items(
    bound: float,
    *,
    whole: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None],
    pruned: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None],
    num_tokens: np.ndarray[Any, Any],
    groups: Mapping[str, Sequence[int]],
) -> Comparison:
    """(nll [N], right [N] or None) of the whole model and of a schedule on the same items, by group."""
    accuracy, whole_accuracy = {}, {}
    if whole[1] is not None and pruned[1] is not None:
        for task, items in groups.items():
            accuracy[task] = accuracy_loss(whole[1][list(items)], pruned[1][list(items)])
            whole_accuracy[task] = float(whole[1][list(items)].mean())
    return Comparison(bound, perplexity_loss(whole[0], pruned[0], num_tokens), accuracy, whole_accuracy)
