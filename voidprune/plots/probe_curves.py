"""Quality against depth, a small chart a task and intervention: a line a scope, its interval as a band, harmless depths marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from voidprune.plots.axes import Scale, draw_frame
from voidprune.plots.drawing import Drawing, Element, Paint, Shape, Text, box, line
from voidprune.plots.marks import Mark

WIDTH, HEIGHT, GAP = 196.0, 131.0, 14.0
LEFT, TOP = 46.0, 62.0
PLOT_TOP, PLOT_BOTTOM = 13.0, 22.0

SCOPES = {
    "prompt": Mark("blue", 24),
    "published": Mark("orange", 4, dashes=(5, 3)),
    "any": Mark("blue", 24),
}
SCOPE_NAMES = {"prompt": "the prompt alone", "published": "all earlier tokens, as published", "any": "any scope"}


def draw_probe(document: Mapping[str, Any]) -> Drawing:
    """Rows are tasks, columns interventions. Green is harmless in every task, to the confidence that the probe asks for."""
    tasks, results = list(document["whole"]), document["results"]
    interventions = list(dict.fromkeys(one["intervention"] for one in results))
    num_layers = document["model"]["num_layers"]
    elements: list[Element] = []
    for column, intervention in enumerate(interventions):
        x = LEFT + column * (WIDTH + GAP)
        curves = [one for one in results if one["intervention"] == intervention]
        elements.append(Text(x, 14, intervention, 13, bold=True))
        for number, one in enumerate(curves):
            elements.append(Text(x, 30 + 14 * number, _verdict(one, len(curves) > 1), 10.5, colour="faint"))
        for row, task in enumerate(tasks):
            y = TOP + row * (HEIGHT + GAP)
            elements += _draw_small(document, task, curves, x, y, is_first=not column, is_last=row == len(tasks) - 1)
    height = TOP + len(tasks) * (HEIGHT + GAP) + 12
    width = LEFT + len(interventions) * (WIDTH + GAP)
    middle = LEFT + (width - LEFT - GAP) / 2
    elements.append(
        Text(middle, height - 4, f"depth: first of the {num_layers} layers that is disturbed", 11, "middle")
    )
    elements += _draw_key(results, height + 16)
    title = f"{document['model']['name']}: quality against the depth of an intervention"
    return Drawing(width, height + 28, title, describe_probe(document), tuple(elements))


def describe_probe(document: Mapping[str, Any]) -> str:
    """The charts in words."""
    told = []
    for one in document["results"]:
        depth, seen = one["harmless_from"], one["unharmed_from"]
        shown = (
            f"shown to be harmless from layer {depth}" if depth is not None else "not shown to be harmless at any depth"
        )
        unproven = f", no loss seen from layer {seen}" if depth is None and seen is not None else ""
        told.append(f"{one['intervention']} ({SCOPE_NAMES[one['scope']]}): {shown}{unproven}.")
    return " ".join(told)


def _verdict(curve: Mapping[str, Any], is_one_of_several: bool) -> str:
    depth, seen = curve["harmless_from"], curve["unharmed_from"]
    name = f"{curve['scope']}: " if is_one_of_several else ""
    if depth is not None:
        return f"{name}harmless from {depth}"
    return f"{name}no loss seen from {seen}" if seen is not None else f"{name}harmful to the last layer"


def _draw_small(
    document: Mapping[str, Any],
    task: str,
    curves: Sequence[Mapping[str, Any]],
    x: float,
    y: float,
    *,
    is_first: bool,
    is_last: bool,
) -> list[Element]:
    whole, num_layers = document["whole"][task], document["model"]["num_layers"]
    is_answered = whole["accuracy"] is not None
    x_scale = Scale(-0.5, num_layers - 0.5, x, x + WIDTH)
    top, bottom = y + PLOT_TOP, y + HEIGHT - PLOT_BOTTOM
    level = whole["accuracy"] if is_answered else 1.0
    if is_answered:
        y_scale, form = Scale(0, 1, bottom, top), lambda value: f"{value * 100:g}"
    else:  # the same axis in all charts of a task
        ratios = [
            point["tasks"][task]["perplexity_ratio"]["value"] for one in document["results"] for point in one["points"]
        ]
        y_scale = Scale(min(*ratios, 1.0) * 0.95, max(*ratios, 1.1) * 1.05, bottom, top, is_log=True)
        form = "{:g}".format
    elements: list[Element] = []
    for number, one in enumerate(curves):
        elements += _mark_harmless(one, x_scale, top, bottom, is_filled=not number)
    step = max(1, -(-num_layers // 8))
    frame = draw_frame(
        x_scale,
        y_scale,
        x_form=lambda value: f"{value:g}" if is_last else "",
        y_form=form if is_first else lambda _value: "",
        x_ticks=range(0, num_layers, step),
        num_y_ticks=2 if is_answered else 3,
        size=10,
    )
    elements += frame
    elements.append(line([(x, y_scale.at(level)), (x + WIDTH, y_scale.at(level))], Paint(stroke="ink", dashes=(2, 3))))
    key = "accuracy" if is_answered else "perplexity_ratio"
    for one in curves:
        mark = SCOPES[one["scope"]]
        points = [(point["depth"], point["tasks"][task][key]) for point in one["points"]]
        band = [(x_scale.at(depth), y_scale.at(found["interval"][1])) for depth, found in points]
        band += [(x_scale.at(depth), y_scale.at(found["interval"][0])) for depth, found in reversed(points)]
        elements.append(Shape(tuple(band), Paint(fill=mark.colour, opacity=0.2)))
        places = [(x_scale.at(depth), y_scale.at(found["value"])) for depth, found in points]
        elements.append(line(places, mark.stroke))
        for (px, py), (depth, found) in zip(places, points, strict=True):
            value = f"{found['value']:.1%}" if is_answered else f"x {found['value']:.4g}"
            low, high = (f"{end:.1%}" if is_answered else f"{end:.4g}" for end in found["interval"])
            title = f"{task}, {one['intervention']} from layer {depth}, {SCOPE_NAMES[one['scope']]}: {value} ({low} to {high})"
            elements.append(mark.draw(px, py, title, radius=2.6 if num_layers <= 40 else 1.6))
    if is_first:
        measure = "accuracy, %" if is_answered else "perplexity, x"
        elements.append(Text(x - 36, y + 2, f"{task}: {measure}", 11, bold=True))
    return elements


def _mark_harmless(
    curve: Mapping[str, Any], x_scale: Scale, top: float, bottom: float, *, is_filled: bool
) -> list[Element]:
    """From the depth on that is harmless: shaded for the first curve, an edge in its colour for others; grey where not shown."""
    depth, is_shown = curve["harmless_from"], True
    if depth is None:
        depth, is_shown = curve["unharmed_from"], False
    if depth is None:
        return []
    start = x_scale.at(depth - 0.5)
    colour = "green" if is_shown else "grey"
    edge = Paint(stroke=colour if is_filled else SCOPES[curve["scope"]].colour, width=1.5)
    if not is_shown:
        edge = replace(edge, dashes=(3, 3), width=1.2)
    area = box(start, top, x_scale.end - start, bottom - top, Paint(fill=colour, opacity=0.16 if is_shown else 0.12))
    return [*([area] if is_filled else []), line([(start, top), (start, bottom)], edge)]


def _draw_key(results: Sequence[Mapping[str, Any]], y: float) -> list[Element]:
    """What lines, bands and shades mean."""
    elements: list[Element] = []
    x = LEFT
    scopes = dict.fromkeys(one["scope"] for one in results if one["scope"] != "any") or {"any": None}
    for scope in scopes:
        mark = SCOPES[scope]
        elements += [line([(x, y - 4), (x + 22, y - 4)], mark.stroke), mark.draw(x + 11, y - 4, radius=2.6)]
        elements.append(Text(x + 28, y, SCOPE_NAMES[scope], 11))
        x += 50 + len(SCOPE_NAMES[scope]) * 6
    keys = (("green", 0.25, "harmless, shown"), ("grey", 0.2, "no loss seen, not shown"))
    for colour, opacity, words in keys:
        elements.append(box(x, y - 10, 16, 12, Paint(fill=colour, stroke=colour, opacity=opacity)))
        elements.append(Text(x + 22, y, words, 11))
        x += 44 + len(words) * 6
    elements.append(line([(x, y - 4), (x + 22, y - 4)], Paint(stroke="ink", dashes=(2, 3))))
    elements.append(Text(x + 28, y, "whole model", 11))
    return elements
