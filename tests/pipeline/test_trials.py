"""What is judged was never chosen by; what is missing is said before anything runs for long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from voidprune.errors import DatasetError, ModelError
from voidprune.models.sizes import measure_sizes
from voidprune.pipeline.models import open_model
from voidprune.pipeline.tasks import task_rows
from voidprune.pipeline.trials import Trials, open_trials
from voidprune.profiling.calibration import Row
from voidprune.schedule import dropped_schedule, full_schedule


def demo_trials(num_choosing: int = 2, num_judging: int = 2, tasks: str = "demo", **settings: Any) -> Trials:
    """The demo model with a few items of its tasks and the right responses to them."""
    checkpoint = open_model("demo")
    return open_trials(
        checkpoint,
        task_rows(tasks, num_items=num_choosing, split="calibration"),
        task_rows(tasks, num_items=num_judging, split="validation"),
        **{
            "whole": full_schedule(checkpoint.identity),
            "sizes": measure_sizes(checkpoint),
            "responses": "dataset",
            "max_new_tokens": 8,
            "device": "cpu",
            **settings,
        },
    )


def demo_from(rows: list[Row], judging: list[Row] | None = None, **settings: Any) -> Trials:
    checkpoint = open_model("demo")
    whole, sizes = full_schedule(checkpoint.identity), measure_sizes(checkpoint)
    arguments = {"max_new_tokens": 4, "device": "cpu", **settings}
    return open_trials(checkpoint, rows, judging, whole=whole, sizes=sizes, **arguments)


def test_every_second_sample_of_each_group_is_put_aside() -> None:
    trials = demo_from(task_rows("demo", num_items=5))
    assert [len(items) for items in trials.groups.values()] == [2, 2, 2, 2]
    assert len(trials.choosing) == 4 * 3
    assert {sample.prompt for sample in trials.choosing}.isdisjoint(sample.prompt for sample in trials.judging)
    assert all(len(sample.response or ()) <= 4 for sample in (*trials.choosing, *trials.judging))
    assert trials.asks


def test_samples_to_judge_by_are_never_those_to_choose_by() -> None:
    rows = task_rows("sorting", num_items=4)
    trials = demo_from(rows[:3], [rows[2], rows[3], rows[0]])
    assert len(trials.judging) == 1
    assert trials.judging[0].prompt not in {sample.prompt for sample in trials.choosing}
    with pytest.raises(DatasetError, match="too few samples to choose by some and judge by others"):
        demo_from(rows, rows[1:3])


def test_a_group_of_one_sample_is_chosen_by() -> None:
    rows = [*task_rows("sorting", num_items=2), *task_rows("arithmetic", num_items=1)]
    trials = demo_from(rows)
    assert sorted(sample.group for sample in trials.choosing) == ["arithmetic", "sorting"]
    with pytest.raises(DatasetError, match="too few samples"):
        demo_from(rows[:1])


def test_without_a_judge_all_samples_are_chosen_by() -> None:
    rows = task_rows("sorting", num_items=3)
    trials = demo_from(rows, judges=False)
    assert len(trials.choosing) == 3
    assert trials.judging == ()


def test_plain_text_asks_nothing() -> None:
    rows = [
        Row(place=f"text {number}", text=f"{number}, 4 and 9, sorted from smallest to largest")
        for number in range(20, 24)
    ]
    for responses in ("dataset", "generate"):
        trials = demo_from(rows, responses=responses)
        assert not trials.asks
        assert trials.judge.grade(trials.whole).right is None
        with pytest.raises(DatasetError, match="has no answer to check"):
            trials.objective("task")


@pytest.mark.parametrize("missing", ["rows", "judging"])
def test_missing_responses_are_named_at_once(missing: str) -> None:
    rows, judging = task_rows("sorting", num_items=2), task_rows("sorting", num_items=2, split="validation")
    broken = rows if missing == "rows" else judging
    broken[1] = replace(broken[1], response=None)
    with pytest.raises(DatasetError, match="sorting, item 1 has no response"):
        demo_from(rows, judging, responses="dataset")


def test_responses_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ModelError, match="leave no room for prompts"):
        demo_from(task_rows("sorting", num_items=2), max_new_tokens=511)


def test_a_schedule_is_judged_once() -> None:
    trials = demo_trials(1, 1)
    schedule = dropped_schedule(trials.checkpoint.identity, [3])
    assert trials.judge.grade(schedule) is trials.judge.grade(schedule)
    grades = trials.judge.grade(trials.whole)
    assert grades.right is not None
    assert grades.right.shape == (4,)


def test_the_key_tells_apart_what_finds_something_else() -> None:
    trials = demo_trials(1, 1)
    others = (
        demo_trials(2, 1),
        demo_trials(1, 1, max_new_tokens=9),
        demo_trials(1, 1, batch_size=3),
        demo_trials(1, 1, dtype="bf16"),
    )
    assert demo_trials(1, 1).key == trials.key
    assert all(other.key != trials.key for other in others)
