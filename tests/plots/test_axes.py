"""Axes: round ticks within, and pixels where they belong."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune.plots.axes import Scale, draw_frame, span
from voidprune.plots.drawing import Text


def test_ends_lie_at_the_ends_and_what_is_beyond_too() -> None:
    scale = Scale(0, 2, 100, 0)
    assert [scale.at(value) for value in (-1, 0, 0.5, 2, 9)] == [100, 100, 75, 0, 0]
    logarithmic = Scale(1, 100, 0, 10, is_log=True)
    assert [logarithmic.at(value) for value in (0.0, 1, 10, 1e9)] == pytest.approx([0, 0, 5, 10])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.47, 1.03, [0.6, 0.8, 1.0]),
        (-0.5, 79.5, [0, 20, 40, 60]),
        (97.2, 98.1, [97.2, 97.4, 97.6, 97.8, 98.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks() == ticks


def test_ticks_of_a_logarithmic_axis() -> None:
    assert Scale(0.9, 6, 0, 1, is_log=True).ticks() == [1, 2, 5]
    assert Scale(1, 1e12, 0, 1, is_log=True).ticks(4) == [1, 1e3, 1e6, 1e9, 1e12]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_there_are_about_as_many_ticks_as_asked_for(low: float, length: float, count: int) -> None:
    scale = Scale(low, low + length, 0, 1)
    ticks = scale.ticks(count)
    assert len(ticks) <= count + 1
    assert all(low - length * 1e-6 <= tick <= low + length * (1 + 1e-6) for tick in ticks)


def test_a_span_has_a_length() -> None:
    for values in ([3.0], [0.0, 0.0], [-1.0, 2.0]):
        low, high = span(values)
        assert low < min(values) <= max(values) < high
    assert math.isclose(span([0.0, 1.0], pad=0.5)[1], 1.5)


def test_a_frame_names_both_axes() -> None:
    frame = draw_frame(
        Scale(0, 1, 50, 150),
        Scale(0, 1, 100, 0),
        x_name="cost",
        y_name="quality",
        x_form="{:g}".format,
        y_form="{:.0%}".format,
    )
    texts = [one.text for one in frame if isinstance(one, Text)]
    assert {"cost", "quality", "0.4", "50%"} <= set(texts)
