"""Drawings: well-formed, the same bytes each time, legible in light and dark."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from voidprune.plots.drawing import (
    COLOURS,
    Drawing,
    Paint,
    Shape,
    Text,
    box,
    line,
    paint_inline,
    paint_png,
    paint_svg,
    regular,
    stack,
    stylesheet,
)

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>&"$x$'


def make_drawing() -> Drawing:
    elements = (
        box(0, 0, 10.5, 20, Paint(fill="hot", opacity=0.25), HOSTILE),
        line([(0, 0), (5, 5), (10, 0)], Paint(stroke="frame", width=2, dashes=(3, 2))),
        Shape(regular(5, 5, 4, 5, inner=2).points, Paint(fill="blue", stroke="paper")),
        Text(3, 4, HOSTILE, anchor="end", bold=True),
        Text(3, 4, "up", turned=True),
    )
    return Drawing(40, 30, HOSTILE, "what it shows", elements)


def test_a_file_stands_alone_and_is_well_formed() -> None:
    root = ElementTree.fromstring(paint_svg(make_drawing()))
    assert [child.tag.removeprefix(SVG) for child in root] == [
        "title", "desc", "style", "rect", "rect", "polyline", "polygon", "text", "text",
    ]  # fmt: skip
    assert root.attrib["viewBox"] == "-12 -12 64 54"
    assert root[0].text == root[4][0].text == root[7].text == HOSTILE
    assert root[4].attrib == {
        "x": "0", "y": "0", "width": "10.5", "height": "20", "class": "f-hot", "fill-opacity": "0.25",
    }  # fmt: skip
    assert len(root[6].attrib["points"].split()) == 10
    assert "var(" not in paint_svg(make_drawing()), "viewers other than browsers know no variables"


def test_pictures_of_one_page_have_ids_of_their_own() -> None:
    one, other = (paint_inline(make_drawing(), name=name) for name in ("one", "other"))
    assert 'id="one-title"' in one
    assert "one-" not in other
    assert 'role="img"' in one


def test_the_same_drawing_is_the_same_bytes() -> None:
    pytest.importorskip("matplotlib", reason="PNG pictures need the extra [report]")
    assert paint_svg(make_drawing()) == paint_svg(make_drawing())
    first = paint_png(make_drawing())
    assert first == paint_png(make_drawing())
    width, height = (int.from_bytes(first[start : start + 4]) for start in (16, 20))
    assert (width, height) == (2 * 64, 2 * 54)


def test_stacked_drawings_keep_their_distance() -> None:
    one = Drawing(10, 5, "", "", (box(0, 0, 10, 5, Paint()),))
    three = stack([one, one, one], title="all", description="", columns=2, gap=2)
    assert (three.width, three.height) == (22, 12)
    corners = [element.points[0] for element in three.elements if isinstance(element, Shape)]
    assert corners == [(0, 0), (12, 0), (0, 7)]


def luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2 counts it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_marks_stand_out_from_the_paper(theme: int) -> None:
    """4.5 to 1 for text, 3 to 1 for marks: what WCAG 2 asks for at level AA."""
    colours = {name: pair[theme] for name, pair in COLOURS.items()}
    for ground in ("paper", "soft"):
        for name in ("ink", "faint"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in colours.keys() - {"line", "soft", "paper"}:
        assert contrast(colours[name], colours["paper"]) >= 3, name
    assert contrast(colours["hot"], colours["paper"]) >= 4.5, "text in full cells"


def test_every_colour_is_in_the_stylesheet_for_both_themes() -> None:
    text = stylesheet()
    light, _, rest = text.partition("@media screen and (prefers-color-scheme:dark)")
    for name, (on_white, on_black) in COLOURS.items():
        assert f"--{name}:{on_white};" in light
        assert f"--{name}:{on_black};" in rest
