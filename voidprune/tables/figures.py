"""Numbers as text, the same way in every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHADES = " ░▒▓█"
"""From nothing to all."""


def format_bytes(count: float) -> str:
    """Decimal units, as disks and downloads are counted."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PFLOP"


def format_interval(interval: Sequence[float], form: str) -> str:
    low, high = (form.format(bound) for bound in interval)
    return f"{low} to {high}"


def format_share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['share']:.1%} [{low * 100:.0f}-{high * 100:.0f}]"


def format_level(value: float, digits: int) -> str:
    """A number from 0 up with so many decimals where it is small, fewer where it is large: seven characters or so."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{max(0, digits - max(0, len(f'{value:.0f}') - 1))}f}"


@dataclass(frozen=True)
class Heading:
    """The head of a column of figures: a name that may be folded, and how many characters the column has."""

    name: str
    width: int


def split_columns(names: Sequence[str], *, room: int, cell: int) -> list[list[Heading]]:
    """As many columns side by side as `room` has place for, border and padding included, then a new table, and so on.

    A column is as wide as its figures, `cell`, or as the longest word of its name up to a dozen characters.
    """
    tables: list[list[Heading]] = []
    left = 0
    for name in names:
        text = name.replace("-", " ")
        width = max(cell, min(_LONGEST_WORD, max(map(len, text.split()))))
        if not tables or left < width + _BORDER:
            tables.append([])
            left = room
        tables[-1].append(Heading(text, width))
        left -= width + _BORDER
    return tables


_LONGEST_WORD = 12
_BORDER = 3  # a line and two blanks


def draw_bar(share: float, width: int = 6) -> str:
    steps = round(share * width * (len(SHADES) - 1))
    cells = [min(len(SHADES) - 1, max(0, steps - (len(SHADES) - 1) * cell)) for cell in range(width)]
    return "".join(SHADES[cell] for cell in cells)
