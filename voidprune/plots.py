"""Results as pictures, SVG or PNG, the same from run to run. matplotlib is imported when a picture is made."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from voidprune.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST_OF = {"bytes": "weight_bytes", "decode": "decode_bytes", "prefill": "prefill_flops"}
AXIS_OF = {
    "bytes": "bytes of the checkpoint",
    "decode": "bytes read per output token",
    "prefill": "arithmetic of the prompt",
}
# Colours that are told apart without red and green (Okabe and Ito), and a marker each; a second round is dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vPX"


def plot_comparison(document: Mapping[str, Any]) -> str:
    """Quality against cost, a panel a scope and a line a criterion, as SVG. Costs are shares of the whole model's."""
    rows = document["rows"]
    scopes = list(dict.fromkeys(row["scope"] for row in rows))
    names = list(dict.fromkeys(row["criterion"] for row in sorted(rows, key=lambda row: row["criterion"])))
    figure = _new_figure(4.2 * len(scopes), 4.4)
    whole_quality = _quality(document["whole"])
    for number, scope in enumerate(scopes):
        axes = figure.add_subplot(1, len(scopes), number + 1)
        whole_cost = document["whole"]["costs"][COST_OF[scope]]
        axes.axhline(whole_quality, color="#777777", linewidth=1, linestyle=":")
        for index, name in enumerate(names):
            points = sorted(
                (row["costs"][COST_OF[scope]] / whole_cost, _quality(row))
                for row in rows
                if row["scope"] == scope and row["criterion"] == name
            )
            axes.plot(
                [cost for cost, _ in points],
                [quality for _, quality in points],
                label=name,
                **line_style(index, name),
            )
        axes.set_xlabel(f"{AXIS_OF[scope]}, share of the whole model's")
        if number == 0:
            axes.set_ylabel("mean accuracy" if document["measure"] == "accuracy" else "loss, nats a token")
        axes.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncol=6, frameon=False)
    figure.suptitle(f"{document['model']['name']}: criteria at equal cost (dotted: the whole model)")
    figure.tight_layout(rect=(0, 0.19, 1, 1))
    return _svg(figure)


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
            style = line_style(index, name)
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


def line_style(index: int, name: str) -> dict[str, Any]:
    """How the line of a criterion looks: another one for each of twice seven rankings; searches are black and thick."""
    if name.startswith("search"):
        dashes = "-" if name == "search-loss" else "--"
        return {"color": "black", "marker": "*", "markersize": 9, "linewidth": 2.2, "linestyle": dashes}
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    dashes = "-" if index < len(COLOURS) else "--"
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.1, "linestyle": dashes}


def _quality(row: Mapping[str, Any]) -> float:
    if row["accuracy"] is None:
        return float(row["loss"])
    shares = [task["share"] for task in row["accuracy"].values()]
    return float(sum(shares) / len(shares))


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("pictures need matplotlib", hint="pip install 'voidprune[report]'") from error
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
