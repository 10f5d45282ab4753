"""Tables of schedules and of what they cost fit into 80 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tables import numbers_broken_off, render, wide_profile, wide_schedule
from voidprune.pipeline.planning import FreePart
from voidprune.planning.budgets import Budget
from voidprune.planning.planner import plan_schedule
from voidprune.quality.noninferiority import Comparison, Loss
from voidprune.schedule import read_schedule, write_schedule
from voidprune.tables import costs_table, describe_origin, free_part_table, schedule_table


@pytest.mark.parametrize("num_layers", [4, 32, 80])
def test_a_schedule_is_drawn_and_listed(num_layers: int) -> None:
    text = render(schedule_table(wide_schedule(num_layers)))
    assert [int(number) for number in re.findall(r"^│ +(\d+) │", text, re.MULTILINE)] == list(range(num_layers))
    assert text.index("in checkpoint ") < text.index("┃ layer")
    assert not numbers_broken_off(text)


def test_costs() -> None:
    text = render(costs_table(wide_profile(80).sizes, wide_schedule(80)))
    assert re.search(r"weights +│ +\d+\.\d\d GB │ +\d+\.\d\d GB │ +\d\.\d\d │", text)


def test_what_is_free_with_many_tasks_of_long_names() -> None:
    loss = Loss(0.99999, 1.23456)
    tasks = ("multiple-choice", "yes-no", "arithmetic", "sorting", "summaries-of-long-texts")
    comparison = Comparison(0.01, loss, dict.fromkeys(tasks, loss), dict.fromkeys(tasks, 1.0))
    schedule = wide_schedule(80)
    parts = dict.fromkeys(("prefill", "decode"), (schedule, comparison))
    text = render(free_part_table(FreePart(schedule, comparison, parts)))
    assert text.count("100.00%") == 3 * 6
    assert text.count("123.46%") == 3 * 6
    assert not numbers_broken_off(text)


def test_a_schedule_is_called_the_same_before_and_after_it_was_written(tmp_path: Path) -> None:
    """Files have their keys in another order than the planner."""
    profile = wide_profile(4)
    budget = Budget(keep_prefill=0.5, keep_decode=0.75, protected=frozenset({1}))
    planned = plan_schedule(profile.model, profile, criterion="lac", budget=budget)
    write_schedule(tmp_path / "schedule.json", planned)
    read = read_schedule(tmp_path / "schedule.json")
    assert list(read.origin) != list(planned.origin)
    assert describe_origin(read) == describe_origin(planned)
    assert describe_origin(planned).startswith("criterion lac, alpha 0.8, keep decode 0.75, keep prefill 0.5, phases ")
