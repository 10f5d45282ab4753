"""Probe curves: every point with its interval, harmless depths marked for each scope."""

from __future__ import annotations

from tests.report.documents import HOSTILE, probe
from voidprune.plots.drawing import Shape, Text, paint_svg
from voidprune.plots.probe_curves import describe_probe, draw_probe


def test_every_point_is_there_with_its_interval() -> None:
    drawing = draw_probe(probe(task=HOSTILE, num_layers=4))
    titles = [one.title for one in drawing.elements if isinstance(one, Shape) and one.title]
    assert len(titles) == 5 * 4
    assert f"{HOSTILE}, freeze from layer 1, the prompt alone: 50.0% (45.0% to 55.0%)" in titles
    assert "<script" not in paint_svg(drawing)
    bands = [
        one for one in drawing.elements if isinstance(one, Shape) and one.paint.opacity == 0.2 and len(one.points) == 8
    ]
    assert len(bands) == 5


def test_harmless_depths_are_marked_and_said() -> None:
    drawing = draw_probe(probe())
    texts = [one.text for one in drawing.elements if isinstance(one, Text)]
    assert {"prompt: harmless from 1", "published: no loss seen from 1", "harmless from 1"} <= set(texts)
    assert texts.count("prompt: harmful to the last layer") == 1
    areas = [one.paint.fill for one in drawing.elements if isinstance(one, Shape) and one.paint.opacity in (0.16, 0.12)]
    assert areas == ["green", "green"], "freezing the prompt, and no attention; random nowhere"
    told = describe_probe(probe())
    assert "freeze (the prompt alone): shown to be harmless from layer 1." in told
    assert "random (the prompt alone): not shown to be harmless at any depth." in told


def test_perplexity_has_an_axis_of_its_own() -> None:
    texts = [one.text for one in draw_probe(probe(scored=True)).elements if isinstance(one, Text)]
    assert "capitals: perplexity, x" in texts


def test_many_layers_are_still_told_apart() -> None:
    drawing = draw_probe(probe(num_layers=80))
    ticks = [one for one in drawing.elements if isinstance(one, Text) and one.text.isdigit() and one.anchor == "middle"]
    columns = [one.text for one in ticks]
    assert columns[:8] == ["0", "10", "20", "30", "40", "50", "60", "70"]
