"""How the points of a criterion look, everywhere: a colour and a shape each; controls are grey and hollow, searches black stars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from voidprune.planning.criteria import CRITERIA
from voidprune.plots.drawing import Drawing, Element, Paint, Shape, Text, box, estimate_width, line, regular

_HUES = ("blue", "violet", "green", "pink", "gold", "sky")
_CORNERS = (24, 4, 3, 0, -3, 5)
"""Corners of the shapes, in turn: a circle, a diamond, a triangle, a square, a triangle on its head, a pentagon."""


@dataclass(frozen=True)
class Mark:
    """`corners` 0 is a square, below 0 they stand on their head; with `is_star` a star of them. A hollow mark is an outline."""

    colour: str
    corners: int
    is_star: bool = False
    is_hollow: bool = False
    dashes: tuple[float, ...] = ()

    def draw(self, x: float, y: float, title: str = "", *, radius: float = 5.0) -> Shape:
        paint = Paint(fill=self.colour, stroke="paper", width=0.8)
        if self.is_hollow:
            paint = Paint(fill="paper", stroke=self.colour, width=1.6)
        if self.corners == 0:
            side = radius * 1.7
            return box(x - side / 2, y - side / 2, side, side, paint, title)
        corners = abs(self.corners)
        reach = radius * (1.5 if self.is_star else 1.2 if corners == 3 else 1.1)
        inner = reach * 0.45 if self.is_star else None
        shape = regular(x, y, reach, corners, turn=0 if self.corners > 0 else 180, inner=inner)
        return replace(shape, paint=paint, title=title)

    @property
    def stroke(self) -> Paint:
        return Paint(stroke=self.colour, width=1.6 if not self.is_hollow else 1.1, dashes=self.dashes)


WHOLE = Mark("ink", 0)
SHIPPED = Mark("frame", 4, is_star=True)
PREDICTED = Mark("frame", 4, is_star=True, is_hollow=True)


def mark_of(name: str) -> Mark:
    """Of a criterion or a search."""
    if name.startswith("search"):
        return Mark(
            "ink", 5, is_star=True, is_hollow=name != "search-loss", dashes=() if name == "search-loss" else (5, 3)
        )
    measured = [criterion.name for criterion in CRITERIA.values() if criterion.needs_profile]
    controls = [criterion.name for criterion in CRITERIA.values() if not criterion.needs_profile]
    if name in measured:
        index = measured.index(name)
        again = (index // len(_HUES)) * 2
        return Mark(
            _HUES[index % len(_HUES)], _CORNERS[(index + again) % 6], dashes=() if index < len(_HUES) else (6, 3)
        )
    index = controls.index(name) if name in controls else len(controls)
    return Mark("grey", _CORNERS[index % 6], is_hollow=True, dashes=(2.0, 2.0 + index))


def draw_legend(entries: Sequence[tuple[str, Mark]], *, width: float) -> Drawing:
    """Marks and names, in as many rows as it takes."""
    elements: list[Element] = []
    x, y = 8.0, 10.0
    for name, mark in entries:
        needed = 30 + estimate_width(name, 11.5)
        if x + needed > width and x > 8:
            x, y = 8.0, y + 20
        elements += [mark.draw(x, y), Text(x + 11, y + 4, name, 11.5)]
        x += needed
    return Drawing(width, y + 10, "", "", tuple(elements))


def draw_whiskers(
    x: float, ends: tuple[float, float], paint: Paint, *, upright: bool = True, cap: float = 3.0
) -> list[Element]:
    """An interval at `x`, from one end to the other, in pixels; lying, `x` is a y."""
    caps = [((x - cap, at), (x + cap, at)) for at in ends]
    lines = [((x, ends[0]), (x, ends[1])), *caps]
    if not upright:
        lines = [((a[1], a[0]), (b[1], b[0])) for a, b in lines]
    return [line(points, paint) for points in lines]
