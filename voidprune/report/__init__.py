"""Everything that was found in a folder, as one self-contained HTML page. Reads files; measures nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

import voidprune
from voidprune import tables
from voidprune.export.model_card import caveats
from voidprune.planning.costs import baseline_costs, schedule_costs
from voidprune.profiling.profile import Profile
from voidprune.report.findings import Findings, collect_findings
from voidprune.schedule import LayerAction, Phase, Schedule


def render_report(folder: Path) -> str:
    """One HTML page without external requests. Raises ArtifactError."""
    findings = collect_findings(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("voidprune", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = tables.format_bytes
    schedule, profile = findings.schedule, findings.profile
    costs = None
    if schedule is not None and profile is not None:
        costs = (asdict(baseline_costs(profile.sizes, schedule)), asdict(schedule_costs(profile.sizes, schedule)))
    return environment.get_template("page.html.j2").render(
        findings=findings,
        summary=_summary(findings),
        heat_map=_draw_heat_map(profile, schedule),
        origin="" if schedule is None else tables.describe_origin(schedule),
        caveats=caveats(findings.manifest) if findings.manifest is not None else [],
        costs=costs,
        phases=list(Phase),
        version=voidprune.__version__,
    )


def _summary(findings: Findings) -> list[tuple[str, str, str]]:
    """The figures above the fold: (what, value, beside which value of the whole model)."""
    rows: list[tuple[str, str, str]] = []
    if (schedule := findings.schedule) is not None:
        for phase in Phase:
            rows.append((f"layers run in {phase}", str(schedule.num_executed(phase)), f"of {schedule.num_layers}"))
    if (manifest := findings.manifest) is not None:
        size = tables.format_bytes(manifest.graph_weight_bytes)
        rows.append(("weights", size, f"of {tables.format_bytes(manifest.source_bytes)}"))
    if findings.evaluation is not None:
        first, last = findings.evaluation["runners"][0], findings.evaluation["runners"][-1]
        if first["accuracy"]:
            rows.append(
                ("mean accuracy", f"{_mean_accuracy(last):.1%}", f"{first['name']}: {_mean_accuracy(first):.1%}")
            )
    if findings.benchmark is not None:
        pruned_timing = findings.benchmark["timings"][-1]
        for key, label in (("ttft", "time to first token"), ("tpot", "time per output token")):
            rows.append(
                (
                    label,
                    f"{pruned_timing[key]['median'] * 1000:.2f} ms",
                    f"{pruned_timing[f'{key}_ratio']['median']:.2f} x whole model",
                )
            )
    return rows


def _mean_accuracy(result: Mapping[str, Any]) -> float:
    shares = [task["share"] for task in result["accuracy"].values()]
    return float(sum(shares) / len(shares))


_MEASURES = (
    ("activation_frequency", "LAC activation frequency"),
    ("block_influence", "block influence"),
    ("relative_norm_change", "relative norm change"),
    ("attention_influence", "attention, 1 - cosine"),
    ("mlp_influence", "MLP, 1 - cosine"),
)
_MARKS = {
    LayerAction.FULL: "runs",
    LayerAction.SKIP_MLP: "attn",
    LayerAction.SKIP_ATTENTION: "mlp",
    LayerAction.KV_MLP: "kv+mlp",
    LayerAction.KV_ONLY: "kv",
    LayerAction.SKIP: "-",
}


def _draw_heat_map(profile: Profile | None, schedule: Schedule | None) -> str:
    """Layer x phase as SVG: a row a measure and phase, and a row a phase with what the schedule does."""
    if profile is None:
        return ""
    num_layers, cell, left, height = profile.model.num_layers, 34, 230, 24
    rows: list[str] = []
    y = 22
    for layer in range(num_layers):
        rows.append(f'<text x="{left + layer * cell + cell / 2}" y="14" class="number">{layer}</text>')
    for name, label in _MEASURES:
        for phase in Phase:
            values: Sequence[float] = getattr(profile.statistics(phase), name)
            rows.append(f'<text x="{left - 8}" y="{y + 16}" class="label">{html.escape(label)}, {phase}</text>')
            top = 1.0 if name == "activation_frequency" else max(*values, 1e-12)
            for layer, value in enumerate(values):
                share = min(1.0, value / top)
                x = left + layer * cell
                shown = f"{value:.2f}".removeprefix("0")
                rows.append(
                    f"<g><title>layer {layer}, {phase}: {html.escape(label)} {value:.4f}</title>"
                    f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{height - 2}" class="heat" fill-opacity="{share:.3f}"/>'
                    f'<text x="{x + cell / 2 - 1}" y="{y + 15}" class="value{" light" if share > 0.55 else ""}">{shown}</text></g>'
                )
            y += height
        y += 6
    for phase in Phase if schedule is not None else ():
        assert schedule is not None
        rows.append(f'<text x="{left - 8}" y="{y + 16}" class="label">schedule, {phase}</text>')
        for layer, action in enumerate(schedule.actions(phase)):
            x = left + layer * cell
            kind = "runs" if action.executes else "cached" if action.writes_kv else "dropped"
            rows.append(
                f"<g><title>layer {layer}, {phase}: {action}</title>"
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{height - 2}" class="{kind}"/>'
                f'<text x="{x + cell / 2 - 1}" y="{y + 15}" class="value{" light" if kind == "runs" else ""}">'
                f"{_MARKS[action]}</text></g>"
            )
        y += height
    width = left + num_layers * cell
    return (
        f'<svg viewBox="0 0 {width} {y + 4}" role="img" style="min-width:{min(width, 640)}px" '
        f'aria-label="Heat map of {num_layers} layers by phase and measure, with the schedule below">{"".join(rows)}</svg>'
    )
