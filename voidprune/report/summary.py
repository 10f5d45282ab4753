"""What a reader has to learn first: what was done, in a paragraph; what was dropped, lost and won, beside the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from voidprune.planning.budgets import contiguous_runs
from voidprune.planning.costs import PROMPT_LENGTH, ScheduleCosts, baseline_costs, schedule_costs
from voidprune.planning.criteria import CRITERIA
from voidprune.quality.spreads import Spread
from voidprune.report.commands import benchmark_command, evaluation_command, quoted_source
from voidprune.report.figures import Card, Figure
from voidprune.report.findings import Findings
from voidprune.report.timings import read_timings
from voidprune.schedule import Boundary, Phase, Schedule


def find_costs(findings: Findings) -> tuple[ScheduleCosts, ScheduleCosts] | None:
    """Of the whole model and of the schedule, where the sizes are known."""
    if findings.schedule is None or findings.profile is None:
        return None
    sizes = findings.profile.sizes
    held = sizes.with_kv_bytes(None if findings.manifest is None else findings.manifest.kv_bytes_per_token)
    return baseline_costs(sizes, findings.schedule), schedule_costs(held, findings.schedule)


def make_cards(findings: Findings) -> tuple[Card, ...]:
    """Dropped, quality, bytes, time. One without figures says what would fill it."""
    return (_dropped(findings), _quality(findings), _bytes(findings), _time(findings))


def _dropped(findings: Findings) -> Card:
    schedule = findings.schedule
    if schedule is None:
        return Card(
            "dropped", "What was dropped", (), lacks="voidprune plan DIR/profile.json -o DIR/schedule.json --keep 0.7"
        )
    num_layers = schedule.num_layers
    counts = [(f"run_{phase}", f"run in {phase}", schedule.num_executed(phase)) for phase in Phase]
    counts.append(("in_checkpoint", "in the checkpoint", len(schedule.union)))
    figures = (Figure(key, label, "layers", count, num_layers) for key, label, count in counts)
    return Card("dropped", "What was dropped", tuple(figures), _describe_gaps(schedule))


def _describe_gaps(schedule: Schedule) -> str:
    """Which layers do not run in a phase, and which of them still write keys and values."""
    told = []
    for phase in Phase:
        actions = schedule.actions(phase)
        idle = [layer for layer, action in enumerate(actions) if not action.executes]
        cached = [layer for layer in idle if actions[layer].writes_kv]
        if not idle:
            continue
        kept = (
            " (keys and values stay)"
            if cached == idle
            else f" (keys and values stay: {_few(cached)})"
            if cached
            else ""
        )
        told.append(f"{phase} leaves out {_few(idle)}{kept}")
    return "; ".join(told)


def _few(layers: Sequence[int]) -> str:
    """Their numbers, or how many they are."""
    named = format_layers(layers)
    return named if len(named) <= 40 else f"{len(layers)} layers"


def judged_runner(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """What would be shipped: the last one."""
    return evaluation["runners"][-1]  # type: ignore[no-any-return]


def whole_runner(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The whole model, where another one was put beside it."""
    runners = evaluation["runners"]
    return runners[0] if len(runners) > 1 and judged_runner(evaluation)["against_whole"] is not None else None


def mean_accuracy(runner: Mapping[str, Any]) -> float | None:
    """Over tasks, each counting the same; None where nothing was asked."""
    shares = [float(task["share"]) for task in runner["accuracy"].values()]
    return sum(shares) / len(shares) if shares else None


def _quality(findings: Findings) -> Card:
    evaluation = findings.evaluation
    if evaluation is None:
        return _harness_quality(findings)
    judged, whole = judged_runner(evaluation), whole_runner(evaluation)
    against = judged["against_whole"] or {}
    figures = []
    if (accuracy := mean_accuracy(judged)) is not None:
        before = None if whole is None else mean_accuracy(whole)
        interval = _overall_interval(against)
        figures.append(
            Figure(
                "accuracy",
                f"accuracy, mean of {_count(len(judged['accuracy']), 'task')}",
                "share",
                accuracy,
                before,
                None if before is None else accuracy - before,
                interval,
                "95 % interval over the same items" if interval else "",
            )
        )
    if judged["perplexity"] is not None:
        ratio = against.get("perplexity_ratio")
        figures.append(
            Figure(
                "perplexity",
                "perplexity of given responses",
                "plain",
                float(judged["perplexity"]),
                None if whole is None else float(whole["perplexity"]),
                None if ratio is None else float(ratio["value"]),
                None if ratio is None else _pair(ratio["interval"]),
                "95 % interval over the same items" if ratio else "",
            )
        )
    if (agreement := against.get("agreement")) is not None:
        top1 = agreement["top1"]
        figures.append(Figure("agreement", "same likeliest token", "share", float(top1["value"]), 1.0))
    lacks = "" if whole is not None else evaluation_command(findings)
    note = f"{evaluation['num_items']} items of {evaluation['dataset']}; intervals: 95 %, paired over items"
    return Card("quality", "What it cost in quality", tuple(figures), note, lacks)


def _harness_quality(findings: Findings) -> Card:
    title = "What it cost in quality"
    if findings.harness is None:
        return Card("quality", title, (), lacks=evaluation_command(findings))
    runners = findings.harness["runners"]
    judged, whole = runners[-1], runners[0] if len(runners) > 1 else None
    figures = []
    for task, result in judged["tasks"].items():
        metric = next((name for name in result["metrics"] if name.partition(",")[0] in ("acc", "exact_match")), None)
        if metric is None:
            continue
        found, against = result["metrics"][metric], result["metrics"][metric]["against_whole"]
        figures.append(
            Figure(
                f"harness.{task}",
                f"{task}, {metric.partition(',')[0]}",
                "share",
                float(found["value"]),
                None if whole is None else float(whole["tasks"][task]["metrics"][metric]["value"]),
                None if against is None else float(against["difference"]),
                None if against is None else _pair(against["interval"]),
                "95 % interval over the same items",
            )
        )
    return Card("quality", title, tuple(figures[:3]), "tasks of lm_eval")


def _overall_interval(against: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of the difference over all items, which is that of the mean over tasks where they have as many items each."""
    differences = against.get("accuracy") or {}
    overall = against.get("overall") or (next(iter(differences.values())) if len(differences) == 1 else None)
    if overall is None or len({one["num_items"] for one in differences.values()}) > 1:
        return None
    return _pair(overall["interval"])


def _bytes(findings: Findings) -> Card:
    figures = []
    manifest, costs = findings.manifest, find_costs(findings)
    if manifest is not None:
        figures.append(
            Figure("weights", "weights on disk", "bytes", manifest.graph_weight_bytes, manifest.source_bytes)
        )
    elif costs is not None:
        figures.append(Figure("weights", "weights", "bytes", costs[1].weight_bytes, costs[0].weight_bytes))
    if findings.benchmark is not None:
        timings = read_timings(findings.benchmark)
        figures.append(
            Figure(
                "peak_memory",
                "peak memory",
                "bytes",
                timings.pruned.peak_resident_bytes,
                timings.whole.peak_resident_bytes,
            )
        )
    if costs is not None:
        whole, pruned = costs
        figures += [
            Figure("kv_per_token", "K/V cache a token", "bytes", pruned.kv_bytes_per_token, whole.kv_bytes_per_token),
            Figure("decode_bytes", "read per output token", "bytes", pruned.decode_bytes, whole.decode_bytes),
        ]
    lacks = (
        ""
        if manifest is not None
        else f"voidprune export {quoted_source(findings)} --schedule DIR/schedule.json -o DIR/pruned"
    )
    return Card("bytes", "What it bought in bytes", tuple(figures), lacks=lacks)


def _time(findings: Findings) -> Card:
    title, costs = "What it bought in time", find_costs(findings)
    if findings.benchmark is not None:
        timings = read_timings(findings.benchmark)

        def figure(key: str, label: str, pruned: Spread, whole: Spread, ratio: Spread) -> Figure:
            return Figure(
                key,
                label,
                "seconds",
                pruned.median,
                whole.median,
                ratio.median,
                (ratio.low, ratio.high) if timings.interval_name else None,
                timings.interval_name,
            )

        pruned, whole = timings.pruned, timings.whole
        conditions = dict(timings.conditions)
        where = ", ".join(conditions[name] for name in ("provider", "machine") if name in conditions)
        length = f"prompt of {conditions['prompt, tokens']} tokens; " if "prompt, tokens" in conditions else ""
        how = f"less or more: round by round, with {timings.interval_name}" if timings.interval_name else "one round"
        counted = () if costs is None else (_prompt_flops(*costs),)
        return Card(
            "time",
            title,
            (
                figure("ttft", "time to first token", pruned.ttft, whole.ttft, pruned.ttft_ratio),
                figure("tpot", "time per output token", pruned.tpot, whole.tpot, pruned.tpot_ratio),
                *counted,
            ),
            f"{length}{'medians; ' if timings.interval_name else ''}{how}; {where}",
        )
    figures: tuple[Figure, ...] = ()
    if costs is not None:
        figures = (
            _prompt_flops(*costs),
            Figure("decode_bytes", "read per output token", "bytes", costs[1].decode_bytes, costs[0].decode_bytes),
        )
    note = "Not measured: these are costs, counted from the schedule." if figures else ""
    return Card("time", title, figures, note, lacks=benchmark_command(findings))


def _prompt_flops(whole: ScheduleCosts, pruned: ScheduleCosts) -> Figure:
    label = f"arithmetic of a {PROMPT_LENGTH}-token prompt, counted"
    return Figure("prefill_flops", label, "flops", pruned.prefill_flops, whole.prefill_flops)


# ---- the paragraph


def describe_run(findings: Findings) -> str:
    """What was done, in plain sentences, from the data alone."""
    schedule, told = findings.schedule, []
    if schedule is not None:
        told += _describe_schedule(schedule)
    elif findings.profile is not None:
        told.append(f"{findings.profile.model.name} was profiled; nothing has been planned yet.")
    if (manifest := findings.manifest) is not None:
        if manifest.healing is not None:
            outcome = "" if manifest.healing.has_helped else ", which did not help and was not kept"
            told.append(f"The layers that stay were healed ({', then '.join(manifest.healing.methods)}){outcome}.")
        parts = [
            name
            for name, there in (("a checkpoint", manifest.has_checkpoint), ("ONNX graphs", bool(manifest.graphs)))
            if there
        ]
        parity = manifest.parity
        found = [value for value in (parity.hf, parity.onnx) if value is not None] if parity is not None else []
        verified = f", whose logits stay within {max(found):.2g} of the reference" if found else ", not verified"
        told.append(f"It was exported in {manifest.precision} as {' and '.join(parts)}{verified}.")
    measured = [
        name
        for name, document in (
            ("evaluated", findings.evaluation or findings.harness),
            ("timed beside the whole model", findings.benchmark),
            ("probed layer by layer", findings.probe),
        )
        if document is not None
    ]
    if measured:
        told.append(f"It was {_join(measured)}.")
    return " ".join(told) or "This folder holds results of measurements; no schedule, profile or export is among them."


def _describe_schedule(schedule: Schedule) -> list[str]:
    num_layers = schedule.num_layers
    if schedule.is_full:
        return [f"{schedule.model.name} runs whole: all {num_layers} decoder layers in both phases."]
    prefill, decode = (schedule.num_executed(phase) for phase in Phase)
    told = [
        f"Of the {num_layers} decoder layers of {schedule.model.name}, reading a prompt now runs {_of(prefill, num_layers)} and "
        f"writing each token of the response runs {_of(decode, num_layers)}."
    ]
    cached = [
        layer
        for layer in range(num_layers)
        if schedule.prefill[layer].writes_kv and not schedule.prefill[layer].executes
    ]
    if cached:
        told.append(f"While reading, {_layers(cached)} only write{'s' if len(cached) == 1 else ''} keys and values.")
    dropped = [layer for layer in range(num_layers) if layer not in schedule.union]
    if dropped:
        told.append(f"Gone from the checkpoint: {_layers(dropped)}.")
    else:
        told.append("Every layer is still in the checkpoint.")
    if schedule.boundary is Boundary.DECODE and schedule.prefill != schedule.decode:
        told.append("The last prompt token already runs as decode does.")
    if chosen := _describe_choice(schedule):
        told.append(chosen)
    return told


def _describe_choice(schedule: Schedule) -> str:
    """How layers were chosen, from the origin of the schedule; empty where that says nothing."""
    origin = schedule.origin
    name = str(origin.get("criterion", ""))
    if name in ("", "none"):
        return ""
    if name == "explicit":
        return "The layers were named by hand."
    if name == "probe":
        return "The layers were chosen by a probe of what they need of earlier tokens."
    how = f" ({CRITERIA[name].summary})" if name in CRITERIA else " (a search that runs the model)"
    goal = f" for the goal {origin['goal']}" if "goal" in origin else ""
    limit = origin.get("max_loss")
    within = f", allowed to lose {limit:.2%}" if isinstance(limit, float) else ""
    return f"The layers were chosen by {name}{how}{goal}{within}."


def _of(count: int, total: int) -> str:
    return f"all {total}" if count == total else f"{count}"


def _layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    named = _few(layers)
    return named if named.endswith("layers") else f"layers {named}"


def format_layers(layers: Sequence[int]) -> str:
    """3, 7, 11 to 14."""
    texts = [
        str(run[0]) if len(run) == 1 else f"{run[0]}, {run[1]}" if len(run) == 2 else f"{run[0]} to {run[-1]}"
        for run in contiguous_runs(layers)
    ]
    return _join(texts)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _pair(interval: Sequence[float]) -> tuple[float, float]:
    low, high = interval
    return float(low), float(high)
