"""One request, one way: by ranking, by search, by a bound, layer by layer; and a search that was killed goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from voidprune import artifacts
from voidprune.errors import ArtifactError, BudgetError, DatasetError
from voidprune.models.sizes import ModelSizes, measure_sizes
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import Calibrated, Planned, PlanRequest, make_profile, plan_from_model, plan_from_profile
from voidprune.pipeline.progress import untracked
from voidprune.pipeline.tasks import task_rows
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.profiling.profile import Profile
from voidprune.schedule import Phase, write_schedule

FEW = Calibrated(dataset="yes-no", num_samples=4, max_new_tokens=4, device="cpu")
BUDGET = Budget(keep_prefill=0.75, keep_decode=0.9)


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    return measure_sizes(open_model("demo"))


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile(FEW, open_model("demo"), untracked)


def plan(request: PlanRequest, sizes: ModelSizes, **settings: Any) -> Planned:
    return plan_from_model(request, open_model("demo"), sizes=sizes, **settings)


# ---- requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing says how small"),
        ({"budget": Budget(protected=frozenset({1}))}, "nothing says how small"),
        ({"criterion": "search-loss"}, "nothing says how small"),
        ({"goal": "small", "budget": BUDGET}, "a goal finds out by itself"),
        ({"goal": "small", "criterion": "lac"}, "a goal finds out by itself"),
        ({"goal": "small", "keep_layers": frozenset({1})}, "a goal finds out by itself"),
        ({"goal": "small", "budget": Budget(shared=True)}, "a goal finds out by itself"),
        ({"max_loss": 0.01, "budget": Budget(dropped=frozenset({1}))}, "a goal finds out by itself"),
        ({"keep_layers": frozenset({1}), "budget": BUDGET}, "--keep-layers says all"),
        ({"keep_layers": frozenset({1}), "criterion": "lac"}, "--keep-layers says all"),
        ({"keep_layers": frozenset({1}), "budget": Budget(protected=frozenset({2}))}, "--keep-layers says all"),
        ({"max_loss": 0.0}, "outside of"),
        ({"max_loss": 1.0}, "outside of"),
        ({"max_loss": float("nan")}, "outside of"),
    ],
)
def test_ways_are_not_mixed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        PlanRequest(**fields)
    assert caught.value.hint is not None


def test_layers_by_name_leave_nothing_to_choose() -> None:
    drop = frozenset({1})
    assert PlanRequest(keep_layers=drop).is_explicit
    assert PlanRequest(drop_layers=drop, budget=Budget(dropped=drop)).is_explicit
    assert not PlanRequest(drop_layers=drop, budget=replace(BUDGET, dropped=drop)).is_explicit
    assert not PlanRequest(drop_layers=drop, budget=Budget(dropped=drop), criterion="lac").is_explicit
    assert PlanRequest(goal="small", budget=Budget(protected=drop)).is_free


# ---- from a profile


@pytest.mark.parametrize("criterion", ["auto", "search-loss", "search-task"])
def test_what_runs_the_model_needs_it(profile: Profile, criterion: str) -> None:
    with pytest.raises(BudgetError, match=f"{criterion} has to run the model"):
        plan_from_profile(PlanRequest(budget=BUDGET, criterion=criterion), profile)
    with pytest.raises(BudgetError, match="a goal has to run the model"):
        plan_from_profile(PlanRequest(max_loss=0.1), profile)


def test_a_profile_alone_plans_by_lac(profile: Profile) -> None:
    planned = plan_from_profile(PlanRequest(budget=BUDGET), profile)
    assert planned.schedule.origin["criterion"] == "lac"
    explicit = plan_from_profile(PlanRequest(keep_layers=frozenset({0, 5, 11})), profile)
    assert explicit.schedule.union == (0, 5, 11)


# ---- from a model


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_ranking_plans_the_same_from_the_model(criterion: str, profile: Profile, sizes: ModelSizes) -> None:
    request = PlanRequest(budget=BUDGET, criterion=criterion, calibrated=FEW)
    planned = plan(request, sizes, profile=profile)
    assert planned.schedule == plan_from_profile(request, profile).schedule
    full = sum(action == "full" for action in planned.schedule.prefill)
    assert full == 9


def test_a_profile_that_is_needed_is_made(profile: Profile, sizes: ModelSizes) -> None:
    planned = plan(PlanRequest(budget=BUDGET, criterion="block-influence", calibrated=FEW), sizes)
    assert planned.profile == profile
    assert plan(PlanRequest(budget=BUDGET, criterion="last-n", calibrated=FEW), sizes).profile is None


@pytest.mark.parametrize("criterion", ["auto", "search-loss", "search-task"])
def test_every_search_is_within_the_budget(criterion: str, profile: Profile, sizes: ModelSizes) -> None:
    request = PlanRequest(budget=BUDGET, criterion=criterion, calibrated=FEW, search_evaluations=2)
    schedule = plan(request, sizes, profile=profile).schedule
    assert BUDGET.overshoot(schedule, sizes) == 0
    assert schedule.origin["criterion"] == criterion


def test_the_default_is_lac_with_a_profile_and_auto_without(profile: Profile, sizes: ModelSizes) -> None:
    request = PlanRequest(budget=BUDGET, calibrated=FEW)
    assert plan(request, sizes, profile=profile).schedule.origin["criterion"] == "lac"
    assert plan(request, sizes).schedule.origin["criterion"] == "auto"
    assert not request.runs_model(has_profile=True)
    assert request.runs_model(has_profile=False)


def test_auto_is_the_best_ranking(profile: Profile, sizes: ModelSizes) -> None:
    request = PlanRequest(budget=BUDGET, criterion="auto", calibrated=FEW)
    schedule = plan(request, sizes, profile=profile).schedule
    names = str(schedule.origin["equals"]).split(", ")
    for name in names:
        ranked = plan_from_profile(PlanRequest(budget=BUDGET, criterion=name), profile).schedule
        assert ranked.actions_equal(schedule)


def test_goals_find_their_size(sizes: ModelSizes, tmp_path: Path) -> None:
    for name, split, count in (("choose", "calibration", 3), ("judge", "validation", 16)):
        rows = task_rows("yes-no", num_items=count, split=split)
        lines = [{"prompt": row.messages[0]["content"], "response": row.response, "answer": row.answer} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    calibrated = Calibrated(
        dataset=str(tmp_path / "choose.jsonl"),
        judging=str(tmp_path / "judge.jsonl"),
        responses="dataset",
        max_new_tokens=16,
        device="cpu",
    )
    request = PlanRequest(goal="fast-prompt", max_loss=0.1, calibrated=calibrated)
    planned = plan(request, sizes)
    assert planned.free is not None
    assert planned.free.comparison.holds
    assert planned.schedule.num_executed(Phase.PREFILL) < 12


def test_layers_that_are_not_there_are_refused_before_anything_runs(sizes: ModelSizes) -> None:
    for request in (
        PlanRequest(budget=replace(BUDGET, protected=frozenset({12}))),
        PlanRequest(goal="small", budget=Budget(protected=frozenset({12}))),
        PlanRequest(keep_layers=frozenset({12})),
    ):
        with pytest.raises(BudgetError, match="there is no layer 12"):
            plan(request, sizes)


def test_a_dataset_that_is_not_there(sizes: ModelSizes) -> None:
    with pytest.raises(DatasetError, match=r"no task or file nowhere\.jsonl"):
        plan(PlanRequest(budget=BUDGET, calibrated=Calibrated(dataset="nowhere.jsonl")), sizes)


# ---- killed

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from voidprune.journal import Journal
from tests.pipeline.test_plan import KILLED, plan
from voidprune.models.sizes import measure_sizes
from voidprune.pipeline.models import open_model

torch.set_num_threads(1)
record, left = Journal.record, int(sys.argv[2])

def killing(self, step, value):
    global left
    record(self, step, value)
    left -= self.path is not None  # a profile that is made on the way has no output of its own
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.record = killing
plan(KILLED, measure_sizes(open_model("demo")), output=Path(sys.argv[1]))
"""
KILLED = PlanRequest(
    budget=Budget(keep_prefill=0.8, keep_decode=1.0, protected=frozenset({0})),
    criterion="search-loss",
    search_evaluations=10,
    calibrated=Calibrated(dataset="yes-no", num_samples=3, responses="dataset", max_new_tokens=4, device="cpu"),
)


def test_a_search_that_was_killed_resumes_to_the_same_schedule(tmp_path: Path, sizes: ModelSizes) -> None:
    assert KILLED.runs_model(has_profile=True)
    outputs = [tmp_path / name for name in ("whole.json", "killed.json")]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(outputs[1]), "9"], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == -9, done.stderr
    partial = tmp_path / "killed.json.partial"
    assert len(partial.read_bytes().splitlines()) == 10
    with pytest.raises(ArtifactError, match="was begun by another run: batch_size 16, not 2"):
        plan(replace(KILLED, calibrated=replace(KILLED.calibrated, batch_size=2)), sizes, output=outputs[1])
    for output in outputs:
        write_schedule(output, plan(KILLED, sizes, output=output).schedule)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "whole.json"]
    assert artifacts.read_document(outputs[0], kind="schedule", version=1)
