"""Results as pictures: SVG text, with nothing in it that changes from run to run. matplotlib is imported when a picture is made."""

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
