"""Axes of a chart: from values to pixels, and the frame with ticks, grid and names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from voidprune.plots.drawing import Element, Paint, Text, line

GRID = Paint(stroke="line", width=1)


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` at pixels `start` to `end`; with `is_log` by their logarithm. Values beyond are put at the end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __post_init__(self) -> None:
        assert self.low < self.high, "an axis without length"

    def at(self, value: float) -> float:
        low, high, value = (
            math.log(x) if self.is_log else x
            for x in (self.low, self.high, max(value, 1e-300) if self.is_log else value)
        )
        share = (min(max(value, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within it."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            candidates = powers if last - first > 2 else [factor * power for power in powers for factor in (1, 2, 5)]
            inside = [tick for tick in candidates if self.low * 0.999 <= tick <= self.high * 1.001]
            return inside[:: max(1, math.ceil(len(inside) / (count + 1)))]
        rough = (self.high - self.low) / max(1, count)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def span(values: Sequence[float], *, pad: float = 0.06) -> tuple[float, float]:
    """From the least to the most, and some more on both sides."""
    low, high = min(values), max(values)
    more = (high - low) * pad or abs(high) * pad or 1.0
    return low - more, high + more


def draw_frame(
    x_scale: Scale,
    y_scale: Scale,
    *,
    x_name: str = "",
    y_name: str = "",
    x_form: Callable[[float], str],
    y_form: Callable[[float], str],
    x_ticks: Sequence[float] | None = None,
    num_y_ticks: int = 4,
    size: float = 11.0,
) -> list[Element]:
    """Grid lines of y, the lower edge, ticks and names. Names go below and, turned, to the left."""
    elements: list[Element] = []
    left, right, bottom, top = x_scale.start, x_scale.end, y_scale.start, y_scale.end
    for tick in y_scale.ticks(num_y_ticks):
        y = y_scale.at(tick)
        elements.append(line([(left, y), (right, y)], GRID))
        elements.append(Text(left - 6, y + size * 0.35, y_form(tick), size, "end", "faint"))
    elements.append(line([(left, bottom), (right, bottom)], Paint(stroke="faint", width=1)))
    for tick in x_scale.ticks() if x_ticks is None else x_ticks:
        x = x_scale.at(tick)
        elements.append(line([(x, bottom), (x, bottom + 4)], Paint(stroke="faint", width=1)))
        elements.append(Text(x, bottom + 5 + size, x_form(tick), size, "middle", "faint"))
    if x_name:
        elements.append(Text((left + right) / 2, bottom + 12 + 2 * size, x_name, size, "middle", "ink"))
    if y_name:
        elements.append(Text(left - 42, (top + bottom) / 2, y_name, size, "middle", "ink", turned=True))
    return elements
