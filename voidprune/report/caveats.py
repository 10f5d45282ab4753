"""What a reader of the figures has to know, decided from the data. Each sentence names what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voidprune.export.model_card import caveats as bundle_caveats
from voidprune.export.model_card import schedule_caveats
from voidprune.planning.criteria import CRITERIA
from voidprune.report.findings import Findings
from voidprune.report.summary import judged_runner, whole_runner
from voidprune.report.timings import Timings, read_timings
from voidprune.schedule import Phase, schedule_hash

LARGE_SPREAD = 0.1
"""Intervals of a ratio that are wider than this share of its median."""


def find_caveats(findings: Findings) -> list[str]:
    """Those of the export or schedule first, then those of what was measured."""
    found = []
    if findings.manifest is not None:
        found += bundle_caveats(findings.manifest)
        if findings.manifest.parity is None:
            found.append("Nobody has run this export: it was not compared with its reference.")
    elif findings.schedule is not None:
        found += schedule_caveats(findings.schedule)
    return [
        *found,
        *findings.left_out,
        *_of_models(findings),
        *_of_quality(findings),
        *_of_fitting(findings),
        *_of_timings(findings),
        *_of_profile(findings),
        *_of_comparison(findings.comparison),
        *_of_probe(findings.probe),
    ]


def _of_models(findings: Findings) -> list[str]:
    """Results of other models are refused where they are known to be: see `findings.collect_findings`."""
    results = {
        "evaluation": findings.evaluation,
        "lm_eval run": findings.harness,
        "benchmark": findings.benchmark,
    }
    return [
        f"The {name} does not say which model it is of, as an older version of voidprune wrote it: nobody checked that it is this "
        "one."
        for name, result in results.items()
        if result is not None and "model_fingerprint" not in result
    ]


def _of_quality(findings: Findings) -> list[str]:
    evaluation, found = findings.evaluation, []
    for name, document in (("evaluation", evaluation), ("lm_eval run", findings.harness)):
        if document is None or findings.schedule is None or document["schedule_hash"] is None:
            continue
        if document["schedule_hash"] != schedule_hash(findings.schedule):
            found.append(f"The {name} is of another schedule than the one shown here.")
    if evaluation is None:
        return found
    if whole_runner(evaluation) is None:
        return [*found, "Quality was measured without the whole model beside it, so what was lost is not known."]
    against = judged_runner(evaluation)["against_whole"]
    worse, unsure = [], []
    for task, one in against["accuracy"].items():
        low, high = one["interval"]
        if high < 0:
            worse.append(f"{task} ({one['difference'] * 100:+.1f} points)")
        elif low < 0:
            unsure.append((task, low))
    if worse:
        found.append(f"Losses that are larger than chance explains (95 %): {', '.join(worse)}.")
    if unsure:
        least = min(low for _, low in unsure)
        tasks = ", ".join(task for task, _ in unsure)
        found.append(
            f"Differences of accuracy within their 95 % interval, so no loss is shown and up to {-least * 100:.1f} points are not "
            f"excluded: {tasks}."
        )
    ratio = against["perplexity_ratio"]
    if ratio is not None and ratio["interval"][0] <= 1 <= ratio["interval"][1]:
        found.append("The perplexity does not differ from the whole model's by more than chance explains.")
    return found


def _ran_graphs(evaluation: Mapping[str, Any]) -> bool:
    return any(runner["name"] == "onnx" for runner in evaluation["runners"])


def _of_fitting(findings: Findings) -> list[str]:
    manifest = findings.manifest
    if manifest is None or not manifest.fitted_prompts:
        return []
    found, count = [], len(manifest.fitted_prompts)
    is_rounded = any(part is not None and part.prompts for part in (manifest.quantization, manifest.kv_cache))
    if findings.evaluation is not None and findings.evaluation["model"] in (
        manifest.source,
        manifest.schedule.model.name,
    ):
        changed = "healing" if manifest.healing is not None else "rounding"
        of_weights = manifest.healing is not None or manifest.quantization is not None
        what = f"the weights that {changed} changed" if of_weights else "keys and values in 8 bits"
        found.append(f"The evaluation is of the source under the schedule, without {what}.")
    elif findings.evaluation is not None and is_rounded and not _ran_graphs(findings.evaluation):
        found.append("The evaluation is of weights before anything was rounded on samples.")
    elif findings.evaluation is not None:
        found.append(
            f"Overlap was checked: none of the evaluated prompts is among the {count} that the bundle was fitted to, or voidprune "
            "eval had refused."
        )
    if findings.harness is not None:
        compared = findings.harness.get("num_compared_prompts")
        found.append(
            f"Overlap was checked for the tasks of lm_eval as far as that goes: none of their {compared} prompts is, token for "
            f"token, among the {count} that the bundle was fitted to. The same items in another template or behind worked examples "
            "are not found."
            if compared
            else "Overlap was not checked for the tasks of lm_eval: their prompts may be among those that the bundle was fitted to."
        )
    return found


def _of_timings(findings: Findings) -> list[str]:
    if findings.benchmark is None:
        return []
    timings: Timings = read_timings(findings.benchmark)
    found = []
    if not timings.interval_name:
        found.append(
            "The benchmark is of one round, so nothing says how far its times may be off, and no gain is shown."
        )
    ratios = (
        ("Time to first token", timings.pruned.ttft_ratio),
        ("Time per output token", timings.pruned.tpot_ratio),
    )
    for name, ratio in ratios if timings.interval_name else ():
        is_wide, holds_one = ratio.width > LARGE_SPREAD, ratio.low <= 1 <= ratio.high and len(timings.models) > 1
        if is_wide:
            found.append(
                f"{name}: the spread of the benchmark is large, {ratio.width:.0%} of the median"
                f"{', and its interval holds 1, so no gain is shown' if holds_one else ''}. Something else may have run."
            )
        elif holds_one:
            found.append(f"{name}: no gain is shown, the interval of the ratio holds 1.")
    manifest = findings.manifest
    if manifest is not None and manifest.graphs and timings.pruned.weight_bytes != manifest.graph_weight_bytes:
        found.append("The benchmark is of another export than the one shown here: its weights have other bytes.")
    return found


def _of_profile(findings: Findings) -> list[str]:
    if findings.profile is None:
        return []
    found = []
    for phase in Phase:
        if not findings.profile.statistics(phase).num_tokens:
            found.append(f"The profile saw no token of {phase}, so nothing measured ranks its layers.")
    if findings.profile.calibration.num_samples < 32:
        found.append(
            f"The profile is of {findings.profile.calibration.num_samples} samples: layers of like score may change places."
        )
    return found


def _of_comparison(comparison: Mapping[str, Any] | None) -> list[str]:
    if comparison is None:
        return []
    found = []
    controls = {criterion.name for criterion in CRITERIA.values() if not criterion.needs_profile}
    budgets = dict.fromkeys((row["scope"], row["keep"]) for row in comparison["rows"])
    for scope, keep in budgets:
        best = next(row for row in comparison["rows"] if (row["scope"], row["keep"]) == (scope, keep))
        if best["margin"] is not None and best["margin"][1] <= 0:
            found.append(
                f"At equal {scope}, keep {keep:g}, the lead of {best['criterion']} over the next best may be chance: its 95 % "
                "interval holds 0."
            )
        if best["criterion"] in controls:
            found.append(f"At equal {scope}, keep {keep:g}, a control wins: {best['criterion']} looks at nothing.")
    return found


def _of_probe(probe: Mapping[str, Any] | None) -> list[str]:
    if probe is None:
        return []
    few = [
        f"{task} ({whole['num_items']} of at least {whole['num_items_needed']})"
        for task, whole in probe["whole"].items()
        if whole["num_items_needed"] is not None and whole["num_items"] < whole["num_items_needed"]
    ]
    margin = probe["settings"]["margin"]
    return (
        [f"The probe has too few items to show that no more than {margin:.2%} is lost: {', '.join(few)}."]
        if few
        else []
    )
