"""Quality against cost: labels that do not overlap, what was measured beside what was counted."""

from __future__ import annotations

import itertools
import re

import pytest

from tests.test_plots import make_comparison
from voidprune.plots.drawing import Text, paint_svg
from voidprune.plots.trade_offs import Panel, Point, comparison_panels, draw_panel, draw_trade_offs, legend_entries


def names_in(panel: Panel) -> list[Text]:
    names = {point.name for point in panel.points}
    drawing = draw_panel(panel, accuracy=True)
    return [one for one in drawing.elements if isinstance(one, Text) and one.text in names]


def make_panel(*qualities: float) -> Panel:
    points = tuple(Point(name, 0.5, quality) for name, quality in zip("abcdefghijklmno", qualities, strict=False))
    return Panel("bytes", "Size", "bytes", points, Point("whole model", 1.0, 1.0, (0.9, 1.0)))


@pytest.mark.parametrize("qualities", [[0.0] * 12, [1.0] * 12, [0.5], [0.0, 0.01, 0.5, 0.51, 0.99, 1.0]])
def test_labels_do_not_overlap_and_stay_inside(qualities: list[float]) -> None:
    labels = names_in(make_panel(*qualities))
    assert len(labels) == len(qualities)
    ys = sorted(label.y for label in labels)
    assert all(later - earlier >= 11 for earlier, later in itertools.pairwise(ys))
    assert ys[0] > 20
    assert ys[-1] < draw_panel(make_panel(*qualities), accuracy=True).height - 55


def test_curves_of_several_budgets_have_the_legend_alone() -> None:
    panels = comparison_panels(make_comparison())
    assert [panel.scope for panel in panels] == ["bytes", "prefill"]
    assert names_in(panels[0]) == []
    assert len({point.name for point in panels[0].points}) * 2 == len(panels[0].points)


def test_what_was_measured_is_told_from_what_was_counted() -> None:
    exported = Point("this export", 0.6, 0.9, (0.85, 0.95), (0.55, 0.7))
    counted = Point("this export, by its cost", 0.5, 0.9)
    panel = Panel(
        "prefill", "Prompt", "arithmetic", (), Point("whole model", 1.0, 1.0), counted, exported, "measured TTFT"
    )
    text = paint_svg(draw_trade_offs([panel], model="m", accuracy=True))
    assert "filled star: measured TTFT" in text
    assert "arithmetic, % of the whole model" in text
    assert [name for name, _ in legend_entries([panel])] == [
        "whole model", "this export, measured", "this export, by its cost",
    ]  # fmt: skip
    assert "this export: 90.0% accuracy at 60% of the cost" in draw_panel(panel, accuracy=True).description


def test_perplexities_of_ruined_models_fit_too() -> None:
    panel = make_panel(1.001, 3.0, 1e40)
    text = paint_svg(draw_panel(panel, accuracy=False))
    assert "perplexity, multiple" in text
    assert re.search(r">1e\+\d\d<", text), "a tick far up"
    assert "nan" not in text
