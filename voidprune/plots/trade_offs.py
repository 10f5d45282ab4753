"""Quality against cost: every criterion and control, and what was shipped, beside the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from voidprune.plots.axes import Scale, draw_frame, span
from voidprune.plots.drawing import Drawing, Element, Paint, Text, box, estimate_width, line, stack
from voidprune.plots.marks import PREDICTED, SHIPPED, WHOLE, Mark, draw_legend, draw_whiskers, mark_of

WIDTH, HEIGHT = 356.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 30.0, 60.0

AXES = {
    "bytes": ("weight_bytes", "Size", "bytes of the checkpoint"),
    "prefill": ("prefill_flops", "Prompt", "arithmetic of the prompt"),
    "decode": ("decode_bytes", "Each output token", "bytes read per output token"),
}
"""Of each scope of a comparison: the cost that is held equal there, and the names of its panel and axis."""


@dataclass(frozen=True)
class Point:
    """`cost` is a share of the whole model's. `interval` is that of the quality, `cost_interval` that of the cost."""

    name: str
    cost: float
    quality: float
    interval: tuple[float, float] | None = None
    cost_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One chart. `points` are of criteria; `whole` is at cost 1; `predicted` and `measured` are of what was shipped.

    `axis` names the cost of `points` and `predicted`; `measured_axis`, where something was measured, that of `measured`.
    """

    scope: str
    title: str
    axis: str
    points: tuple[Point, ...]
    whole: Point
    predicted: Point | None = None
    measured: Point | None = None
    measured_axis: str = ""

    @property
    def everything(self) -> tuple[Point, ...]:
        shipped = [point for point in (self.predicted, self.measured) if point is not None]
        return (*self.points, self.whole, *shipped)


def is_accuracy(document: Mapping[str, Any]) -> bool:
    return bool(document["measure"] == "accuracy")


def comparison_panels(document: Mapping[str, Any]) -> list[Panel]:
    """A panel for each scope that was compared. Quality is mean accuracy, or perplexity as a multiple of the whole model's."""
    panels = []
    for scope in dict.fromkeys(row["scope"] for row in document["rows"]):
        key, title, axis = AXES[scope]
        whole_cost = document["whole"]["costs"][key]
        points = [
            Point(row["criterion"], row["costs"][key] / whole_cost, _quality(row))
            for row in document["rows"]
            if row["scope"] == scope
        ]
        panels.append(Panel(scope, title, axis, tuple(points), Point("whole model", 1.0, _quality(document["whole"]))))
    return panels


def _quality(row: Mapping[str, Any]) -> float:
    if row["accuracy"] is None:
        return float(row["perplexity_ratio"])
    shares = [task["share"] for task in row["accuracy"].values()]
    return float(sum(shares) / len(shares))


def draw_panel(panel: Panel, *, accuracy: bool) -> Drawing:
    """Without a legend."""
    found = panel.everything
    costs = [cost for point in found for cost in (point.cost, *(point.cost_interval or ()))]
    qualities = [quality for point in found for quality in (point.quality, *(point.interval or ()))]
    x_low, x_high = span([*costs, 1.0])
    x_scale = Scale(max(0.0, x_low), x_high, LEFT, WIDTH - RIGHT)
    if accuracy:
        y_scale = Scale(max(-0.02, min(qualities) - 0.05), min(1.02, max(qualities) + 0.05), HEIGHT - BOTTOM, TOP)
    else:  # upside down: less is better
        y_scale = Scale(min(qualities) * 0.97, max(*qualities, 1.1) * 1.03, TOP, HEIGHT - BOTTOM, is_log=True)
    axis = f"{panel.axis}, % of the whole model's"
    elements: list[Element] = [Text(LEFT - 42, 14, panel.title, 13, bold=True)]
    frame_scale = y_scale if accuracy else Scale(y_scale.low, y_scale.high, TOP, HEIGHT - BOTTOM, is_log=True)
    elements += _frame(x_scale, frame_scale, axis, accuracy)
    y_whole = y_scale.at(panel.whole.quality)
    elements.append(line([(LEFT, y_whole), (WIDTH - RIGHT, y_whole)], Paint(stroke="ink", width=1, dashes=(2, 3))))
    names = [point.name for point in panel.points]
    if names and len(set(names)) == len(names) and x_scale.at(max(point.cost for point in panel.points)) < 0.6 * WIDTH:
        elements += _label_points(panel.points, x_scale, y_scale, y_whole)
    for name in dict.fromkeys(names):
        elements += _draw_curve(
            [point for point in panel.points if point.name == name], mark_of(name), x_scale, y_scale, accuracy
        )
    elements += _draw_shipped(panel, x_scale, y_scale, accuracy)
    if panel.measured is not None:
        words = f"filled star: {panel.measured_axis}, % of the whole model's"
        elements.append(Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, words, 11, "middle"))
    whole = panel.whole
    if whole.interval is not None:
        elements += draw_whiskers(x_scale.at(1), _places(y_scale, whole.interval), Paint(stroke="ink", width=1.2))
    elements.append(WHOLE.draw(x_scale.at(1), y_whole, _told(whole, accuracy)))
    return Drawing(
        WIDTH, HEIGHT, f"Quality against {panel.axis}", describe_panel(panel, accuracy=accuracy), tuple(elements)
    )


def _frame(x_scale: Scale, y_scale: Scale, axis: str, accuracy: bool) -> list[Element]:
    if accuracy:
        return draw_frame(
            x_scale, y_scale, x_name=axis, y_name="mean accuracy, %", x_form=_percent, y_form=_percent, num_y_ticks=5
        )
    # The frame is drawn at the lower edge, which is the end of an axis that is upside down.
    elements: list[Element] = []
    for tick in y_scale.ticks(4):
        y = y_scale.at(tick)
        elements += [
            line([(LEFT, y), (WIDTH - RIGHT, y)], Paint(stroke="line")),
            Text(LEFT - 6, y + 4, f"{tick:g}", 11, "end", "faint"),
        ]
    bottom = Scale(0, 1, HEIGHT - BOTTOM, TOP)
    below = draw_frame(x_scale, bottom, x_name=axis, x_form=_percent, y_form=lambda _tick: "", num_y_ticks=1)
    below = [one for one in below if isinstance(one, Text) or one.paint.stroke != "line"]
    name = Text(LEFT - 42, (TOP + HEIGHT - BOTTOM) / 2, "perplexity, multiple", 11, "middle", turned=True)
    return [*elements, *below, name]


def _draw_curve(points: Sequence[Point], mark: Mark, x_scale: Scale, y_scale: Scale, accuracy: bool) -> list[Element]:
    ordered = sorted(points, key=lambda point: point.cost)
    places = [(x_scale.at(point.cost), y_scale.at(point.quality)) for point in ordered]
    elements: list[Element] = [line(places, mark.stroke)] if len(places) > 1 else []
    elements += [mark.draw(x, y, _told(point, accuracy)) for (x, y), point in zip(places, ordered, strict=True)]
    return elements


def _draw_shipped(panel: Panel, x_scale: Scale, y_scale: Scale, accuracy: bool) -> list[Element]:
    elements: list[Element] = []
    if panel.predicted is not None and panel.measured is not None:
        ends = [(x_scale.at(one.cost), y_scale.at(one.quality)) for one in (panel.predicted, panel.measured)]
        elements.append(line(ends, Paint(stroke="frame", width=1.2, dashes=(3, 2))))
    for point, mark in ((panel.predicted, PREDICTED), (panel.measured, SHIPPED)):
        if point is None:
            continue
        x, y = x_scale.at(point.cost), y_scale.at(point.quality)
        if point.interval is not None:
            elements += draw_whiskers(x, _places(y_scale, point.interval), Paint(stroke="frame", width=1.4))
        if point.cost_interval is not None:
            paint = Paint(stroke="frame", width=1.4)
            elements += draw_whiskers(y, _places(x_scale, point.cost_interval), paint, upright=False)
        elements.append(mark.draw(x, y, _told(point, accuracy), radius=7.5))
    return elements


def _places(scale: Scale, interval: tuple[float, float]) -> tuple[float, float]:
    return scale.at(interval[0]), scale.at(interval[1])


def _label_points(points: Sequence[Point], x_scale: Scale, y_scale: Scale, y_whole: float) -> list[Element]:
    """Names to the right of points that stand one above the other, moved apart where they would overlap, with a hair line each."""
    size, pitch = 10.0, 11.5
    x = max(x_scale.at(point.cost) for point in points) + 20
    top, bottom = sorted((y_scale.start, y_scale.end))
    wanted = sorted((y_scale.at(point.quality), point.name, x_scale.at(point.cost)) for point in points)
    if any(abs(y - y_whole) < pitch for y, _, _ in wanted):  # what was exported often lies on that line
        top = max(top, y_whole + 15)
    places: list[float] = []
    for y, _, _ in wanted:
        places.append(max(y, places[-1] + pitch if places else top))
    over = places[-1] - (bottom - 7)
    for index in range(len(places) - 1, -1, -1):  # from below, as far up as it takes
        if over <= 0:
            break
        places[index] -= over
        over = pitch - (places[index] - places[index - 1]) if index else 0.0
    elements: list[Element] = []
    for (y, _, start), place in zip(wanted, places, strict=True):
        elements.append(line([(start + 6, y), (x - 3, place)], Paint(stroke="line", width=1)))
    for (_, name, _), place in zip(wanted, places, strict=True):
        halo = Paint(fill="paper", opacity=0.85)
        elements.append(box(x - 2, place - 5.5, estimate_width(name, size) + 4, 11, halo))
        elements.append(Text(x, place + 3.5, name, size, colour="faint" if mark_of(name).is_hollow else "ink"))
    return elements


def legend_entries(panels: Sequence[Panel]) -> list[tuple[str, Mark]]:
    """Everything that any panel shows: what matters most first."""
    entries: list[tuple[str, Mark]] = [("whole model", WHOLE)]
    if any(panel.measured is not None for panel in panels):
        entries.append(("this export, measured", SHIPPED))
    if any(panel.predicted is not None for panel in panels):
        entries.append(("this export, by its cost", PREDICTED))
    names = dict.fromkeys(point.name for panel in panels for point in panel.points)
    order = sorted(names, key=lambda name: (not name.startswith("search"), mark_of(name).is_hollow))
    return entries + [(name, mark_of(name)) for name in order]


def draw_trade_offs(panels: Sequence[Panel], *, model: str, accuracy: bool) -> Drawing:
    """All panels and their legend as one picture."""
    drawings = [draw_panel(panel, accuracy=accuracy) for panel in panels]
    width = len(drawings) * (WIDTH + 18) - 18
    legend = draw_legend(legend_entries(panels), width=width)
    title = f"{model}: quality against cost"
    description = " ".join(drawing.description for drawing in drawings)
    row = stack(drawings, title=title, description="", columns=len(drawings))
    return stack([row, legend], title=title, description=description)


def plot_comparison(document: Mapping[str, Any]) -> Drawing:
    """What `voidprune compare --plot` draws."""
    return draw_trade_offs(comparison_panels(document), model=document["model"]["name"], accuracy=is_accuracy(document))


def describe_panel(panel: Panel, *, accuracy: bool) -> str:
    """The chart in words."""
    told = [f"{panel.title}, against {panel.axis}: {_told(panel.whole, accuracy)}."]
    told += [f"{_told(point, accuracy)}." for point in (panel.predicted, panel.measured) if point is not None]
    if panel.points:
        best, worst = max(panel.points, key=_goodness(accuracy)), min(panel.points, key=_goodness(accuracy))
        told.append(f"Best {_told(best, accuracy)}; worst {_told(worst, accuracy)}.")
    return " ".join(told)


def _goodness(accuracy: bool) -> Any:
    return lambda point: point.quality if accuracy else -point.quality


def _told(point: Point, accuracy: bool) -> str:
    quality = f"{point.quality:.1%} accuracy" if accuracy else f"perplexity x {point.quality:.4g}"
    return f"{point.name}: {quality} at {point.cost:.0%} of the cost"


def _percent(value: float) -> str:
    return f"{value * 100:g}"
