"""A picture as a value: shapes in pixels, painted as SVG by ourselves and as PNG by matplotlib.

One description of a picture, so that the page, the SVG file and the PNG file show the same. SVG needs no library, follows the light
and dark colours of the page that it stands in, and is the same bytes from the same drawing. What is drawn is said elsewhere.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from voidprune.errors import MissingExtraError

# Colours by name: on white, on black. Hues are told apart without red and green (Okabe and Ito, jfly.uni-koeln.de/color); where two
# of them are near in lightness, markers and dashes differ too. `hot` is the full end of a ramp from paper, even in lightness.
COLOURS = {
    "ink": ("#1b2430", "#e6ebf1"),
    "faint": ("#5b6876", "#a3b0bd"),
    "line": ("#cfd7df", "#3a4652"),
    "soft": ("#eef2f6", "#1d2731"),
    "paper": ("#ffffff", "#12181f"),
    "hot": ("#083d6e", "#5aa9e6"),
    "frame": ("#c24d00", "#ff9d47"),
    "blue": ("#0072b2", "#4aa8e0"),
    "orange": ("#d55e00", "#f58a3c"),
    "green": ("#00805f", "#2fc49a"),
    "pink": ("#b8578f", "#e39ac2"),
    "violet": ("#5b3a8e", "#b79be0"),
    "gold": ("#b07d00", "#e6b23a"),
    "sky": ("#2b8fc4", "#8fd0f2"),
    "grey": ("#6d7985", "#97a3ae"),
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Paint:
    """Names of COLOURS; None is no fill or no stroke. `width` and `dashes` in pixels, `opacity` of the fill."""

    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dashes: tuple[float, ...] = ()
    opacity: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A polygon, or with `is_open` a line through its points. `title` is what a pointer that rests on it is told."""

    points: tuple[tuple[float, float], ...]
    paint: Paint
    is_open: bool = False
    title: str = ""

    def moved(self, dx: float, dy: float) -> Shape:
        return replace(self, points=tuple((x + dx, y + dy) for x, y in self.points))


@dataclass(frozen=True)
class Text:
    """`anchor` is "start", "middle" or "end"; `y` is the base line. `turned`: a quarter turn to the left."""

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: str = "start"
    colour: str = "ink"
    bold: bool = False
    turned: bool = False

    def moved(self, dx: float, dy: float) -> Text:
        return replace(self, x=self.x + dx, y=self.y + dy)


Element = Shape | Text


@dataclass(frozen=True)
class Drawing:
    """`title` and `description` are what somebody is told who does not see it."""

    width: float
    height: float
    title: str
    description: str
    elements: tuple[Element, ...]


def box(x: float, y: float, width: float, height: float, paint: Paint, title: str = "") -> Shape:
    return Shape(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), paint, title=title)


def line(points: Iterable[tuple[float, float]], paint: Paint, title: str = "") -> Shape:
    return Shape(tuple(points), paint, is_open=True, title=title)


def regular(x: float, y: float, radius: float, corners: int, *, turn: float = 0.0, inner: float | None = None) -> Shape:
    """A regular polygon without paint; with an `inner` radius a star. `turn` in degrees."""
    count = corners if inner is None else 2 * corners
    points = []
    for number in range(count):
        reach = radius if inner is None or number % 2 == 0 else inner
        angle = math.radians(turn - 90 + 360 * number / count)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return Shape(tuple(points), Paint())


def estimate_width(text: str, size: float) -> float:
    """About how wide a text is, in pixels: nobody here has the fonts."""
    return sum(0.34 if letter in "iljtf.,:;'|()[] " else 0.58 for letter in text) * size


def stack(drawings: Sequence[Drawing], *, title: str, description: str, columns: int = 1, gap: float = 18.0) -> Drawing:
    """Several drawings as one, row by row."""
    elements: list[Element] = []
    y = width = 0.0
    for start in range(0, len(drawings), columns):
        x, row = 0.0, drawings[start : start + columns]
        for drawing in row:
            elements += [element.moved(x, y) for element in drawing.elements]
            x += drawing.width + gap
        width = max(width, x - gap)
        y += max(drawing.height for drawing in row) + gap
    return Drawing(width, max(0.0, y - gap), title, description, tuple(elements))


# ---- SVG


def paint_inline(drawing: Drawing, *, name: str) -> str:
    """An <svg> for a page that has `stylesheet()`. `name` makes its ids its own."""
    head = f'<svg class="picture" viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}"'
    return f'{head} role="img" aria-labelledby="{name}-title {name}-text">{_names(drawing, name)}{_body(drawing)}</svg>'


def paint_svg(drawing: Drawing) -> str:
    """An SVG file that stands alone, in light colours on white."""
    margin = 12
    width, height = _n(drawing.width + 2 * margin), _n(drawing.height + 2 * margin)
    rules = "".join(_rules(name, light) for name, (light, _) in COLOURS.items())
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="{-margin} {-margin} {width} {height}" role="img" aria-labelledby="picture-title picture-text">'
        f"{_names(drawing, 'picture')}<style>text{{font-family:{FONT}}}{rules}</style>"
        f'<rect x="{-margin}" y="{-margin}" width="{width}" height="{height}" fill="#ffffff"/>{_body(drawing)}</svg>\n'
    )


def stylesheet() -> str:
    """CSS of a page with pictures: its colours as variables, light and dark, and what the pictures are painted with."""
    light, dark = ("".join(f"--{name}:{pair[index]};" for name, pair in COLOURS.items()) for index in (0, 1))
    rules = "".join(_rules(name, f"var(--{name})") for name in COLOURS)
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"svg.picture text{{font-family:{FONT}}}\n{rules}"
    )


def _rules(name: str, colour: str) -> str:
    return f".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour}}}"


def _names(drawing: Drawing, name: str) -> str:
    return (
        f'<title id="{name}-title">{html.escape(drawing.title)}</title>'
        f'<desc id="{name}-text">{html.escape(drawing.description)}</desc>'
    )


def _body(drawing: Drawing) -> str:
    return "".join(_text(one) if isinstance(one, Text) else _shape(one) for one in drawing.elements)


def _shape(shape: Shape) -> str:
    paint = shape.paint
    classes = [f"f-{paint.fill}"] if paint.fill else []
    extra = "" if paint.fill else ' fill="none"'
    if paint.opacity != 1 and paint.fill:
        extra += f' fill-opacity="{_n(paint.opacity)}"'
    if paint.stroke:
        classes.append(f"s-{paint.stroke}")
        extra += f' stroke-width="{_n(paint.width)}"'
        if paint.dashes:
            extra += f' stroke-dasharray="{" ".join(map(_n, paint.dashes))}"'
    style = f' class="{" ".join(classes)}"{extra}'
    xs, ys = [x for x, _ in shape.points], [y for _, y in shape.points]
    is_box = len(shape.points) == 4 and not shape.is_open and shape.points[0][1] == shape.points[1][1]
    if is_box and shape.points == box(xs[0], ys[0], xs[1] - xs[0], ys[2] - ys[0], paint).points:
        where = f'rect x="{_n(xs[0])}" y="{_n(ys[0])}" width="{_n(xs[1] - xs[0])}" height="{_n(ys[2] - ys[0])}"'
    else:
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
        where = f'{"polyline" if shape.is_open else "polygon"} points="{points}"'
    if not shape.title:
        return f"<{where}{style}/>"
    return f"<{where}{style}><title>{html.escape(shape.title)}</title></{where.partition(' ')[0]}>"


def _text(text: Text) -> str:
    turned = f' transform="rotate(-90 {_n(text.x)} {_n(text.y)})"' if text.turned else ""
    anchor = "" if text.anchor == "start" else f' text-anchor="{text.anchor}"'
    weight = ' font-weight="600"' if text.bold else ""
    return (
        f'<text x="{_n(text.x)}" y="{_n(text.y)}" class="f-{text.colour}" font-size="{_n(text.size)}"{anchor}{weight}{turned}>'
        f"{html.escape(text.text)}</text>"
    )


def _n(number: float) -> str:
    """Hundredths of a pixel."""
    return (
        f"{number:.2f}".rstrip("0").rstrip(".").replace("-0", "0")
        if abs(number) < 0.005
        else f"{number:.2f}".rstrip("0").rstrip(".")
    )


# ---- PNG


def paint_png(drawing: Drawing, *, scale: float = 2.0) -> bytes:
    """In light colours on white, `scale` dots a pixel. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Polygon
    except ImportError as error:
        raise MissingExtraError("PNG pictures need matplotlib", hint="pip install 'voidprune[report]'") from error
    margin, points = 12.0, 0.72  # of a pixel, at 100 dots an inch
    figure = Figure(
        figsize=((drawing.width + 2 * margin) / 100, (drawing.height + 2 * margin) / 100), dpi=100, facecolor="white"
    )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-margin, drawing.width + margin)
    axes.set_ylim(drawing.height + margin, -margin)
    for order, element in enumerate(drawing.elements):
        if isinstance(element, Text):
            axes.text(
                element.x,
                element.y,
                element.text.replace("$", r"\$"),
                fontsize=element.size * points * 0.9,  # its own font is wider than those of most systems
                color=COLOURS[element.colour][0],
                ha={"start": "left", "middle": "center", "end": "right"}[element.anchor],
                va="baseline",
                rotation=90 if element.turned else 0,
                rotation_mode="anchor",
                weight="bold" if element.bold else "normal",
                zorder=order,
            )
            continue
        paint = element.paint
        stroke = COLOURS[paint.stroke][0] if paint.stroke else "none"
        dashes = (0.0, tuple(length / paint.width for length in paint.dashes)) if paint.dashes else None
        if element.is_open:
            xs, ys = zip(*element.points, strict=True)
            axes.add_line(
                Line2D(xs, ys, color=stroke, linewidth=paint.width * points, linestyle=dashes or "-", zorder=order)
            )
            continue
        fill = (*matplotlib.colors.to_rgb(COLOURS[paint.fill][0]), paint.opacity) if paint.fill else "none"
        axes.add_patch(
            Polygon(
                element.points,
                closed=True,
                facecolor=fill,
                edgecolor=stroke,
                linewidth=paint.width * points if paint.stroke else 0,
                linestyle=dashes or "-",
                zorder=order,
            )
        )
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=100 * scale, metadata={"Software": "voidprune"})
    return target.getvalue()
