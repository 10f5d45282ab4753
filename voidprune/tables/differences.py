"""Two schedules or two profiles, A and B, beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from voidprune.planning.costs import PROMPT_LENGTH
from voidprune.schedule import LayerAction, Phase
from voidprune.tables.figures import format_bytes, format_flops
from voidprune.tables.heat_maps import ACTION_NAMES, actions_map

_SIDES = ("A", "B")
_COSTS = {
    "weight_bytes": ("weights", format_bytes),
    "kv_bytes_per_token": ("K/V a token", format_bytes),
    "prefill_flops": ("prefill arithmetic", format_flops),
    "decode_bytes": ("decode: read a token", format_bytes),
}


def diff_tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """What a document of schema voidprune.diff/1 says."""
    parts: list[RenderableType] = [
        Text(f"{side}  {path}", overflow="fold") for side, path in zip(_SIDES, document["paths"], strict=True)
    ]
    parts.append(_settings_table(document))
    if document["kind"] == "profile":
        return [*parts, *(_measures_table(document, phase) for phase in Phase)]
    parts.append(_draw_actions(document))
    if any(document["different_layers"].values()):
        parts.append(_actions_table(document))
    else:
        parts.append(Text("No layer differs in either phase.\n"))
    return [*parts, _costs_table(document)]


def _settings_table(document: Mapping[str, Any]) -> RenderableType:
    """Those that differ, as a table; how many are the same, below."""
    table = Table(title="how they were made")
    table.add_column("")
    for side in _SIDES:
        table.add_column(side, overflow="fold")
    for one in document["settings"]:
        if not one["same"]:
            table.add_row(one["name"], *("-" if value is None else str(value) for value in one["values"]))
    same = ", ".join(one["name"] for one in document["settings"] if one["same"])
    if not table.row_count:
        return Text("They were made in the same way.\n")
    table.caption = f"the same: {same}" if same else None
    return table


def _draw_actions(document: Mapping[str, Any]) -> RenderableType:
    rows = [
        (f"{phase} {side}", [LayerAction(name) for name in document["actions"][phase][index]])
        for phase in map(str, Phase)
        for index, side in enumerate(_SIDES)
    ]
    marks = {layer for layers in document["different_layers"].values() for layer in layers}
    count = f"{len(marks)} of {document['num_layers']} layers differ"
    return actions_map(count, rows, marks=marks)


def _actions_table(document: Mapping[str, Any]) -> Table:
    table = Table(title="layers that differ")
    table.add_column("layer", justify="right", no_wrap=True)
    for phase in Phase:
        for side in _SIDES:
            table.add_column(f"{phase} {side}", no_wrap=True)
    different = {phase: set(document["different_layers"][phase]) for phase in Phase}
    for layer in sorted(set[int]().union(*different.values())):
        cells = []
        for phase in Phase:
            style = "bold" if layer in different[phase] else "dim"
            cells += [Text(ACTION_NAMES[LayerAction(side[layer])], style=style) for side in document["actions"][phase]]
        table.add_row(str(layer), *cells)
    return table


def _costs_table(document: Mapping[str, Any]) -> Table:
    costs = document["costs"]
    table = Table(title="costs")
    table.add_column("")
    for name in (*_SIDES, "B / A"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, values: list[Any], form: Any) -> None:
        known = None not in values
        ratio = f"{values[1] / values[0]:.2f}" if known and values[0] else "-"
        table.add_row(name, *("not known" if value is None else form(value) for value in values), ratio)

    for phase in Phase:
        add(f"layers executed in {phase}", document["executed"][phase], str)
    add("layers in checkpoint", document["in_checkpoint"], str)
    shown = [key for key in _COSTS if any(side is not None and key in side for side in costs)]
    for key in shown:
        name, form = _COSTS[key]
        add(name, [None if side is None else side.get(key) for side in costs], form)
    if not shown:
        table.caption = "bytes and arithmetic: add --profile, a profile of the model"
    elif "prefill_flops" in shown:
        table.caption = f"prefill and decode: prompt of {PROMPT_LENGTH} tokens"
    return table


def _measures_table(document: Mapping[str, Any], phase: Phase) -> Table:
    """B - A of every layer and measure."""
    measures = {name: found[phase] for name, found in document["measures"].items()}
    are_sure = all(found["standing_out"] is not None for found in measures.values())
    table = Table(
        title=f"{phase}: B - A",
        caption="active in points. " + ("* the two 95 % intervals do not overlap" if are_sure else _UNSURE),
    )
    table.add_column("", justify="right", no_wrap=True)
    for name in measures:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in range(document["num_layers"]):
        cells = []
        for name, found in measures.items():
            difference = found["values"][1][layer] - found["values"][0][layer]
            stands_out = layer in (found["standing_out"] or ())
            shown = f"{round(difference * 100, 1) or 0:+.1f}" if name == "active" else _signed(difference)
            cells.append(Text(f"{shown} {'*' if stands_out else ' '}", style="bold" if stands_out else "dim"))
        table.add_row(str(layer), *cells)
    table.add_section()
    correlations = (found["rank_correlation"] for found in measures.values())
    table.add_row("order", *("-" if one is None else f"{one:.2f}  " for one in correlations))
    assert isinstance(table.caption, str)
    table.caption += "; order: rank correlation of the layers, 1 where both rank them alike"
    return table


_UNSURE = "One of the two has too few samples for intervals"


def _signed(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 100 else f"{round(value, 3) or 0:+.3f}"
