"""Numbers as text, the same way in every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def format_spread(spread: Mapping[str, float]) -> str:
    """Seconds as milliseconds."""
    return f"{spread['median'] * 1e3:.2f} ({spread['low'] * 1e3:.2f}-{spread['high'] * 1e3:.2f})"


def draw_bar(share: float, width: int = 6) -> str:
    steps = round(share * width * (len(SHADES) - 1))
    cells = [min(len(SHADES) - 1, max(0, steps - (len(SHADES) - 1) * cell)) for cell in range(width)]
    return "".join(SHADES[cell] for cell in cells)
