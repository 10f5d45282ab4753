"""Artefacts as text for a terminal of 80 columns: heat maps and tables. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from voidprune.execution.manifest import Manifest
from voidprune.models.sizes import ModelSizes
from voidprune.planning.costs import PROMPT_LENGTH, baseline_costs, schedule_costs
from voidprune.profiling.profile import Profile
from voidprune.schedule import LayerAction, Phase, Schedule

if TYPE_CHECKING:
    from voidprune.pipeline.planning import FreePart

_SHADES = " ░▒▓█"
_SYMBOLS = {
    LayerAction.FULL: "full",
    LayerAction.SKIP_MLP: "attention",
    LayerAction.SKIP_ATTENTION: "mlp",
    LayerAction.KV_MLP: "K/V + mlp",
    LayerAction.KV_ONLY: "K/V only",
    LayerAction.SKIP: "-",
}


def profile_table(profile: Profile) -> Table:
    """Layer x phase: activation frequency as bar and number, block influence, relative norm change."""
    statistics = {phase: profile.statistics(phase) for phase in Phase}
    table = Table(
        title=f"{profile.model.name}: LAC alpha {profile.lac.alpha:g}, {profile.calibration.num_samples} samples",
        caption="active: share of tokens; infl.: block influence; change: relative norm change",
    )
    table.add_column("layer", justify="right", no_wrap=True)
    for phase in Phase:
        table.add_column(f"{phase} active", no_wrap=True)
        table.add_column("infl.", justify="right", no_wrap=True)
        table.add_column("change", justify="right", no_wrap=True)
    for layer in range(profile.model.num_layers):
        cells: list[str] = []
        for phase in Phase:
            found = statistics[phase]
            frequency = found.activation_frequency[layer]
            cells += [
                f"{_bar(frequency)} {frequency:6.1%}",
                f"{found.block_influence[layer]:.3f}",
                f"{found.relative_norm_change[layer]:.2f}",
            ]
        table.add_row(str(layer), *cells)
    tokens = [f"{statistics[phase].num_tokens:,} tokens" for phase in Phase]
    table.add_section()
    table.add_row("", tokens[0], "", "", tokens[1], "", "")
    return table


def _bar(share: float, width: int = 6) -> str:
    steps = round(share * width * (len(_SHADES) - 1))
    cells = [min(len(_SHADES) - 1, max(0, steps - (len(_SHADES) - 1) * cell)) for cell in range(width)]
    return "".join(_SHADES[cell] for cell in cells)


def schedule_table(schedule: Schedule) -> Table:
    table = Table(title=f"{schedule.model.name}: {describe_origin(schedule)}")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("prefill")
    table.add_column("decode")
    table.add_column("in checkpoint")
    for layer in range(schedule.num_layers):
        actions = [schedule.actions(phase)[layer] for phase in Phase]
        styled = [Text(_SYMBOLS[action], style="" if action.executes else "dim") for action in actions]
        table.add_row(str(layer), *styled, "yes" if layer in schedule.union else "dropped")
    return table


def describe_origin(schedule: Schedule) -> str:
    told = (f"{name.replace('_', ' ')} {value}" for name, value in schedule.origin.items() if name != "calibration")
    return ", ".join(told) or "schedule"


def costs_table(sizes: ModelSizes, schedule: Schedule) -> Table:
    """What the schedule keeps and costs, beside the whole model."""
    costs, whole = schedule_costs(sizes, schedule), baseline_costs(sizes, schedule)
    table = Table(title="costs", caption=f"prefill and decode: prompt of {PROMPT_LENGTH} tokens")
    table.add_column("")
    table.add_column("whole model", justify="right", no_wrap=True)
    table.add_column("schedule", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for phase in Phase:
        executed = schedule.num_executed(phase)
        table.add_row(
            f"layers executed in {phase}",
            str(schedule.num_layers),
            str(executed),
            f"{executed / schedule.num_layers:.2f}",
        )
    rows = [
        ("weights", whole.weight_bytes, costs.weight_bytes, format_bytes),
        ("K/V a token", whole.kv_bytes_per_token, costs.kv_bytes_per_token, format_bytes),
        ("prefill arithmetic", whole.prefill_flops, costs.prefill_flops, _format_flops),
        ("decode: read a token", whole.decode_bytes, costs.decode_bytes, format_bytes),
    ]
    for name, before, after, form in rows:
        table.add_row(name, form(before), form(after), f"{after / before:.2f}" if before else "-")
    return table


def evaluation_table(document: Mapping[str, Any]) -> Table:
    runners: Sequence[Mapping[str, Any]] = document["runners"]
    answered = bool(runners[0]["accuracy"])
    caption = "accuracy with 95 % Wilson interval" if answered else None
    table = Table(title=f"evaluation of {document['model']} on {document['dataset']}", caption=caption)
    table.add_column("")
    for result in runners:
        table.add_column(result["name"], justify="right", no_wrap=True)
    if runners[0]["perplexity"] is not None:
        table.add_row(
            f"perplexity of {runners[0]['num_scored']:,} given tokens",
            *(f"{result['perplexity']:.4f}" for result in runners),
        )
    tasks = runners[0]["accuracy"]
    for task, first in tasks.items():
        cells = []
        for result in runners:
            low, high = result["accuracy"][task]["interval"]
            cells.append(f"{result['accuracy'][task]['share']:.1%} [{low * 100:.0f}-{high * 100:.0f}]")
        table.add_row(f"{task} ({first['num_items']} items)", *cells)
    if document["different_responses"] is not None and answered:
        table.add_section()
        table.add_row(
            "responses that differ, reference to onnx", *[""] * (len(runners) - 1), str(document["different_responses"])
        )
    return table


def free_part_table(free: FreePart) -> Table:
    """What can go at no loss: the schedule, and each phase apart where both were cut."""
    table = Table(
        title=f"beside the whole model, allowed {free.comparison.bound:.1%}",
        caption="estimate (upper end of a one-sided 95 % interval) on items that no layer was chosen by",
    )
    table.add_column("")
    for name in ("prefill", "decode", "perplexity up"):
        table.add_column(name, justify="right", no_wrap=True)
    tasks = list(free.comparison.accuracy)
    for task in tasks:
        table.add_column(f"{task} down".replace("-", " "), justify="right")
    for name, (schedule, comparison) in {**free.parts, "found": (free.schedule, free.comparison)}.items():
        losses = [comparison.perplexity, *(comparison.accuracy[task] for task in tasks)]
        table.add_row(
            name if name == "found" else f"{name} alone",
            *(f"{schedule.num_executed(phase)} of {schedule.num_layers}" for phase in Phase),
            *(f"{loss.estimate:.2%} ({loss.upper:.2%})" for loss in losses),
        )
    return table


def comparison_table(document: Mapping[str, Any]) -> Table:
    """Criteria at equal cost, best first; the winner's lead, and whether it is larger than the noise."""
    asked = document["measure"] == "accuracy"
    tasks = list(document["whole"]["accuracy"] or ())
    table = Table(
        title=f"criteria at equal cost: {document['model']['name']}, {document['dataset']}",
        caption=f"{document['num_judging']} items that no layer was chosen by; * leads by more than chance (95 %)",
    )
    table.add_column("keep", no_wrap=True)
    table.add_column("criterion", no_wrap=True)
    for name in (*tasks, *(("mean",) if asked else ()), "ppl x"):
        table.add_column(name.replace("-", " "), justify="right", min_width=5)
    before = None
    for row in document["rows"]:
        budget = (row["scope"], row["keep"])
        if budget != before:
            table.add_section()
        shares = [row["accuracy"][task]["share"] for task in tasks] if asked else []
        leads = row["margin"] is not None and row["margin"][1] > 0
        table.add_row(
            f"{row['scope']} {row['keep']:g}" if budget != before else "",
            row["criterion"] + (" *" if leads else ""),
            *(f"{share:.0%}" for share in shares),
            *([f"{sum(shares) / len(shares):.1%}"] if asked else []),
            f"{row['perplexity_ratio']:.3g}",
        )
        before = budget
    return table


def benchmark_table(document: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"prompt {document['prompt_length']}, {document['num_new_tokens']} new tokens, {document['provider']}",
        caption=f"median of {document['num_rounds']} interleaved rounds (quartiles) and ratio; {document['machine']}",
    )
    table.add_column("")
    for name in ("TTFT ms", "TPOT ms", "weights", "peak RSS"):
        table.add_column(name, justify="right", no_wrap=True)
    for timing in document["timings"]:
        table.add_row(
            timing["name"],
            *(f"{_spread(timing[key])} x{timing[f'{key}_ratio']['median']:.2f}" for key in ("ttft", "tpot")),
            format_bytes(timing["weight_bytes"]),
            format_bytes(timing["peak_resident_bytes"]),
        )
    return table


def manifest_table(manifest: Manifest) -> Table:
    table = Table(title=f"bundle of {manifest.source}", show_header=False)
    schedule = manifest.schedule
    rows = {
        "layers in checkpoint": f"{len(manifest.kept_layers)} of {schedule.num_layers}",
        "executed in prefill": str(schedule.num_executed(Phase.PREFILL)),
        "executed in decode": str(schedule.num_executed(Phase.DECODE)),
        "weights": f"{format_bytes(manifest.sizes['model.safetensors'])} {manifest.dtype}, "
        f"of {format_bytes(manifest.source_bytes)}",
        "graphs": ", ".join(
            f"{graph.file} {format_bytes(manifest.sizes[graph.file])}" for graph in manifest.graphs.values()
        )
        or "none",
        "written by": manifest.written_by,
    }
    if manifest.parity is not None:
        parity = manifest.parity
        onnx = "" if parity.onnx is None else f", graphs {parity.onnx:.2g}"
        rows["difference from reference"] = f"checkpoint {parity.hf:.2g}{onnx} (allowed {parity.tolerance:.2g})"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def format_bytes(count: float) -> str:
    """Decimal units, as disks and downloads are counted."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _format_flops(count: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PFLOP"


def _spread(spread: Mapping[str, float]) -> str:
    """Seconds as milliseconds."""
    return f"{spread['median'] * 1e3:.2f} ({spread['low'] * 1e3:.2f}-{spread['high'] * 1e3:.2f})"
