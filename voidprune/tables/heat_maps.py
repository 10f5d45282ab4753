"""A cell a layer: measures as shades, actions as signs. Read with colours, without them, and in plain ASCII."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from voidprune.profiling.profile import Profile
from voidprune.schedule import LayerAction, Phase, Schedule
from voidprune.tables.figures import SHADES

_CELL = 2  # characters
_ROUND = 10  # lines of many layers break at a multiple of this
_STEP = 5  # layers between two numbers above the cells

# Ten steps from dark to light whose lightness alone tells them apart (the colour map viridis of matplotlib, sampled evenly).
_COLOURS = (
    "#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
_FIRST_LIGHT = 6  # from this step on, digits are black

_RANGE = 1000.0
"""Largest value over the smallest that is told apart from nothing, on a scale of equal factors."""


@dataclass(frozen=True)
class Cell:
    """One layer in one row: what stands on a terminal with colours, without them, and where there is nothing but ASCII."""

    coloured: str
    style: Style
    plain: str
    ascii: str

    def draw(self, console: Console) -> tuple[str, Style]:
        if not _has_blocks(console):
            return self.ascii, Style.null()
        if console.color_system is None or console.no_color:
            return self.plain, Style.null()
        return self.coloured, self.style


@dataclass(frozen=True)
class LayerMap:
    """Rows of cells under a ruler of layer numbers, broken into as many lines as the terminal needs.

    `rows`: a label, and a cell a layer. `legend`: what cells mean, each beside one, or words alone; `note` is
    prose below.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[Cell]]]
    legend: Sequence[tuple[Cell | None, str]]
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="table.title")
        margin = max(len(label) for label, _ in self.rows) + 1
        num_layers = len(self.rows[0][1])
        for first, end in _break_lines(num_layers, (options.max_width - margin) // _CELL):
            yield Text(" " * margin + _draw_ruler(first, end), style="dim", no_wrap=True, overflow="crop")
            for label, cells in self.rows:
                line = Text(label.ljust(margin), no_wrap=True, overflow="crop")
                for cell in cells[first:end]:
                    line.append(*cell.draw(console))
                yield line
        for line in _pack_legend(console, self.legend, width=options.max_width - margin):
            yield Text(" " * margin) + line
        if self.note:
            yield Text(self.note, style="table.caption")
        yield Text("")


def profile_map(profile: Profile) -> LayerMap:
    """Every measure of every layer in both phases; the two rows of a measure share one scale."""
    statistics = {phase: profile.statistics(phase) for phase in Phase}
    rows: list[tuple[str, Sequence[Cell]]] = []
    ranges = []
    for name, attribute in _MEASURES.items():
        values = {phase: getattr(found, attribute) for phase, found in statistics.items()}
        seen = [value for phase in Phase for value in values[phase]]
        if name != "active":
            ranges.append(f"{name} from {_short(min(seen))} to {_short(max(seen))}")
        for phase in Phase:
            levels = [value if name == "active" else _log_share(value, min(seen), max(seen)) for value in values[phase]]
            label = name if phase is Phase.PREFILL else ""
            rows.append((f"{label:<6} {phase}", [_shade(level) for level in levels]))
    return LayerMap(
        title=f"{profile.model.name}: what layers do in each phase",
        rows=rows,
        legend=[(None, "least"), *((_shade(step / 4), "") for step in range(5)), (None, " most")],
        note=f"active: from 0 to 100 %; in steps of like factors {', '.join(ranges)}",
    )


_MEASURES = {
    "active": "activation_frequency",
    "layer": "block_influence",
    "change": "relative_norm_change",
    "attn": "attention_influence",
    "mlp": "mlp_influence",
}


def schedule_map(schedule: Schedule) -> LayerMap:
    """What every layer does in each phase, and which layers a checkpoint holds."""
    kept = [LayerAction.FULL if layer in schedule.union else LayerAction.SKIP for layer in range(schedule.num_layers)]
    executed = (f"{schedule.num_executed(phase)} in {phase}" for phase in Phase)
    return actions_map(
        f"{schedule.model.name}: of {schedule.num_layers} layers {' and '.join(executed)}",
        [*((str(phase), schedule.actions(phase)) for phase in Phase), ("in checkpoint", kept)],
    )


def actions_map(
    title: str, rows: Sequence[tuple[str, Sequence[LayerAction]]], *, marks: Collection[int] | None = None
) -> LayerMap:
    """Strips of actions. With `marks`, a row below that points at these layers."""
    used = {action for _, actions in rows for action in actions}
    cells: list[tuple[str, Sequence[Cell]]] = [(label, [_ACTIONS[action] for action in row]) for label, row in rows]
    if marks is not None:
        cells.append(("differs", [_MARK if layer in marks else _NO_MARK for layer in range(len(rows[0][1]))]))
    names = ACTION_NAMES | {LayerAction.SKIP: "skipped"}
    legend = [(cell, names[action]) for action, cell in _ACTIONS.items() if action in used]
    return LayerMap(title=title, rows=cells, legend=legend)


ACTION_NAMES = {
    LayerAction.FULL: "full",
    LayerAction.SKIP_MLP: "attention",
    LayerAction.SKIP_ATTENTION: "mlp",
    LayerAction.KV_MLP: "K/V + mlp",
    LayerAction.KV_ONLY: "K/V only",
    LayerAction.SKIP: "-",
}


def _sign(block: str, letter: str, colour: str) -> Cell:
    return Cell(block * _CELL, Style.parse(colour), block * _CELL, letter * _CELL)


_ACTIONS = {
    LayerAction.FULL: _sign("█", "#", "#1f9e89"),
    LayerAction.SKIP_MLP: _sign("▀", "a", "#fde725"),
    LayerAction.SKIP_ATTENTION: _sign("▄", "m", "#35b779"),
    LayerAction.KV_MLP: _sign("▟", "w", "#6ece58"),
    LayerAction.KV_ONLY: _sign("░", "k", "#26828e"),
    LayerAction.SKIP: _sign("·", ".", "dim"),
}


_MARK, _NO_MARK = (Cell(sign * _CELL, Style(bold=True), sign * _CELL, sign * _CELL) for sign in "^ ")


def _shade(level: float) -> Cell:
    """A cell for 0 .. 1: a digit from 0 to 9 on a colour, a block that is more or less full, the digit alone."""
    step = min(9, max(0, math.floor(level * 10)))
    block = SHADES[min(len(SHADES) - 1, max(0, math.floor(level * len(SHADES))))]
    ink = "#000000" if step >= _FIRST_LIGHT else "#ffffff"
    return Cell(f" {step}", Style.parse(f"{ink} on {_COLOURS[step]}"), block * _CELL, f" {step}")


def _log_share(value: float, smallest: float, largest: float) -> float:
    """Where a value lies between the smallest and the largest, in factors; the scale ends at largest / _RANGE."""
    if largest <= 0:
        return 0.0
    smallest = max(smallest, largest / _RANGE)
    if value <= smallest:
        return 0.0 if smallest < largest else 1.0
    return math.log(value / smallest) / math.log(largest / smallest)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _has_blocks(console: Console) -> bool:
    return console.encoding.startswith("utf")


def _break_lines(num_layers: int, room: int) -> Iterable[tuple[int, int]]:
    """First and end of the layers of each line."""
    if num_layers <= room:
        return [(0, num_layers)]
    size = max(_STEP, room // _ROUND * _ROUND if room >= _ROUND else room)
    return [(first, min(num_layers, first + size)) for first in range(0, num_layers, size)]


def _draw_ruler(first: int, end: int) -> str:
    numbers = (f"{layer:>{_CELL}}" for layer in range(first, end, _STEP))
    return "".join(f"{number:<{_CELL * _STEP}}" for number in numbers).rstrip()


def _pack_legend(console: Console, legend: Sequence[tuple[Cell | None, str]], *, width: int) -> Iterable[Text]:
    """As few lines as the entries need."""
    line = Text()
    for cell, text in legend:
        entry = Text(f"{text} ") if cell is None else Text.assemble(cell.draw(console), f" {text}  " if text else "")
        if line and len(line) + len(entry) > width:
            yield line
            line = Text()
        line.append_text(entry)
    if line:
        yield line
