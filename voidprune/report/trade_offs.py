"""Quality against size and against time: what was compared, and what was exported, as points of three charts.

Where time was measured it is shown as measured. Where it was not, the cost that decides it is shown, under its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from voidprune import artifacts
from voidprune.plots.trade_offs import AXES, Panel, Point, comparison_panels, is_accuracy
from voidprune.quality.statistics import wilson_interval
from voidprune.report.findings import Findings
from voidprune.report.summary import find_costs, judged_runner, mean_accuracy, whole_runner
from voidprune.report.timings import read_timings

NAME = "this export"


def has_accuracy(findings: Findings) -> bool:
    """Whether quality is accuracy here; otherwise it is perplexity as a multiple of the whole model's."""
    if findings.comparison is not None:
        return is_accuracy(findings.comparison)
    return findings.evaluation is not None and mean_accuracy(judged_runner(findings.evaluation)) is not None


def make_panels(findings: Findings) -> list[Panel]:
    """Size, prompt, output token; those without any point but the whole model are left out."""
    accuracy = has_accuracy(findings)
    panels = {panel.scope: panel for panel in comparison_panels(findings.comparison)} if findings.comparison else {}
    if findings.comparison is not None and accuracy:
        interval = _wilson(findings.comparison["whole"]["accuracy"])
        panels = {
            scope: replace(panel, whole=replace(panel.whole, interval=interval)) for scope, panel in panels.items()
        }
    quality = _exported_quality(findings, accuracy=accuracy)
    if quality is None:
        return list(panels.values())
    exported, whole = quality
    shown = []
    for scope, (key, title, axis) in AXES.items():
        panel = panels.get(scope) or Panel(scope, title, axis, (), whole)
        predicted, measured, measured_axis = None, None, ""
        if (costs := find_costs(findings)) is not None:
            share = asdict(costs[1])[key] / asdict(costs[0])[key]
            predicted = replace(exported, cost=share, name=f"{NAME}, by its cost")
        if scope == "bytes" and findings.manifest is not None and findings.manifest.source_bytes:
            share = findings.manifest.graph_weight_bytes / findings.manifest.source_bytes
            measured, measured_axis = replace(exported, cost=share), "bytes on disk"
            if predicted is not None and abs(predicted.cost - share) < 0.01:
                predicted = None
        elif scope != "bytes" and findings.benchmark is not None:
            timings = read_timings(findings.benchmark)
            ratio = timings.pruned.ttft_ratio if scope == "prefill" else timings.pruned.tpot_ratio
            interval = (ratio.low, ratio.high) if timings.interval_name else None
            measured_axis = "measured TTFT" if scope == "prefill" else "measured TPOT"
            measured = replace(exported, cost=ratio.median, cost_interval=interval)
        panel = replace(panel, predicted=predicted, measured=measured, measured_axis=measured_axis)
        if len(panel.everything) > 1:
            shown.append(panel)
    return shown


def _exported_quality(findings: Findings, *, accuracy: bool) -> tuple[Point, Point] | None:
    """Of what was evaluated, and of the whole model on the same items; None where they are not known."""
    if findings.evaluation is None:
        return None
    judged, whole = judged_runner(findings.evaluation), whole_runner(findings.evaluation)
    if whole is None:
        return None
    if accuracy:
        value, before = mean_accuracy(judged), mean_accuracy(whole)
        if value is None or before is None:
            return None
        return (
            Point(NAME, 1.0, value, _wilson(judged["accuracy"])),
            Point("whole model", 1.0, before, _wilson(whole["accuracy"])),
        )
    ratio = judged["against_whole"]["perplexity_ratio"]
    if ratio is None:
        return None
    low, high = ratio["interval"]
    return Point(NAME, 1.0, float(ratio["value"]), (float(low), float(high))), Point("whole model", 1.0, 1.0)


def _wilson(accuracy: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of the mean over tasks that have as many items each: of all items together; else None."""
    counts = {task["num_items"] for task in accuracy.values()}
    if len(counts) != 1:
        return None
    total = sum(task["num_items"] for task in accuracy.values())
    return wilson_interval(round(sum(task["share"] * task["num_items"] for task in accuracy.values())), total)


def explain_panels(findings: Findings, panels: list[Panel]) -> str:
    """Which items the points are measured on, and which costs stand for time."""
    told = []
    comparison, evaluation = findings.comparison, findings.evaluation
    if comparison is not None:
        told.append(
            f"Criteria and controls: {comparison['num_judging']} items that no layer was chosen by; dotted line and square: the "
            "whole model on the same items."
        )
    if evaluation is not None and any(panel.measured or panel.predicted for panel in panels):
        others = " other" if comparison is not None else ""
        whole = whole_runner(evaluation)
        before = mean_accuracy(whole) if whole is not None else None
        level = f", on which the whole model has {before:.1%}" if before is not None and comparison is not None else ""
        told.append(f"This export: {evaluation['num_items']}{others} items of {evaluation['dataset']}{level}.")
    timed = [panel.measured_axis for panel in panels if panel.scope != "bytes" and panel.measured is not None]
    if timed:
        told.append(
            f"Filled stars lie at the {' and '.join(timed)}; every other point was not timed and lies at its cost, which the "
            "axis names."
        )
    elif panels:
        told.append("Nothing here was timed: points lie at their cost, which the axis names.")
    return " ".join(told)


def panels_document(panels: list[Panel], *, accuracy: bool) -> artifacts.Document:
    """For the twin of the page."""
    return {
        "quality": "accuracy" if accuracy else "perplexity_ratio",
        "panels": [
            {
                "scope": panel.scope,
                "cost": panel.axis,
                "points": [asdict(point) for point in panel.points],
                "whole": asdict(panel.whole),
                "predicted": None if panel.predicted is None else asdict(panel.predicted),
                "measured": None if panel.measured is None else asdict(panel.measured),
                "measured_cost": panel.measured_axis or None,
            }
            for panel in panels
        ],
    }
