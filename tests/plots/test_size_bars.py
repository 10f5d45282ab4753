"""Size bars: to one scale, with names where there is room."""

from __future__ import annotations

import pytest

from voidprune.plots.drawing import Shape, Text
from voidprune.plots.size_bars import WIDTH, Bar, Part, draw_size_bars


def test_parts_are_as_wide_as_they_are_large() -> None:
    whole = Bar("whole", (Part("embedding", "embedding", 1, "1 B"), Part("kept", "12 layers", 99, "99 B")))
    pruned = Bar("pruned", (Part("embedding", "embedding", 1, "1 B"), Part("kept", "6 layers", 49, "49 B")))
    drawing = draw_size_bars([whole, pruned], model="m")
    widths = [one.points[1][0] - one.points[0][0] for one in drawing.elements if isinstance(one, Shape) and one.title]
    assert widths == pytest.approx([0.01 * WIDTH, 0.99 * WIDTH, 0.01 * WIDTH, 0.49 * WIDTH])
    texts = [one.text for one in drawing.elements if isinstance(one, Text)]
    assert "12 layers, 99 B" in texts
    assert texts.count("embedding") == 1, "too narrow for its name, which is in the legend"
    assert drawing.description == "whole: embedding 1 B, 12 layers 99 B; pruned: embedding 1 B, 6 layers 49 B"
