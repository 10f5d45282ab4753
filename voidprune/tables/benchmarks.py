"""Times and sizes, beside the whole model and beside what the machine can do at best."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from voidprune.models.packed import PACKED_PRECISIONS
from voidprune.tables.figures import format_bytes

_NAME_WIDTH = 20  # about as wide as the figures
_PHASES = (("loaded", "loaded"), ("prefilled", "after prefill"), ("decoded", "after decode"))


def benchmark_table(document: Mapping[str, Any]) -> Table:
    """A column a bundle, and the ratio of the last to the first."""
    timings: Sequence[Mapping[str, Any]] = document["timings"]
    threads = "" if document["threads"] is None else f", threads: {document['threads']}"
    table = Table(
        title=f"{document['provider']}{threads}; TTFT by prompt, TPOT by context, over {document['num_new_tokens']} tokens",
        caption=_caption(document),
    )
    table.add_column("")
    for timing in timings:
        name = "\n".join(textwrap.wrap(timing["name"], _NAME_WIDTH))
        table.add_column(f"{name}\n{timing['precision']}", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for phase, label in (("prefill", "TTFT"), ("decode", "TPOT")):
        for cases in zip(*(timing[phase] for timing in timings), strict=True):
            _add_case(table, label, cases)
    table.add_section()
    table.add_row("load ms", *(_format_spread(timing["load_seconds"], 1e3) for timing in timings), "")
    _add_bytes(table, "weights", [timing["weight_bytes"] for timing in timings])
    _add_bytes(table, "on disk", [timing["disk_bytes"] for timing in timings])
    table.add_section()
    for phase, label in _PHASES:
        _add_bytes(table, f"RSS {label}", [timing["resident_bytes"][phase] for timing in timings])
    _add_bytes(table, "peak RSS", [timing["peak_resident_bytes"] for timing in timings])
    if timings[0]["device_bytes"] is not None:
        for phase, label in _PHASES:
            _add_bytes(table, f"card {label}", [timing["device_bytes"][phase] for timing in timings])
    return table


def _add_case(table: Table, label: str, cases: Sequence[Mapping[str, Any]]) -> None:
    unit, factor = ("s", 1.0) if cases[0]["seconds"]["median"] >= 10 else ("ms", 1e3)
    rows = f" x{cases[0]['num_rows']}" if cases[0]["num_rows"] > 1 else ""
    table.add_row(
        f"{label} {unit}, {cases[0]['length']}{rows}",
        *(_format_spread(case["seconds"], factor) for case in cases),
        _format_spread(cases[-1]["ratio"]),
    )
    table.add_row("  x floor", *(_format_spread(case["floor_ratio"]) for case in cases), "")
    if cases[0]["joules"] is not None:
        table.add_row("  joules", *(f"{case['joules']:.3g}" for case in cases), "")


def _add_bytes(table: Table, label: str, counts: Sequence[int]) -> None:
    table.add_row(label, *map(format_bytes, counts), f"{counts[-1] / counts[0]:.2f}")


def _caption(document: Mapping[str, Any]) -> str:
    first, last = document["timings"][0], document["timings"][-1]
    bounds = {case["bound"] for timing in (first, last) for case in (*timing["prefill"], *timing["decode"])}
    floor = f"floor: what {' or '.join(sorted(bounds))} alone takes, measured in the same rounds"
    if document["num_rounds"] == 1:
        parts = ["one round, so there are no intervals: how far these figures may be off is not known", floor]
    else:
        parts = [
            f"median of {document['num_rounds']} interleaved rounds ({document['confidence']:.0%} interval)",
            floor,
            f"widest interval of a ratio: {document['widest']:.0%} of it",
        ]
    if first["precision"] in PACKED_PRECISIONS:
        parts.append(f"the whole model is packed in {first['precision']}, too")
    parts.append("no energy counter" if document["energy"] is None else f"joules of the {document['energy']}")
    return "; ".join((*parts, document["machine"]))


def _format_spread(spread: Mapping[str, float], factor: float = 1.0) -> str:
    median, low, high = (spread[name] * factor for name in ("median", "low", "high"))
    places = 2 if median < 10 else 1 if median < 100 else 0
    if low == high:  # one round
        return f"{median:.{places}f}"
    return f"{median:.{places}f} ({low:.{places}f}-{high:.{places}f})"
