"""TTFT over prompt lengths and TPOT over context lengths, drawn by matplotlib, which is imported when a picture is made."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from voidprune.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that are told apart without red and green (Okabe and Ito), and a marker each; a second round is dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vPX"


def plot_benchmark(document: Mapping[str, Any], *, format: str) -> bytes:
    """TTFT over prompt lengths and TPOT over context lengths, a line a bundle and batch size, as "svg" or "png".

    Bars are the intervals; dotted: the floor.
    """
    figure = _new_figure(10, 4.6)
    for number, (phase, what) in enumerate((("prefill", "TTFT"), ("decode", "TPOT"))):
        axes = figure.add_subplot(1, 2, number + 1)
        lines = [
            (timing["name"], rows, [case for case in timing[phase] if case["num_rows"] == rows])
            for timing in document["timings"]
            for rows in dict.fromkeys(case["num_rows"] for case in timing[phase])
        ]
        for index, (name, rows, cases) in enumerate(lines):
            cases = sorted(cases, key=lambda case: case["length"])
            lengths = [case["length"] for case in cases]
            style = _line_style(index)
            middle = [1e3 * case["seconds"]["median"] for case in cases]
            bars = [
                [1e3 * abs(case["seconds"]["median"] - case["seconds"][bound]) for case in cases]
                for bound in ("low", "high")
            ]
            label = name if rows == 1 else f"{name}, {rows} rows"
            axes.errorbar(lengths, middle, yerr=bars, capsize=3, label=label, **style)
            floors = [1e3 * case["floor_seconds"]["median"] for case in cases]
            axes.plot(lengths, floors, color=style["color"], linestyle=":", marker=style["marker"], markersize=3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompt, tokens" if phase == "prefill" else "context, tokens")
        axes.set_ylabel(f"{what}, ms")
        axes.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    figure.suptitle(f"{document['provider']}: dotted is what the bytes or the arithmetic alone take")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return _svg(figure).encode() if format == "svg" else _png(figure)


def _line_style(index: int) -> dict[str, Any]:
    """Another one for each of twice seven lines."""
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    dashes = "-" if index < len(COLOURS) else "--"
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.1, "linestyle": dashes}


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("pictures need matplotlib", hint="pip install 'voidprune[report]'") from error
    return Figure(figsize=(width, height))


def _svg(figure: Figure) -> str:
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "voidprune", "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": "voidprune"})
    return target.getvalue()


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=150, metadata={"Software": "voidprune"})
    return target.getvalue()
