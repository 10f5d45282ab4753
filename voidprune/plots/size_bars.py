"""What a model's bytes are spent on, whole and pruned, as bars one above the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voidprune.plots.drawing import Drawing, Element, Paint, Text, box, estimate_width

LABEL, WIDTH, BAR = 118.0, 900.0, 30.0

_PAINTS = {
    "embedding": Paint(fill="gold", stroke="paper", width=1),
    "kept": Paint(fill="hot", stroke="paper", width=1),
    "dropped": Paint(fill="paper", stroke="grey", width=1.2, dashes=(3, 3)),
    "head": Paint(fill="pink", stroke="paper", width=1),
}


@dataclass(frozen=True)
class Part:
    """`kind` is one of embedding, kept, dropped, head. `shown` is its bytes as text."""

    kind: str
    name: str
    bytes: int
    shown: str


@dataclass(frozen=True)
class Bar:
    name: str
    parts: tuple[Part, ...]


def draw_size_bars(bars: Sequence[Bar], *, model: str) -> Drawing:
    """All to one scale: the longest is as wide as there is room. Parts too narrow for their name have it in the legend alone."""
    longest = max(sum(part.bytes for part in bar.parts) for bar in bars) or 1
    elements: list[Element] = []
    y = 4.0
    for bar in bars:
        elements.append(Text(0, y + BAR * 0.62, bar.name, 12, bold=True))
        x = LABEL
        for part in bar.parts:
            width = part.bytes / longest * WIDTH
            title = f"{bar.name}: {part.name}, {part.shown}"
            elements.append(box(x, y, width, BAR, _PAINTS[part.kind], title))
            for text in (f"{part.name}, {part.shown}", part.shown):
                if estimate_width(text, 11) + 8 < width:
                    colour = "ink" if part.kind == "dropped" else "paper"
                    elements.append(Text(x + width / 2, y + BAR * 0.62, text, 11, "middle", colour))
                    break
            x += width
        y += BAR + 10
    x = LABEL
    for kind, name in dict.fromkeys((part.kind, part.name) for bar in bars for part in bar.parts):
        elements += [box(x, y, 14, 12, _PAINTS[kind]), Text(x + 20, y + 10.5, name, 11)]
        x += 44 + estimate_width(name, 11)
    told = [f"{bar.name}: " + ", ".join(f"{part.name} {part.shown}" for part in bar.parts) for bar in bars]
    return Drawing(LABEL + WIDTH, y + 18, f"{model}: what the bytes are spent on", "; ".join(told), tuple(elements))
