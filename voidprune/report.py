"""Artefacts become tables for the terminal, or one self-contained HTML page. Reads files; measures nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

import voidprune
from voidprune import artifacts, tables
from voidprune.errors import ArtifactError
from voidprune.execution import manifest as manifests
from voidprune.execution.manifest import Manifest
from voidprune.export.model_card import caveats
from voidprune.planning.costs import baseline_costs, schedule_costs
from voidprune.profiling import profile as profiles
from voidprune.profiling.profile import Profile
from voidprune.schedule import KIND as SCHEDULE_KIND
from voidprune.schedule import LayerAction, Phase, Schedule, read_schedule


@dataclass(frozen=True)
class Findings:
    """What a folder holds. Evaluations, comparisons and benchmarks are documents of their JSON form."""

    profile: Profile | None
    schedule: Schedule | None
    manifest: Manifest | None
    evaluation: artifacts.Document | None
    comparison: artifacts.Document | None
    benchmark: artifacts.Document | None


def schema_kind(path: Path) -> str | None:
    """The kind that a JSON file says it is, or None where it is none of ours."""
    try:
        schema = json.loads(path.read_bytes()).get("schema", "")
    except (OSError, ValueError, AttributeError):
        return None
    kind = str(schema).removeprefix("voidprune.").partition("/")[0]
    return kind if str(schema).startswith("voidprune.") else None


def describe(path: Path) -> tuple[artifacts.Document, list[Any]]:
    """A file or bundle as its JSON document and as tables. Raises ArtifactError where it is none of ours."""
    file = path / manifests.FILE if path.is_dir() else path
    if not file.exists():
        raise ArtifactError(f"there is no {file}", hint="give a file or folder that voidprune wrote")
    kind = schema_kind(file)
    if kind == profiles.KIND:
        profile = profiles.read_profile(file)
        return profile.to_document(), [tables.profile_table(profile)]
    if kind == SCHEDULE_KIND:
        schedule = read_schedule(file)
        return schedule.to_document(), [tables.schedule_table(schedule)]
    if kind == manifests.KIND:
        manifest = manifests.read_manifest(file.parent)
        return manifest.to_document(), [tables.manifest_table(manifest), tables.schedule_table(manifest.schedule)]
    if kind in _RESULTS:
        document = _read_result(file, kind)
        shown = _RESULTS[kind](document)
        return document, shown if isinstance(shown, list) else [shown]
    raise ArtifactError(f"{file} is not a file of voidprune")


_RESULTS: dict[str, Callable[[artifacts.Document], Any]] = {
    "evaluation": tables.evaluation_table,
    "harness": tables.harness_table,
    "benchmark": tables.benchmark_table,
    "comparison": tables.comparison_table,
    "adaptive-evaluation": tables.adaptive_tables,
    "probe": tables.probe_tables,
}
_VERSIONS = {"comparison": 2, "evaluation": 2}


def _read_result(file: Path, kind: str) -> artifacts.Document:
    """A result file. It is whole when its table can be made. Raises ArtifactError."""
    document = artifacts.read_document(file, kind=kind, version=_VERSIONS.get(kind, 1))
    try:
        _RESULTS[kind](document)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{file} is not a whole {kind}: {error!r}", hint="measure again") from error
    return document


def collect_findings(folder: Path) -> Findings:
    """Everything of ours in a folder and, for bundles, one level below. Raises ArtifactError where there is nothing."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", hint="give the folder that holds the results")
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.json")):
        if (kind := schema_kind(file)) is not None:
            found.setdefault(kind, file)
    bundles = [manifests.read_manifest(file.parent) for file in sorted(folder.glob(f"*/{manifests.FILE}"))]
    if manifests.KIND in found:
        bundles.insert(0, manifests.read_manifest(folder))
    if not found and not bundles:
        raise ArtifactError(f"{folder} holds no results", hint="voidprune eval, bench and export write some")

    def document(kind: str) -> artifacts.Document | None:
        return _read_result(found[kind], kind) if kind in found else None

    pruned = [bundle for bundle in bundles if not bundle.schedule.is_full] or bundles
    schedule = read_schedule(found[SCHEDULE_KIND]) if SCHEDULE_KIND in found else None
    schedule = schedule or (pruned[0].schedule if pruned else None)
    profile = profiles.read_profile(found[profiles.KIND]) if profiles.KIND in found else None
    if schedule is not None and profile is not None:
        schedule.check_model(profile.model, place=f"the schedule in {folder}")
    return Findings(
        profile=profile,
        schedule=schedule,
        manifest=pruned[0] if pruned else None,
        evaluation=document("evaluation"),
        comparison=document("comparison"),
        benchmark=document("benchmark"),
    )


def render_report(folder: Path) -> str:
    """One HTML page without external requests. Raises ArtifactError."""
    findings = collect_findings(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("voidprune", "."),
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
    return environment.get_template("report.html.j2").render(
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
