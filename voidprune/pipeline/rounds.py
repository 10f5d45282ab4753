"""Layers that leave in rounds, with healing between them: which go next is asked of the model as it was healed so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from voidprune.errors import BudgetError
from voidprune.execution.rescoring import Rescorer
from voidprune.pipeline.progress import Track, untracked
from voidprune.planning.budgets import Budget
from voidprune.planning.objectives import LossObjective
from voidprune.planning.search import Search, Step
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Schedule

NUM_CHOOSING = 64
"""Samples to choose layers by, evenly spaced among those that nothing holds out."""


@dataclass(frozen=True)
class Rounds:
    """How far, and in how many rounds: each leaves out the same share of layers of what `budget` leaves out in the end.

    Raises BudgetError where the budget is in other units than layers.
    """

    budget: Budget
    num_rounds: int

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise BudgetError(f"{self.num_rounds} rounds leave nothing out", hint="give a number from 1 up")
        if not self.budget.counts_only or (self.budget.keep_prefill, self.budget.keep_decode) == (None, None):
            raise BudgetError("rounds count layers", hint="give --keep, --keep-prefill or --keep-decode")

    @property
    def budgets(self) -> list[Budget]:
        """Of each round; the last one is `budget`."""

        def after(number: int) -> Budget:
            keeps = {
                name: 1 - (1 - keep) * number / self.num_rounds
                for name in ("keep_prefill", "keep_decode")
                if (keep := getattr(self.budget, name)) is not None
            }
            return replace(self.budget, **keeps)

        return [*map(after, range(1, self.num_rounds)), self.budget]


def prune_further(
    model: PreTrainedModel,
    schedule: Schedule,
    samples: Sequence[Sample],
    budget: Budget,
    *,
    batch_size: int = 16,
    track: Track = untracked,
) -> Schedule:
    """A schedule within the budget that leaves out what `schedule` does, and more: step by step what raises the loss of the model's
    responses least. Raises BudgetError, DatasetError.
    """
    chosen = samples[:: max(1, len(samples) // NUM_CHOOSING)]
    with track("choosing layers", None, "schedules") as advance:
        objective = LossObjective(Rescorer(model, chosen, schedule, batch_size=batch_size))
        search = Search(objective, budget, on_evaluation=lambda: advance(1))
        steps: list[Step] = [search.measure(schedule)]
        steps += search.grow(steps[0])
    return steps[-1].schedule
