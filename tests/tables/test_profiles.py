"""Tables of profiles fit into 80 columns, however many layers there are and however large the figures."""

from __future__ import annotations

import re

import pytest

from tests.tables import cells, numbers_broken_off, render, wide_profile
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.intervals import Cut, schedule_cuts
from voidprune.planning.planner import plan_schedule
from voidprune.schedule import Phase
from voidprune.tables import cuts_table, profile_table


@pytest.mark.parametrize("num_layers", [4, 32, 80])
def test_a_profile(num_layers: int) -> None:
    text = render(profile_table(wide_profile(num_layers)))
    assert not numbers_broken_off(text)
    rows = [line for line in text.splitlines() if re.match(r"│ +\d+ │", line)]
    assert len(rows) == 2 * num_layers + num_layers // 2
    shares = [cell for cell in cells(text) if "%±" in cell]
    assert len(shares) == 2 * num_layers
    assert all(re.search(r"\d\.\d%± *\d+\.\d$", cell) for cell in shares)


def test_where_layers_end() -> None:
    profile = wide_profile(80)
    for name in CRITERIA:
        budget = Budget(keep_prefill=0.5, keep_decode=0.5)
        schedule = plan_schedule(profile.model, profile, budget=budget, criterion=name)
        cuts = schedule_cuts(profile, schedule)
        if cuts:
            assert not numbers_broken_off(render(cuts_table(cuts)))
    worst = Cut(78, 79, (123456.0, 123456.0), ((1.23e-05, 1.23e-05),) * 2, 0.5)
    assert not numbers_broken_off(render(cuts_table(dict.fromkeys(Phase, worst))))
