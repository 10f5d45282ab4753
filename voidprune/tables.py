"""Artefacts as text for a terminal of 80 columns: heat maps and tables. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from voidprune.execution.manifest import Manifest
from voidprune.models.sizes import ModelSizes
from voidprune.planning.costs import PROMPT_LENGTH, baseline_costs, schedule_costs
from voidprune.profiling.profile import Profile
from voidprune.schedule import LayerAction, Phase, Schedule

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


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="criteria at equal budget", caption="accuracy on the validation split; * the best of its budget"
    )
    table.add_column("prefill, decode")
    table.add_column("criterion", no_wrap=True)
    tasks = list(rows[0]["accuracy"])
    for name in ("weights", *tasks, "mean"):
        table.add_column(name.replace("-", " "), justify="right", min_width=5)
    for row in rows:
        shares = list(row["accuracy"].values())
        table.add_row(
            f"{row['keep_prefill']:g}, {row['keep_decode']:g}",
            row["criterion"] + (" *" if row["chosen"] else ""),
            format_bytes(row["weight_bytes"]),
            *(f"{share:.0%}" for share in shares),
            f"{sum(shares) / len(shares):.1%}",
        )
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
