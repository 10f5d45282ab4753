"""Budgets and bounds on the demo model: what is found holds, on samples that nothing was chosen by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pipeline.test_trials import demo_from, demo_trials
from voidprune.errors import DatasetError
from voidprune.pipeline.planning import find_free_schedule, propose_schedules, search_budget
from voidprune.pipeline.tasks import task_rows
from voidprune.pipeline.trials import Trials
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.search import drop_unread
from voidprune.profiling.calibration import Row
from voidprune.schedule import Phase


@pytest.fixture(scope="module")
def trials() -> Trials:
    """One task of which 20 items judge: enough to exclude a loss of 10 %."""
    return demo_trials(4, 20, tasks="yes-no", max_new_tokens=24)


@pytest.mark.parametrize("goal", ["fast-prompt", "small", "balanced"])
def test_what_is_free_holds_and_is_smaller(trials: Trials, goal: str) -> None:
    found = find_free_schedule(trials, goal=goal, max_loss=0.1, protected=frozenset({0, 11}))
    schedule = found.schedule
    assert found.comparison.holds
    assert found.comparison.bound == 0.1
    executed = {phase: schedule.num_executed(phase) for phase in Phase}
    if goal == "fast-prompt":
        assert executed[Phase.PREFILL] <= 9
        assert executed[Phase.DECODE] == 12
    elif goal == "small":
        assert schedule.prefill == schedule.decode
    else:
        assert executed[Phase.PREFILL] <= 9
        assert set(found.parts) == {"prefill", "decode"}
        assert found.parts["prefill"][0].num_executed(Phase.DECODE) == 12
        assert found.parts["decode"][0].num_executed(Phase.PREFILL) == 12
    assert all(comparison.holds for _, comparison in found.parts.values())
    for phase in Phase:
        assert schedule.actions(phase)[0].executes
        assert schedule.actions(phase)[11].executes
    assert schedule.origin["goal"] == goal
    # The judge's own figures, taken anew.
    grades, whole = trials.judge.grade(schedule), trials.judge.grade(trials.whole)
    assert grades.right is not None
    assert whole.right is not None
    assert whole.right.sum() - grades.right.sum() <= 2


def test_dropping_what_nothing_reads_changes_no_likelihood(trials: Trials) -> None:
    slim = drop_unread(trials.whole)
    assert slim.num_executed(Phase.PREFILL) == 11
    np.testing.assert_allclose(trials.judge.measure(slim).nll, trials.judge.measure(trials.whole).nll, atol=1e-6)


def test_a_model_whose_layers_are_all_protected_stays_whole(trials: Trials) -> None:
    found = find_free_schedule(trials, goal="balanced", max_loss=0.1, protected=frozenset(range(12)))
    assert found.schedule.is_full
    assert found.comparison.holds


def test_too_few_items_are_refused_with_the_number_that_it_takes(trials: Trials) -> None:
    with pytest.raises(DatasetError, match=r"20 items of yes-no cannot show that at most 1\.0% is lost") as caught:
        find_free_schedule(trials, goal="small", max_loss=0.01)
    assert caught.value.hint == "give 163 or more to judge by, or a larger --max-loss"


def test_items_that_the_whole_model_gets_wrong_prove_less(trials: Trials) -> None:
    wrong = tuple(
        replace(sample, answer="maybe") if number < 10 else sample for number, sample in enumerate(trials.judging)
    )
    with pytest.raises(DatasetError, match="20 items of yes-no cannot show") as caught:
        find_free_schedule(replace(trials, judging=wrong), goal="small", max_loss=0.1)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("give 31 or more")
    nothing = tuple(replace(sample, answer="maybe") for sample in trials.judging)
    with pytest.raises(DatasetError, match="the whole model gets no item of yes-no right"):
        find_free_schedule(replace(trials, judging=nothing), goal="small", max_loss=0.1)


def test_too_few_texts_are_refused() -> None:
    rows = [
        Row(place=f"text {number}", text=f"{number}, 4 and 9, sorted from smallest to largest")
        for number in range(20, 28)
    ]
    with pytest.raises(DatasetError, match="4 samples are too few to judge a loss by"):
        find_free_schedule(demo_from(rows, responses="dataset"), goal="small", max_loss=0.1)


def test_rankings_propose_what_is_within_the_budget(trials: Trials) -> None:
    budget = Budget(keep_prefill=0.5, keep_decode=0.75)
    proposals = propose_schedules(trials, None, budget)
    assert set(proposals) == {name for name, criterion in CRITERIA.items() if not criterion.needs_profile}
    for schedule in proposals.values():
        assert budget.overshoot(schedule, trials.sizes) == 0
    assert propose_schedules(trials, None, Budget(max_bytes=1)) == {}


def test_a_search_is_never_worse_than_the_rankings(trials: Trials) -> None:
    budget = Budget(max_decode_bytes=int(0.8 * 7_400_000))
    proposals = propose_schedules(trials, None, budget)
    objective = trials.objective("loss")
    found = search_budget(trials, budget, proposals=list(proposals.values()), max_evaluations=5)
    assert budget.overshoot(found.schedule, trials.sizes) == 0
    assert found.value == pytest.approx(objective.value(found.schedule), rel=1e-4)
    assert all(found.value <= objective.value(schedule) + 1e-6 for schedule in proposals.values())
    assert found.schedule.origin["criterion"] == "search-loss"
    best = search_budget(trials, budget, proposals=list(proposals.values()), greedy=False, max_evaluations=0)
    assert any(best.schedule.actions_equal(schedule) for schedule in proposals.values())


def test_a_search_by_task_keeps_what_answers() -> None:
    trials = demo_from(task_rows("yes-no", num_items=4), judges=False, max_new_tokens=16)
    found = search_budget(trials, Budget(keep_prefill=0.8, keep_decode=1), objective="task", max_evaluations=0)
    assert found.schedule.num_executed(Phase.PREFILL) == 10
    assert found.value <= 0.02, "nothing is lost, and little certainty"
