"""Layers across, measures and phases down, with what the schedule does drawn over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voidprune.plots.drawing import Drawing, Element, Paint, Text, box, line
from voidprune.schedule import LayerAction, Phase, Schedule

LABEL, PHASE, ROW, GAP = 142.0, 56.0, 21.0, 9.0
WIDTH = 1100.0
"""What a page gives, in pixels; cells are as wide as fits, between 11 and 62."""
WORDS = {
    LayerAction.FULL: ("runs", "●", "runs whole"),
    LayerAction.SKIP_MLP: ("attn", "a", "attention only"),
    LayerAction.SKIP_ATTENTION: ("mlp", "m", "MLP only"),
    LayerAction.KV_MLP: ("mlp,kv", "m", "MLP, and keys and values are written"),
    LayerAction.KV_ONLY: ("K/V", "k", "only keys and values are written"),
    LayerAction.SKIP: ("-", "-", "left out"),
}
"""What a layer does: in a cell, in a narrow cell, and in words."""

TURN = 0.6
"""From this shade on, text is in the colour of the paper: what keeps it legible in light and dark."""

_KEPT = Paint(stroke="frame", width=2)
_CACHED = Paint(stroke="frame", width=1.4, dashes=(2.0, 2.5))


@dataclass(frozen=True)
class Row:
    """One measure: `shades` in [0, 1] and `texts`, one a layer; `phase` None is both. `titles` tell what a cell stands for."""

    phase: Phase | None
    shades: tuple[float, ...]
    texts: tuple[str, ...]
    titles: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Rows with one name. `is_first` of its kind: `heading` stands above it."""

    name: str
    rows: tuple[Row, ...]
    heading: str = ""


def cell_width(num_layers: int) -> float:
    return float(max(11, min(62, (WIDTH - LABEL - PHASE) // num_layers)))


def draw_heat_map(
    groups: Sequence[Group], schedule: Schedule | None, *, num_layers: int, title: str, description: str
) -> Drawing:
    """Layer numbers, the schedule where there is one, then the groups. Frames are what runs in the phase of a row."""
    cell = cell_width(num_layers)
    left, y = LABEL + PHASE, 26.0
    elements: list[Element] = [Text(left - 8, 15, "layer", 11, "end", "faint")]
    step = 1 if cell >= 18 else 5
    for layer in range(0, num_layers, step):
        elements.append(Text(left + (layer + 0.5) * cell, 15, str(layer), 11, "middle", "faint"))
    if schedule is not None:
        elements.append(Text(0, y + 14, "schedule", 12, bold=True))
        for phase in Phase:
            elements.append(Text(left - 8, y + 14, str(phase), 11, "end", "faint"))
            elements += _draw_actions(schedule, phase, left, y, cell)
            y += ROW
        y += GAP
    for group in groups:
        if group.heading:
            elements.append(Text(0, y + 13, group.heading, 11, colour="faint"))
            y += 20
        elements.append(Text(0, y + 14, group.name, 12))
        for row in group.rows:
            elements.append(Text(left - 8, y + 14, str(row.phase or "both"), 11, "end", "faint"))
            elements += _draw_row(row, left, y, cell)
            if schedule is not None and row.phase is not None:
                elements += _frame_actions(schedule, row.phase, left, y, cell)
            y += ROW + (3 if len(group.rows) > 1 else 0)
        y += GAP
    return Drawing(left + num_layers * cell + 4, y, title, description, tuple(elements))


def draw_strip(schedule: Schedule, *, width: float = 200.0) -> Drawing:
    """The schedule alone, small: two rows of cells."""
    cell, height = width / schedule.num_layers, 15.0
    elements: list[Element] = []
    inset = 1.0 if cell >= 5 else 0.25
    for number, phase in enumerate(Phase):
        y = 1 + number * (height + 4)
        elements.append(Text(0, y + 11.5, str(phase), 11, colour="faint"))
        for layer, action in enumerate(schedule.actions(phase)):
            title = f"layer {layer}, {phase}: {WORDS[action][2]}"
            x = 50 + layer * cell
            elements.append(box(x + inset, y, cell - 2 * inset, height, _action_paint(action), title))
            if action.writes_kv and not action.executes:
                elements.append(line([(x + inset, y + height - 2), (x + cell - inset, y + height - 2)], _STRIPE))
    names = [f"{phase} runs {schedule.num_executed(phase)} of {schedule.num_layers} layers" for phase in Phase]
    return Drawing(50 + width, 2 * height + 6, "The schedule, layer by layer", "; ".join(names), tuple(elements))


_STRIPE = Paint(stroke="hot", width=3)


def _action_paint(action: LayerAction) -> Paint:
    if action is LayerAction.FULL:
        return Paint(fill="hot")
    if action.executes:
        return Paint(fill="hot", opacity=0.55)
    return Paint(fill="soft", stroke="line", width=1)


def _draw_actions(schedule: Schedule, phase: Phase, left: float, y: float, cell: float) -> list[Element]:
    elements: list[Element] = []
    for layer, action in enumerate(schedule.actions(phase)):
        x = left + layer * cell
        words = WORDS[action]
        elements.append(
            box(x + 1, y + 1, cell - 2, ROW - 3, _action_paint(action), f"layer {layer}, {phase}: {words[2]}")
        )
        text, size = (words[0], 10.0) if cell >= 40 else (words[1], min(10.0, cell - 3))
        colour = "paper" if action is LayerAction.FULL else "ink" if action.executes or action.writes_kv else "faint"
        elements.append(Text(x + cell / 2, y + 13.5, text, size, "middle", colour))
    return elements


def _draw_row(row: Row, left: float, y: float, cell: float) -> list[Element]:
    elements: list[Element] = [box(left + 1, y + 1, len(row.shades) * cell - 2, ROW - 3, Paint(fill="soft"))]
    for layer, (shade, text, title) in enumerate(zip(row.shades, row.texts, row.titles, strict=True)):
        x = left + layer * cell
        elements.append(box(x + 1, y + 1, cell - 2, ROW - 3, Paint(fill="hot", opacity=round(shade, 3)), title))
        if text:
            elements.append(Text(x + cell / 2, y + 13.5, text, 10, "middle", "paper" if shade > TURN else "ink"))
    return elements


def _frame_actions(schedule: Schedule, phase: Phase, left: float, y: float, cell: float) -> list[Element]:
    """Around neighbours that run, a frame; around those that only write keys and values, a dotted one."""
    elements: list[Element] = []
    start, actions = 0, schedule.actions(phase)
    for layer in range(len(actions) + 1):
        if layer < len(actions) and _kind(actions[layer]) == _kind(actions[start]):
            continue
        if (paint := _kind(actions[start])) is not None:
            inset = 0.0 if paint is _KEPT else 0.5
            elements.append(
                box(
                    left + start * cell + inset,
                    y + inset,
                    (layer - start) * cell - 2 * inset,
                    ROW - 1 - 2 * inset,
                    paint,
                )
            )
        start = layer
    return elements


def _kind(action: LayerAction) -> Paint | None:
    return _KEPT if action.executes else _CACHED if action.writes_kv else None
