"""Criteria side by side: equal cost is equal, a search is never behind on what it chose by, a lead has its sign."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.test_plan import FEW
from tests.pipeline.test_trials import demo_trials
from voidprune import artifacts
from voidprune.errors import BudgetError
from voidprune.execution.rescoring import Likelihoods
from voidprune.pipeline.comparison import (
    SCOPES,
    Entry,
    compare_criteria,
    comparison_document,
    measure_margin,
    name_winner,
)
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import make_profile
from voidprune.pipeline.progress import untracked
from voidprune.pipeline.trials import Trials
from voidprune.planning.budgets import spent
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.objectives import Grades
from voidprune.plots import plot_comparison
from voidprune.report.findings import describe
from voidprune.schedule import ModelIdentity, Phase, dropped_schedule, full_schedule


@pytest.fixture(scope="module")
def trials() -> Trials:
    return demo_trials(1, 2, max_new_tokens=4)


@pytest.fixture(scope="module")
def entries(trials: Trials) -> list[Entry]:
    profile = make_profile(FEW, open_model("demo"), untracked)
    return compare_criteria(trials, profile, keeps=(0.75,), max_evaluations=0)


def test_what_is_held_equal_is_never_exceeded(trials: Trials, entries: list[Entry]) -> None:
    for name, scope in SCOPES.items():
        rivals = [entry for entry in entries if entry.scope == name]
        limit = max(scope.budget(trials, 0.75).limits(12).values())
        assert {"last-n", "random", "search-loss"} <= {entry.criterion for entry in rivals}
        for entry in rivals:
            assert spent(entry.schedule, trials.sizes)[scope.limit] <= limit
        if name == "prefill":
            assert all(entry.schedule.decode == trials.whole.decode for entry in rivals if entry.criterion in CRITERIA)


def test_a_search_is_never_behind_where_it_chose(trials: Trials, entries: list[Entry]) -> None:
    objective = trials.objective("loss")
    for scope in SCOPES:
        values = {entry.criterion: objective.value(entry.schedule) for entry in entries if entry.scope == scope}
        assert all(values["search-loss"] <= value + 1e-6 for value in values.values()), values


def test_winners_come_first_with_their_lead(trials: Trials, entries: list[Entry]) -> None:
    for scope in SCOPES:
        first, *rest = [entry for entry in entries if entry.scope == scope]
        assert first.margin is not None
        assert all(entry.margin is None for entry in rest)
        errors = [entry.grades.error(trials.groups) for entry in (first, *rest)]
        assert errors == sorted(errors)
        lead, low, high = first.margin
        assert lead == pytest.approx(errors[1] - errors[0])
        assert low <= lead <= high


def test_the_document_comes_back_and_is_drawn(trials: Trials, entries: list[Entry], tmp_path: Path) -> None:
    document = comparison_document(trials, entries, dataset="demo")
    target = tmp_path / "comparison.json"
    artifacts.write_file(target, artifacts.canonical_bytes(document))
    found, tables = describe(target)
    assert found == document
    assert len(tables) == 1
    assert plot_comparison(found) == plot_comparison(document)
    assert document["measure"] == "accuracy"
    assert (document["num_choosing"], document["num_judging"]) == (4, 8)
    assert document["whole"]["perplexity_ratio"] == 1.0
    row = next(row for row in document["rows"] if row["criterion"] == "last-n" and row["scope"] == "bytes")
    like = dropped_schedule(trials.checkpoint.identity, [8, 9, 10])
    assert row["costs"]["weight_bytes"] == spent(like, trials.sizes)["bytes"]


def test_a_budget_that_nobody_meets_has_no_winner() -> None:
    with pytest.raises(BudgetError, match="no criterion meets the budget"):
        name_winner([], {})


# ---- margins, on figures made by hand

GROUPS = {"one": list(range(40)), "other": list(range(40, 50))}


def grades(nll: float, share: float | None, seed: int = 0) -> Grades:
    generator = np.random.default_rng(seed)
    right = None if share is None else generator.random(50) < share
    likelihoods = Likelihoods(np.full(50, nll) + generator.random(50), np.full(50, 4), np.zeros(50, dtype=bool))
    return Grades(likelihoods, right)


def test_a_lead_is_positive_for_the_better_and_turns_round() -> None:
    good, bad = grades(4.0, 0.95), grades(8.0, 0.4, seed=1)
    lead, low, high = measure_margin(good, bad, GROUPS)
    assert lead == pytest.approx(bad.error(GROUPS) - good.error(GROUPS))
    assert 0 < low < lead < high
    back = measure_margin(bad, good, GROUPS)
    assert back == pytest.approx((-lead, -high, -low), abs=0.02)


def test_without_answers_the_lead_is_in_nats() -> None:
    good, bad = grades(4.0, None), grades(8.0, None, seed=1)
    lead, low, high = measure_margin(good, bad, GROUPS)
    assert lead == pytest.approx(bad.loss(GROUPS) - good.loss(GROUPS))
    assert 0.9 < low < lead < high < 1.1


def test_equals_have_no_lead() -> None:
    same = grades(4.0, 0.5)
    assert measure_margin(same, same, GROUPS) == (0.0, 0.0, 0.0)


def test_of_equal_accuracy_the_lower_loss_wins() -> None:
    schedule = full_schedule(ModelIdentity("tiny", "llama", 2, "sha256:abc"))
    right = np.ones(50, dtype=bool)
    rivals = [
        Entry("bytes", 0.5, name, schedule, Grades(grades(nll, None).likelihoods, right))
        for name, nll in (("worse", 8.0), ("better", 4.0))
    ]
    first, second = name_winner(rivals, GROUPS)
    assert (first.criterion, second.criterion) == ("better", "worse")
    assert first.margin == (0.0, 0.0, 0.0)
    (alone,) = name_winner(rivals[:1], GROUPS)
    assert alone.margin is None


def test_scopes_cut_what_they_say(trials: Trials) -> None:
    assert SCOPES["bytes"].budget(trials, 0.5).shared
    assert SCOPES["decode"].budget(trials, 0.5).max_prefill_flops is None
    for name in SCOPES:
        assert SCOPES[name].budget(trials, 0.999).overshoot(trials.whole, trials.sizes) == 0
    assert {str(phase) for phase in Phase} <= set(SCOPES)
