"""LAC token by token, and interventions at every depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from voidprune.schedule import Phase
from voidprune.tables.figures import SHADES, format_level, format_share, split_columns

_PARTS = ("scored", "generated")


def adaptive_tables(document: Mapping[str, Any]) -> list[Table]:
    """LAC at run time: the results of all runs side by side, then which layers counted in them."""
    runs: Sequence[Mapping[str, Any]] = document["runs"]
    settings = document["settings"]
    sampling = settings["sampling"]
    how = "greedy" if sampling is None else f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}"
    results = Table(
        title=f"LAC at run time: {document['model']} on {document['dataset']}",
        caption=f"{how}; LAC in {settings['arithmetic']}; 95 % Wilson intervals; same: answers equal to the whole model's",
    )
    accuracies = _accuracy_tables(runs)
    for name in ("alpha", "run"):
        results.add_column(name, justify="right" if name == "alpha" else "left", no_wrap=True)
    if runs[0]["perplexity"] is not None:
        results.add_column("perplexity", justify="right", no_wrap=True)
    if runs[0]["accuracy"]:
        results.add_column("same", justify="right", no_wrap=True)
    for run in runs:
        cells = [] if run["perplexity"] is None else [format_level(run["perplexity"], 4)]
        if run["accuracy"]:
            cells.append(str(run["same_as_whole"]))
        results.add_row(*_run_name(run), *cells)
    usage = Table(
        title=f"which of the {document['num_layers']} layers counted (prefill, decode)",
        caption="use: share of layers and tokens that are active; last: share of tokens whose last layer is active; "
        "depth: layers up to the last active one, on average, where logits were used",
    )
    histogram = Table(
        title="last active layers", caption="tokens by the number of layers up to the last active one, from none to all"
    )
    for table in (usage, histogram):
        table.add_column("alpha", justify="right", no_wrap=True)
        table.add_column("run", no_wrap=True)
    for name in ("use", "last", "depth"):
        usage.add_column(name, justify="right", no_wrap=True)
    for phase in Phase:
        histogram.add_column(str(phase), no_wrap=True)
    for run in runs[1:]:
        for part in (part for part in _PARTS if part in run["usage"]):
            counted = run["usage"][part]
            shares = (
                ", ".join(_share(counted[phase], key) for phase in Phase) for key in ("mean_use", "last_layer_share")
            )
            usage.add_row(*_run_name(run, part), *shares, f"{counted['read']['mean_depth']:.2f}")
            histogram.add_row(*_run_name(run, part), *(_strip(counted[phase]["depths"]) for phase in Phase))
        for part in _PARTS:
            if "executed" in (rule := run["rules"][part]):
                executed = (f"{rule['executed'][phase] / document['num_layers']:.0%}" for phase in Phase)
                usage.add_row(*_run_name(run, part), ", ".join(executed))
    return [results, *accuracies, usage, histogram]


def _accuracy_tables(runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Shares of right answers with their intervals, as many tasks side by side as 80 columns hold."""
    names = {f"{task} ({first['num_items']})": task for task, first in runs[0]["accuracy"].items()}
    longest = max(len(run["name"]) for run in runs)
    tables = []
    shown = iter(names.values())
    for headings in split_columns(list(names), room=80 - 9 - longest - 3, cell=8):
        table = Table(title="right answers")
        for name in ("alpha", "run"):
            table.add_column(name, justify="right" if name == "alpha" else "left", no_wrap=True)
        for heading in headings:
            table.add_column(heading.name, justify="right", width=heading.width, overflow="fold")
        tasks = [next(shown) for _ in headings]
        for run in runs:
            table.add_row(*_run_name(run), *(format_share(run["accuracy"][task]) for task in tasks))
        tables.append(table)
    return tables


def probe_tables(document: Mapping[str, Any]) -> list[Table]:
    """Quality against depth, a table a task and scope; then from where on each intervention is harmless."""
    num_layers, margin = document["model"]["num_layers"], document["settings"]["margin"]
    results: Sequence[Mapping[str, Any]] = document["results"]
    tables = []
    for task, whole in document["whole"].items():
        for scope in dict.fromkeys(one["scope"] for one in results if one["scope"] != "any") or ("any",):
            tables.append(_curves_table(task, whole, [one for one in results if one["scope"] in (scope, "any")], scope))
    verdicts = Table(
        title=f"{document['model']['name']}, {num_layers} layers: harmless up to {margin:.2%}",
        caption="harmless from: first of the layers from which on no task loses more, with 95 % confidence; "
        f"unharmed from: the same of the losses that were seen{_shortage(document)}",
    )
    for name in ("intervention", "scope", "harmless from", "unharmed from", "share of layers"):
        verdicts.add_column(name, justify="left" if name in ("intervention", "scope") else "right", no_wrap=True)
    for one in results:
        shown = ["-" if depth is None else str(depth) for depth in (one["harmless_from"], one["unharmed_from"])]
        depth = one["harmless_from"] if one["harmless_from"] is not None else one["unharmed_from"]
        share = "-" if depth is None else f"{1 - depth / num_layers:.0%}"
        unsure = " unproven" if depth is not None and one["harmless_from"] is None else ""
        verdicts.add_row(one["intervention"], one["scope"], *shown, share + unsure)
    return [*tables, verdicts]


def _shortage(document: Mapping[str, Any]) -> str:
    """Which tasks have too few items for any loss to be excluded."""
    few = [
        f"{task} {whole['num_items']} of {whole['num_items_needed']}"
        for task, whole in document["whole"].items()
        if whole["num_items_needed"] is not None and whole["num_items"] < whole["num_items_needed"]
    ]
    return f". Too few items to show it, at least: {', '.join(few)}" if few else ""


def _curves_table(task: str, whole: Mapping[str, Any], results: Sequence[Mapping[str, Any]], scope: str) -> Table:
    is_answered = whole["accuracy"] is not None
    name, key = ("accuracy", "accuracy") if is_answered else ("perplexity, relative", "perplexity_ratio")
    level = f"{whole['accuracy']:.1%}" if is_answered else f"{whole['perplexity']:.3f}"
    reach = {"prompt": "the prompt", "published": "all earlier tokens", "any": "any scope"}[scope]
    switches = is_answered and any(one["intervention"] == "switch" for one in results)
    table = Table(
        title=f"{task}, {reach}: {name} ({whole['num_items']} items, whole model {level})",
        caption="depth: the first layer that sees changed states; ±: half the 95 % interval"
        + ("; donor: answers of the other prompt" if switches else ""),
    )
    table.add_column("depth", justify="right", no_wrap=True)
    for one in results:
        table.add_column({"skip-attention": "no attn"}.get(one["intervention"], one["intervention"]), justify="right")
        if switches and one["intervention"] == "switch":
            table.add_column("donor", justify="right")
    points = [{point["depth"]: point["tasks"][task] for point in one["points"]} for one in results]
    for depth in sorted({depth for curve in points for depth in curve}):
        cells = []
        for one, curve in zip(results, points, strict=True):
            found = curve[depth]
            low, high = found[key]["interval"]
            value, half = found[key]["value"], (high - low) / 2
            cells.append(f"{value:.0%}±{half * 100:.0f}" if is_answered else f"{_ratio(value)}±{_ratio(half)}")
            if switches and one["intervention"] == "switch":
                cells.append(f"{found['switched']:.0%}")
        table.add_row(str(depth), *cells)
    return table


def _ratio(value: float) -> str:
    """At most five characters, so that five curves stand side by side."""
    return format_level(value, 3) if value < 99_999 else f"{value:.0e}"


def _run_name(run: Mapping[str, Any], *parts: str) -> tuple[str, str]:
    return ("" if run["alpha"] is None else f"{run['alpha']:g}", ", ".join((run["name"], *parts)))


def _share(counted: Mapping[str, Any], key: str) -> str:
    return f"{counted[key]:.0%}" if counted["num_tokens"] else "-"


def _strip(counts: Sequence[int], width: int = 13) -> str:
    """A histogram as shades, full where most are; more values than cells share cells."""
    cells = [0] * min(width, len(counts))
    for position, count in enumerate(counts):
        cells[position * len(cells) // len(counts)] += count
    top = max(cells) or 1
    return "".join(SHADES[-(-count * (len(SHADES) - 1) // top)] for count in cells)
