"""Marks: every criterion is told apart from every other, without its colour too."""

from __future__ import annotations

from voidprune.planning.criteria import CRITERIA
from voidprune.plots.drawing import Paint, Shape, Text
from voidprune.plots.marks import PREDICTED, SHIPPED, WHOLE, Mark, draw_legend, draw_whiskers, mark_of


def without_colour(mark: Mark) -> tuple[object, ...]:
    return mark.corners, mark.is_star, mark.is_hollow


def test_every_mark_has_a_shape_of_its_own() -> None:
    names = [*CRITERIA, "search-loss", "search-task"]
    marks = [*map(mark_of, names), WHOLE, SHIPPED, PREDICTED]
    controls = [
        mark for name, mark in zip(names, marks, strict=False) if not CRITERIA.get(name, CRITERIA["lac"]).needs_profile
    ]
    measured = [mark_of(name) for name, criterion in CRITERIA.items() if criterion.needs_profile]
    assert len(set(map(without_colour, measured))) == len(measured)
    assert len(set(map(without_colour, controls))) == len(controls)
    assert all(mark.is_hollow for mark in controls)
    assert not any(mark.is_hollow for mark in measured)
    assert len(set(marks)) == len(marks)


def test_a_mark_is_drawn_where_it_belongs() -> None:
    for name in CRITERIA:
        points = mark_of(name).draw(50, 70).points
        assert all(abs(x - 50) < 9 and abs(y - 70) < 9 for x, y in points), name
    upright, on_its_head = (Mark("blue", corners).draw(0, 0).points[0] for corners in (3, -3))
    assert upright[1] < 0 < on_its_head[1]


def test_a_legend_wraps_where_its_width_ends() -> None:
    entries = [(name, mark_of(name)) for name in CRITERIA]
    drawing = draw_legend(entries, width=300)
    texts = [element for element in drawing.elements if isinstance(element, Text)]
    assert [text.text for text in texts] == list(CRITERIA)
    assert len({text.y for text in texts}) > 2
    assert max(text.y for text in texts) < drawing.height


def test_whiskers_lie_and_stand() -> None:
    def corners(upright: bool) -> list[tuple[tuple[float, float], ...]]:
        drawn = draw_whiskers(5, (1, 9), Paint(stroke="ink"), upright=upright)
        return [one.points for one in drawn if isinstance(one, Shape)]

    assert corners(True)[0] == ((5, 1), (5, 9))
    assert corners(False)[0] == ((1, 5), (9, 5))
