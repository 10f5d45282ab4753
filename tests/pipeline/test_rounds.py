"""Budgets of rounds, and layers that leave one round after the other."""

from __future__ import annotations

import pytest

from tests.healing.students import make_samples
from tests.tiny_models import TinyModel
from voidprune.errors import BudgetError
from voidprune.models.pretrained import load_model
from voidprune.pipeline.rounds import Rounds, prune_further
from voidprune.planning.budgets import Budget
from voidprune.schedule import full_schedule


def test_budgets_shrink_evenly() -> None:
    rounds = Rounds(Budget(keep_prefill=0.4, keep_decode=0.7, protected=frozenset({0})), 3)
    assert [budget.keep_prefill for budget in rounds.budgets] == pytest.approx([0.8, 0.6, 0.4])
    assert [budget.keep_decode for budget in rounds.budgets] == pytest.approx([0.9, 0.8, 0.7])
    assert all(budget.protected == {0} for budget in rounds.budgets)
    assert rounds.budgets[-1] == rounds.budget
    assert [budget.keep_decode for budget in Rounds(Budget(keep_prefill=0.5), 2).budgets] == [None, None]


@pytest.mark.parametrize(
    ("budget", "number", "message"),
    [
        (Budget(keep_prefill=0.5), 0, "0 rounds"),
        (Budget(), 2, "rounds count layers"),
        (Budget(keep_prefill=0.5, max_bytes=1000), 2, "rounds count layers"),
    ],
)
def test_what_makes_no_rounds_is_refused(budget: Budget, number: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Rounds(budget, number)


@pytest.mark.parametrize("shared", [False, True])
def test_what_left_stays_out(llama: TinyModel, shared: bool) -> None:
    model, samples = load_model(llama.folder), make_samples(12)
    schedule = full_schedule(llama.identity)
    for budget in Rounds(
        Budget(0.5, 0.34, protected=frozenset({5})) if not shared else Budget(0.5, 0.5, shared=True), 2
    ).budgets:
        smaller = prune_further(model, schedule, samples, budget)
        assert budget.overshoot(smaller, None) == 0
        for before, after in zip(schedule.prefill + schedule.decode, smaller.prefill + smaller.decode, strict=True):
            assert before.executes or not after.executes
        assert set(smaller.union) < set(schedule.union) or not shared
        schedule = smaller
    if shared:
        assert schedule.prefill == schedule.decode
    else:
        assert schedule.prefill[5].executes
        assert schedule.decode[5].executes
