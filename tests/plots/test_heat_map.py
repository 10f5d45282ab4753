"""The heat map: a cell a layer, what the schedule does drawn over it, legible from two layers to eighty."""

from __future__ import annotations

import itertools

import pytest

from tests.plots.test_drawing import contrast
from voidprune.plots.drawing import COLOURS, Drawing, Shape, Text, paint_svg
from voidprune.plots.heat_map import TURN, Group, Row, cell_width, draw_heat_map, draw_strip
from voidprune.schedule import LayerAction, ModelIdentity, Phase, Schedule


def make_schedule(num_layers: int) -> Schedule:
    """Prefill runs the first half and writes K/V in the next but the last layer, which is gone."""
    half = num_layers // 2
    prefill = [LayerAction.FULL] * half + [LayerAction.KV_ONLY] * (num_layers - half - 1) + [LayerAction.SKIP]
    decode = [LayerAction.FULL] * (num_layers - 1) + [LayerAction.SKIP]
    return Schedule(ModelIdentity("m", "llama", num_layers, "f"), tuple(prefill), tuple(decode))


def draw(num_layers: int, schedule: Schedule | None) -> Drawing:
    titles = tuple(f"layer {layer}" for layer in range(num_layers))
    values = tuple(layer / num_layers for layer in range(num_layers))
    rows = tuple(Row(phase, values, ("",) * num_layers, titles) for phase in Phase)
    both = Row(None, values, ("",) * num_layers, titles)
    groups = [Group("measured", rows, "heading"), Group("control", (both,))]
    return draw_heat_map(groups, schedule, num_layers=num_layers, title="t", description="d")


def frames(drawing: Drawing) -> list[Shape]:
    return [one for one in drawing.elements if isinstance(one, Shape) and one.paint.stroke == "frame"]


@pytest.mark.parametrize("num_layers", [2, 12, 32, 80])
def test_layers_are_as_wide_as_fits(num_layers: int) -> None:
    drawing = draw(num_layers, make_schedule(num_layers))
    assert drawing.width <= 1104
    assert 11 <= cell_width(num_layers) <= 62
    xs = [x for one in drawing.elements if isinstance(one, Shape) for x, _ in one.points]
    assert max(xs) <= drawing.width
    assert min(xs) >= 0
    numbers = [one for one in drawing.elements if isinstance(one, Text) and one.y == 15 and one.text.isdigit()]
    gaps = [other.x - one.x for one, other in itertools.pairwise(numbers)]
    assert min(gaps) >= 18, "numbers of layers do not touch"


def test_frames_are_around_what_runs_and_dotted_around_what_is_cached() -> None:
    found = frames(draw(12, make_schedule(12)))
    assert len(found) == 3, "prefill: one that runs, one that is cached; decode: one; a row of both phases has none"
    cell = cell_width(12)
    widths = [one.points[1][0] - one.points[0][0] for one in found]
    assert widths == pytest.approx([6 * cell, 5 * cell - 1, 11 * cell])
    assert [bool(one.paint.dashes) for one in found] == [False, True, False]
    assert frames(draw(12, None)) == []


def test_what_a_layer_does_is_said_in_words() -> None:
    wide, narrow = (paint_svg(draw(count, make_schedule(count))) for count in (12, 80))
    assert "layer 11, prefill: left out" in wide
    assert ">K/V<" in wide
    assert ">k<" in narrow


@pytest.mark.parametrize("theme", [0, 1])
def test_text_is_legible_on_every_shade(theme: int) -> None:
    full, empty, ink, paper = (COLOURS[name][theme] for name in ("hot", "soft", "ink", "paper"))
    for step in range(101):
        shade = step / 100
        parts = zip(*([int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (full, empty)), strict=True)
        ground = "#" + "".join(f"{round(one * shade + other * (1 - shade)):02x}" for one, other in parts)
        assert contrast(paper if shade > TURN else ink, ground) >= 3.5, shade


def test_the_strip_has_a_cell_for_every_layer_and_phase() -> None:
    schedule = make_schedule(12)
    strip = draw_strip(schedule)
    assert sum(bool(one.title) for one in strip.elements if isinstance(one, Shape)) == 24
    assert strip.description == "prefill runs 6 of 12 layers; decode runs 11 of 12 layers"
