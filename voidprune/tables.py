"""Artefacts as text for a terminal of 80 columns: heat maps and tables. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from voidprune.execution.manifest import Fidelity, Manifest
from voidprune.models.sizes import ModelSizes
from voidprune.planning import intervals
from voidprune.planning.costs import PROMPT_LENGTH, baseline_costs, schedule_costs
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.intervals import Cut
from voidprune.profiling.profile import LayerStatistics, Profile
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


_COLUMNS = (
    ("block-influence", "layer"),
    ("relative-norm", "change"),
    ("attention-cosine", "attn"),
    ("mlp-cosine", "mlp"),
)


def profile_table(profile: Profile) -> Group:
    """A table a phase, layer by layer, then one of the spans; each figure with its interval where there is one."""
    replicates = {phase: intervals.resample_statistics(profile, [phase]) for phase in Phase}
    return Group(
        *(_layers_table(profile, phase, replicates[phase]) for phase in Phase), _spans_table(profile, replicates)
    )


def _layers_table(profile: Profile, phase: Phase, replicates: Sequence[LayerStatistics] | None) -> Table:
    statistics = profile.statistics(phase)
    spread = (
        "±: half the 95 % interval over samples" if replicates else "no intervals: fewer than two blocks of samples"
    )
    table = Table(
        title=f"{profile.model.name}, {phase}: {statistics.num_tokens:,} tokens, "
        f"{profile.calibration.num_samples} samples",
        caption=f"active: share of tokens under LAC, alpha {profile.lac.alpha:g}; change: of the state, relative; "
        f"layer, attn, mlp: 1 - cosine of the states before and after; {spread}",
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("active", no_wrap=True)
    columns: list[list[str]] = []
    for name, label in (("lac", ""), *_COLUMNS):
        criterion = CRITERIA[name]
        assert criterion.score is not None
        shares = name == "lac"
        scores = criterion.score(statistics, 0)
        ranges = intervals.score_intervals(criterion, replicates) if replicates else [None] * len(scores)
        cells = [
            _figure(score, found, "6.1%" if shares else ".3f" if score < 100 else ".0f")
            for score, found in zip(scores, ranges, strict=True)
        ]
        if shares:
            cells = [f"{_bar(score)} {cell}" for score, cell in zip(scores, cells, strict=True)]
        else:
            table.add_column(label, justify="right", no_wrap=True)
        columns.append(cells)
    for layer, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *row)
    return table


def _figure(value: float, interval: tuple[float, float] | None, form: str) -> str:
    """A value, and half the width of its interval in the same unit."""
    shown = format(value, form)
    if interval is None:
        return shown
    half = (interval[1] - interval[0]) / 2
    return f"{shown}±{half * 100:4.1f}" if form.endswith("%") else f"{shown}±{format(half, form).removeprefix('0')}"


def _spans_table(profile: Profile, replicates: Mapping[Phase, Sequence[LayerStatistics] | None]) -> Table:
    table = Table(
        title="contiguous layers over which the last token turns least",
        caption="turn: angle in half turns. again: share of resamples that choose the same layers",
    )
    table.add_column("layers", justify="right", no_wrap=True)
    for phase in Phase:
        table.add_column(str(phase), justify="right", no_wrap=True)
        table.add_column("turn", justify="right", no_wrap=True)
        table.add_column("again", justify="right", no_wrap=True)
    num_layers = profile.model.num_layers
    measured = {phase: profile.statistics(phase) for phase in Phase}
    for length in range(1, num_layers // 2 + 1):
        cells: list[str] = []
        for phase, statistics in measured.items():
            kept = CRITERIA["angular"].choose(statistics, num_layers - length)
            first = next(layer for layer in range(num_layers) if layer not in kept)
            some = (replicates[phase] or ())[:200] or None  # a share in whole percent needs no more
            cut = intervals.find_cut(CRITERIA["angular"], statistics, some, kept)
            again = "" if cut is None or cut.confidence is None else f"{cut.confidence:.0%}"
            cells += [f"{first}-{first + length - 1}", f"{statistics.angular_distances(length)[first]:.3f}", again]
        table.add_row(str(length), *cells)
    return table


def cuts_table(cuts: Mapping[Phase, Cut]) -> Table:
    """Where the kept layers of each phase end, and whether other samples would have ended them there."""
    table = Table(
        title="where the kept layers end", caption="order: whether resampled profiles rank or choose the same way"
    )
    for name in ("", "layer", "score", "95 % interval", "order"):
        table.add_column(name, justify="right" if name in ("layer", "score") else "left", no_wrap=True)
    for phase, cut in cuts.items():
        order = cut.verdict if cut.confidence is None else f"{cut.confidence:.0%}: {cut.verdict}"
        if cut.scores is None:
            table.add_row(f"{phase} as a whole", "", "", "", order)
            continue
        sides = zip((cut.last_kept, cut.first_dropped), cut.scores, cut.intervals or (None, None), strict=True)
        for verb, (layer, score, interval) in zip(("keeps", "drops"), sides, strict=True):
            shown = "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
            table.add_row(f"{phase} {verb}", str(layer), f"{score:.3g}", shown, order if verb == "drops" else "")
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


def evaluation_table(document: Mapping[str, Any]) -> Group:
    """Every runner by itself, then the last one beside the whole model, item by item, where that ran."""
    against = document["runners"][-1]["against_whole"]
    tables = [_runners_table(document)]
    if against is not None:
        tables.append(_against_table(document["runners"][-1]["name"], against))
    return Group(*tables)


def _runners_table(document: Mapping[str, Any]) -> Table:
    runners: Sequence[Mapping[str, Any]] = document["runners"]
    first = runners[0]
    table = Table(
        title=f"evaluation of {document['model']} on {document['dataset']}",
        caption=f"{document['num_items']} items, 95 % intervals",
    )
    table.add_column("")
    for result in runners:
        table.add_column(result["name"], justify="right", no_wrap=True)
    if first["perplexity"] is not None:
        table.add_row("perplexity", *(f"{result['perplexity']:.4f}" for result in runners))
        intervals = [result["perplexity_interval"] for result in runners]
        table.add_row(
            f"  {first['num_scored']:,} given tokens", *(f"[{low:.3f}-{high:.3f}]" for low, high in intervals)
        )
    for task, accuracy in first["accuracy"].items():
        found = [result["accuracy"][task] for result in runners]
        table.add_row(f"{task} ({accuracy['num_items']} items)", *map(_format_share, found))
        if accuracy["normalized"] is not None:
            table.add_row("  a character", *(_format_share(one["normalized"]) for one in found))
    if first["generation"] is not None:
        found = [result["generation"] for result in runners]
        table.add_section()
        table.add_row("mean tokens generated", *(f"{one['mean_length']['value']:.1f}" for one in found))
        table.add_row("cut at the longest", *(f"{one['cut']['value']:.1%}" for one in found))
        table.add_row("ends in a loop", *(f"{one['looping']['value']:.1%}" for one in found))
    if document["different_responses"] is not None and first["generation"] is not None:
        assert isinstance(table.caption, str)
        table.caption += f"; responses that differ, reference to onnx: {document['different_responses']}"
    return table


def _against_table(name: str, against: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{name} against the whole model, item by item",
        caption="accuracy in points; p: exact McNemar test",
    )
    for column in ("", "value", "95 % interval", "p", "lost, won"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    ratio, agreement = against["perplexity_ratio"], against["agreement"]
    if ratio is not None:
        table.add_row(
            "perplexity, ratio", f"{ratio['value']:.4f}", _format_interval(ratio["interval"], "{:.4f}"), "", ""
        )
    if agreement is not None:
        top1, kl = agreement["top1"], agreement["kl"]
        table.add_row(
            "same likeliest token", f"{top1['value']:.1%}", _format_interval(top1["interval"], "{:.1%}"), "", ""
        )
        table.add_row("KL, nats a token", f"{kl['value']:.4f}", _format_interval(kl["interval"], "{:.4f}"), "", "")
    overall = {"all tasks": against["overall"]} if len(against["accuracy"]) > 1 else {}
    for task, found in {**against["accuracy"], **overall}.items():
        table.add_row(
            task,
            f"{found['difference'] * 100:+.1f}",
            _format_interval([100 * bound for bound in found["interval"]], "{:+.1f}"),
            f"{found['p_value']:.2g}",
            f"{found['num_only_whole']}, {found['num_only_this']}",
        )
    return table


def _format_interval(interval: Sequence[float], form: str) -> str:
    low, high = (form.format(bound) for bound in interval)
    return f"{low} to {high}"


def _format_share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['share']:.1%} [{low * 100:.0f}-{high * 100:.0f}]"


def harness_table(document: Mapping[str, Any]) -> Group:
    """Every metric of every task, runner by runner, then the last one beside the whole model, where that ran."""
    runners: Sequence[Mapping[str, Any]] = document["runners"]
    last = runners[-1]
    cut = sum(runner["num_cut_contexts"] for runner in runners)
    table = Table(
        title=f"lm_eval on {document['model']}",
        caption="95 % intervals" + (f"; {cut} contexts were cut on the left to fit" if cut else ""),
    )
    against = Table(title=f"{last['name']} against the whole model, item by item")
    table.add_column("task, metric")
    for runner in runners:
        table.add_column(runner["name"], justify="right", no_wrap=True)
    for column in ("task, metric", "difference", "95 % interval", "p"):
        against.add_column(column, justify="left" if column == "task, metric" else "right", no_wrap=" " not in column)
    for name, task in last["tasks"].items():
        for metric, judged in task["metrics"].items():
            label = f"{name} {metric.removesuffix(',none')}"
            found = [runner["tasks"][name]["metrics"][metric] for runner in runners]
            table.add_row(label, *(f"{one['value']:.6g}" for one in found))
            if judged["interval"] is not None:
                intervals = ["[{:.3f}-{:.3f}]".format(*one["interval"]) for one in found]
                table.add_row(f"  {task['num_items']} items", *intervals)
            if (difference := judged["against_whole"]) is not None:
                p_value = "" if difference["p_value"] is None else f"{difference['p_value']:.2g}"
                interval = _format_interval(difference["interval"], "{:+.3f}")
                against.add_row(label, f"{difference['difference']:+.4f}", interval, p_value)
    return Group(table, against) if against.row_count else Group(table)


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
    results.add_column("alpha", justify="right", no_wrap=True)
    results.add_column("run", no_wrap=True)
    if runs[0]["perplexity"] is not None:
        results.add_column("perplexity", justify="right", no_wrap=True)
    for task, first in runs[0]["accuracy"].items():
        results.add_column(f"{task} ({first['num_items']})", justify="right")
    if runs[0]["accuracy"]:
        results.add_column("same", justify="right")
    for run in runs:
        cells = [] if run["perplexity"] is None else [f"{run['perplexity']:.4f}"]
        for result in run["accuracy"].values():
            low, high = result["interval"]
            cells.append(f"{result['share']:.1%} [{low * 100:.0f}-{high * 100:.0f}]")
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
    return [results, usage, histogram]


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
            cells.append(f"{value:.0%}±{half * 100:.0f}" if is_answered else f"{value:.4g}±{half:.2g}")
            if switches and one["intervention"] == "switch":
                cells.append(f"{found['switched']:.0%}")
        table.add_row(str(depth), *cells)
    return table


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
    return "".join(_SHADES[-(-count * (len(_SHADES) - 1) // top)] for count in cells)


def manifest_table(manifest: Manifest) -> Table:
    table = Table(title=f"bundle of {manifest.source}", show_header=False)
    schedule, quantization = manifest.schedule, manifest.quantization
    dtype = manifest.dtype
    if quantization is not None:
        dtype = f"{dtype} and {quantization.precision}" if manifest.has_checkpoint else quantization.precision
    rows = {
        "layers in checkpoint": f"{len(manifest.kept_layers)} of {schedule.num_layers}",
        "executed in prefill": str(schedule.num_executed(Phase.PREFILL)),
        "executed in decode": str(schedule.num_executed(Phase.DECODE)),
        "weights": f"{format_bytes(manifest.weight_bytes)} {dtype}, of {format_bytes(manifest.source_bytes)}",
        "graphs": ", ".join(
            f"{file} {format_bytes(manifest.sizes[file])}"
            for file in dict.fromkeys(graph.file for graph in manifest.graphs.values())
        )
        or "none",
        "written by": manifest.written_by,
    }
    if quantization is not None:
        rows |= {
            "weights of the graphs": f"{format_bytes(manifest.graph_weight_bytes)} {quantization.precision}, "
            f"{quantization.average_bits:.3g} bits a weight of the layers, in blocks of {quantization.block_size}"
            f"{' with zero points' if quantization.zero_points else ''}",
            "error of weights": f"{quantization.weight_error:.2%}",
            "beside unpacked weights": describe_fidelity(quantization.fidelity),
        }
    if manifest.parity is not None:
        parity = manifest.parity
        onnx = "" if parity.onnx is None else f", graphs {parity.onnx:.2g}"
        hf = "" if parity.hf is None else f"checkpoint {parity.hf:.2g}"
        rows["difference from reference"] = (
            f"{hf}{onnx if hf else onnx.removeprefix(', ')} (allowed {parity.tolerance:.2g})"
        )
        if parity.rounded is not None:
            rows["with activations in 8 bits"] = f"graphs {parity.rounded:.2g} (allowed {parity.rounded_tolerance:.2g})"
    else:
        rows["difference from reference"] = "not verified: nobody ran it"
    if manifest.healing is not None:
        rows[f"healed by {', '.join(manifest.healing.methods)}"] = (
            f"{manifest.healing.held_out.describe()} ({manifest.healing.held_out.num_samples} held-out samples)"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def describe_fidelity(fidelity: Fidelity | None) -> str:
    """What packing changed, in one line."""
    if fidelity is None:
        return "not measured: the model could not answer prompts where it was exported"
    return (
        f"perplexity x {fidelity.perplexity_ratio:.4f}, KL {fidelity.kl:.2g} nats, same likeliest token {fidelity.top1:.1%} "
        f"({fidelity.num_tokens:,} tokens)"
    )


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
