"""Figures as text: in their units, and beside the whole model in words."""

from __future__ import annotations

import pytest

from voidprune.report.figures import describe_change, show


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1, "the same"), (0.58, "42 % less"), (0.957, "4.3 % less"), (1.008, "0.8 % more"), (3, "3.00 times as much")],
)
def test_changes_are_said_in_words(ratio: float, text: str) -> None:
    assert describe_change(ratio) == text


def test_figures_are_shown_in_their_units() -> None:
    shown = [
        show(value, unit) for value, unit in ((0.123, "share"), (1500, "bytes"), (0.5, "seconds"), (12.3456, "plain"))
    ]
    assert shown == ["12.3 %", "1.50 kB", "500.00 ms", "12.35"]
    assert show(2e9, "flops") == "2.0 GFLOP"
