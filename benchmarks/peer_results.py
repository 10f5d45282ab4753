"""What `benchmarks/peers.py` found: a row a runtime, as Markdown, and as ratios that can be accepted and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voidprune.quality.regressions import invert_ratio
from voidprune.quality.spreads import Spread


@dataclass(frozen=True)
class Row:
    """A runtime beside ours: seconds, ratios to ours and to the floor (see `voidprune.quality.floors`), over the rounds."""

    name: str
    beside: str
    prefill: Spread
    decode: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    prefill_floor_ratio: Spread
    decode_floor_ratio: Spread
    load_seconds: float
    disk_bytes: int
    resident_bytes: int
    same_tokens: str


def ratios_of(result: Mapping[str, Any]) -> dict[str, Spread]:
    """Less is better: ours over the floor, and ours over each of the others."""
    found = {}
    for row in result["rows"]:
        for phase in ("prefill", "decode"):
            if row["name"] == row["beside"]:
                found[f"{phase}: {row['name']} / floor"] = Spread(**row[f"{phase}_floor_ratio"])
            else:
                found[f"{phase}: {row['beside']} / {row['name']}"] = invert_ratio(Spread(**row[f"{phase}_ratio"]))
    return found


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"{result['model']}, {result['layers']} layers, keep {result['keep'] or 1}; threads: {result['threads']}; prefill of "
        f"{result['prompt']}, decode behind {result['context']}; median of {result['rounds']} rounds with its "
        f"{result['confidence']:.0%} interval; {result['machine']}",
        "",
        "| runtime | prefill ms | / ours | / floor | decode ms | / ours | / floor | load s | disk | resident | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["name"]]
        for phase in ("prefill", "decode"):
            cells.append(f"{row[phase]['median'] * 1e3:.1f}")
            for ratio in ("ratio", "floor_ratio"):
                found = row[f"{phase}_{ratio}"]
                cells.append(f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})")
        cells += [f"{row['load_seconds']:.1f}", f"{row['disk_bytes'] / 1e6:,.0f} MB"]
        cells += [f"{row['resident_bytes'] / 1e6:,.0f} MB", row["same_tokens"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
