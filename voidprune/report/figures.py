"""One figure and the whole model's beside it, and how figures read as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from voidprune import artifacts, tables
from voidprune.tables.figures import format_flops


@dataclass(frozen=True)
class Figure:
    """One figure and the whole model's. `unit`: layers, share, bytes, flops, seconds or plain. `ratio` is value / whole.

    `change` is a difference or ratio to the whole model with the interval that goes with it, said by `interval_of`.
    """

    key: str
    label: str
    unit: str
    value: float
    whole: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    interval_of: str = ""

    @property
    def ratio(self) -> float | None:
        return None if not self.whole else self.value / self.whole

    @property
    def share(self) -> float | None:
        """How long a bar is beside the whole model's, as far as a cost is concerned: a measured ratio before that of medians."""
        if self.unit not in ("bytes", "flops", "seconds"):
            return None
        return self.change if self.unit == "seconds" and self.change is not None else self.ratio

    @property
    def shown(self) -> str:
        return show(self.value, self.unit)

    @property
    def shown_whole(self) -> str:
        return "" if self.whole is None else show(self.whole, self.unit)

    @property
    def shown_change(self) -> str:
        """Beside the whole model, in words, with the interval: points of shares, else percent less or more."""
        if self.unit == "share" and self.change is not None:
            text = f"{self.change * 100:+.1f} points"
            return text + (
                "" if self.interval is None else f" [{self.interval[0] * 100:+.1f}, {self.interval[1] * 100:+.1f}]"
            )
        if self.unit == "plain" and self.change is not None:
            text = f"x {self.change:.4f}"
            return text + ("" if self.interval is None else f" [{self.interval[0]:.4f}, {self.interval[1]:.4f}]")
        if self.share is None:
            return ""
        if self.interval is None:
            return describe_change(self.share)
        low, high = ((end - 1) * 100 for end in self.interval)
        return f"{(self.share - 1) * 100:+.1f} % [{low:+.1f}, {high:+.1f}]"

    def to_document(self) -> artifacts.Document:
        interval = None if self.interval is None else list(self.interval)
        return {**asdict(self), "interval": interval, "ratio": self.ratio}


@dataclass(frozen=True)
class Card:
    """Figures of one question. `lacks` is the command that would add what is not there."""

    key: str
    title: str
    figures: tuple[Figure, ...]
    note: str = ""
    lacks: str = ""

    def to_document(self) -> artifacts.Document:
        return {
            "key": self.key,
            "title": self.title,
            "figures": [figure.to_document() for figure in self.figures],
            "note": self.note,
            "lacks": self.lacks,
        }


def show(value: float, unit: str) -> str:
    """A figure as a reader wants it."""
    match unit:
        case "layers":
            return f"{value:.0f}"
        case "share":
            return f"{value * 100:.1f} %"
        case "bytes":
            return tables.format_bytes(value)
        case "flops":
            return format_flops(value)
        case "seconds":
            return f"{value * 1000:.2f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def describe_change(ratio: float) -> str:
    """A ratio to the whole model as a reader says it."""
    percent = (ratio - 1) * 100
    if abs(percent) < 0.05:
        return "the same"
    if ratio > 2:
        return f"{ratio:.2f} times as much"
    form = ".1f" if abs(percent) < 10 else ".0f"
    return f"{abs(percent):{form}} % {'less' if percent < 0 else 'more'}"
