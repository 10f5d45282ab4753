"""Where everything comes from, and the commands that make it again. DIR is the folder of the results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from voidprune.planning.budgets import format_layers
from voidprune.report.commands import (
    LIMITS,
    benchmark_command,
    bundle_path,
    evaluation_command,
    export_options,
    heal_command,
    probe_command,
    profile_command,
    quoted_source,
    task_options,
)
from voidprune.report.findings import Findings
from voidprune.report.summary import whole_runner
from voidprune.report.timings import read_timings
from voidprune.schedule import LayerAction, schedule_hash

Fact = tuple[str, str]


def list_provenance(findings: Findings) -> list[Fact]:
    """(what, value), from the model down to the machine."""
    facts: list[Fact] = []
    model = (findings.schedule or findings.profile or (findings.manifest and findings.manifest.schedule)) or None
    if model is not None:
        identity = model.model
        facts += [
            ("model", f"{identity.name}, {identity.model_type}, {identity.num_layers} layers"),
            ("model fingerprint", identity.fingerprint),
        ]
    if (manifest := findings.manifest) is not None:
        facts.append(("source", manifest.source))
        if manifest.source_revision is not None:
            facts.append(("source, commit", manifest.source_revision))
        facts.append(("headers of the exported weights", manifest.weights_header))
        if (parity := manifest.parity) is not None:
            found = [
                (name, value)
                for name, value in (("checkpoint", parity.hf), ("graphs", parity.onnx))
                if value is not None
            ]
            told = ", ".join(f"{name} {value:.2g}" for name, value in found)
            facts.append(("largest difference of logits", f"{told}; allowed {parity.tolerance:.2g}"))
        facts.append(("export written by", manifest.written_by))
    if findings.schedule is not None:
        facts.append(("schedule", schedule_hash(findings.schedule)))
    if (profile := findings.profile) is not None:
        calibration = profile.calibration
        facts += [
            ("calibration", f"{calibration.num_samples} samples, responses: {calibration.responses}"),
            ("calibration data", ", ".join(calibration.fingerprints)),
            ("LAC", f"alpha {profile.lac.alpha:g}, {profile.lac.arithmetic}"),
        ]
    facts += _measured(findings)
    return facts


def _measured(findings: Findings) -> list[Fact]:
    facts: list[Fact] = []
    for name, document in (
        ("evaluation", findings.evaluation),
        ("comparison", findings.comparison),
        ("probe", findings.probe),
        ("LAC at run time", findings.adaptive),
    ):
        if document is None:
            continue
        facts.append((f"{name}, data", str(document["dataset"])))
        if (samples := document.get("samples")) is not None:
            facts.append((f"{name}, samples", str(samples)))
        if (seed := _seed(document)) is not None:
            facts.append((f"{name}, seed", str(seed)))
        if (writer := document.get("written_by")) is not None:
            facts.append((f"{name} written by", str(writer)))
    if findings.harness is not None:
        facts.append(("lm_eval written by", str(findings.harness["written_by"])))
    if findings.benchmark is not None:
        facts += [(f"benchmark, {name}", value) for name, value in read_timings(findings.benchmark).conditions]
    return facts


def _seed(document: Mapping[str, Any]) -> Any:
    for part in ("settings", "intervals"):
        if isinstance(found := document.get(part), Mapping) and "seed" in found:
            return found["seed"]
    return None


def list_commands(findings: Findings) -> tuple[list[str], str]:
    """The commands, and what to know of them."""
    if findings.record is not None:
        told = "Written down when the folder was made."
        if findings.record.recipe:
            told += " The recipe follows."
        return [findings.record.command, "voidprune report DIR -o report.html"], told
    commands = []
    model = quoted_source(findings)
    if findings.profile is not None:
        commands.append(profile_command(findings.profile, model))
    manifest = findings.manifest
    healing = None if manifest is None else manifest.healing
    is_planned = healing is None or "rounds" not in healing.origin  # rounds of healing plan for themselves
    if findings.schedule is not None and is_planned and (plan := _plan_command(findings)) is not None:
        commands.append(plan)
    if manifest is not None:
        target = f"-o {bundle_path(findings)} {export_options(manifest)}"
        if healing is not None and not manifest.graphs:  # as it was healed
            commands.append(heal_command(healing, manifest.schedule, model, folder=bundle_path(findings)))
        elif healing is not None:
            commands.append(heal_command(healing, manifest.schedule, model))
            commands.append(f"voidprune export DIR/healed {target}")
        else:
            commands.append(f"voidprune export {model} --schedule DIR/schedule.json {target}")
    if (evaluation := findings.evaluation) is not None:
        limit = f" --max-new-tokens {evaluation['max_new_tokens']}"
        command = evaluation_command(findings).replace("--tasks TASKS", task_options(evaluation))
        if whole_runner(evaluation) is None:
            command = command.replace(f" --baseline {quoted_source(findings)}", "")
        commands.append(command + limit)
    if findings.benchmark is not None:
        known = dict(read_timings(findings.benchmark).conditions)
        options = (
            ("prompt, tokens", "--prompt-lengths"),
            ("context, tokens", "--context-lengths"),
            ("batch", "--batch-sizes"),
            ("new tokens", "--new-tokens"),
            ("interleaved rounds", "--rounds"),
            ("threads", "--threads"),
            ("provider", "--provider"),
            ("seed", "--seed"),
        )
        told = "".join(f" {option} {known[name]}" for name, option in options if name in known)
        commands.append(benchmark_command(findings) + told)
    if findings.probe is not None:
        commands.append(probe_command(findings.probe, model))
    commands.append("voidprune report DIR -o report.html")
    about = "Put together from what the files say of themselves; DATASET and TASKS stand for data, of which they hold no paths."
    return commands, about


def _plan_command(findings: Findings) -> str | None:
    """None of a schedule that no option of `voidprune plan` makes: one that somebody wrote."""
    schedule = findings.schedule
    assert schedule is not None
    origin, model = schedule.origin, f"voidprune plan {quoted_source(findings)}"
    criterion = str(origin.get("criterion", "none"))
    start = "voidprune plan DIR/profile.json" if findings.profile is not None else model
    rest = f" --boundary {schedule.boundary}" + (" --single-turn" if schedule.single_turn else "")
    if criterion == "probe":
        return f"{start} --from-probe DIR/probe.json -o DIR/schedule.json"
    if criterion in ("none", "explicit") and "dropped" not in origin:
        kept = frozenset(layer for layer, action in enumerate(schedule.prefill) if action is LayerAction.FULL)
        whole = all(action in (LayerAction.FULL, LayerAction.SKIP) for action in schedule.prefill)
        if schedule.prefill != schedule.decode or not whole:
            return None
        return f"{start} -o DIR/schedule.json --keep-layers {format_layers(kept)}{rest}"
    told = "".join(f" {option} {shlex.quote(str(origin[key]))}" for key, option in LIMITS.items() if key in origin)
    if "goal" in origin:
        told = "".join(f" --{key.replace('_', '-')} {origin[key]}" for key in ("goal", "max_loss") if key in origin)
    elif criterion not in ("none", "explicit"):
        told = f" --criterion {shlex.quote(criterion)}{told}"
    if "goal" in origin or criterion.startswith("search-"):
        start, told = model, f"{told} --dataset DATASET"
    return f"{start} -o DIR/schedule.json{told}{rest}"


def list_missing(findings: Findings) -> list[Fact]:
    """(what is not in the folder, the command that adds it)."""
    model = quoted_source(findings)
    missing: list[Fact] = []
    for there, what, command in (
        (findings.profile, "what layers do", f"voidprune profile {model} -o DIR/profile.json"),
        (findings.schedule, "a schedule", "voidprune plan DIR/profile.json -o DIR/schedule.json --keep 0.7"),
        (
            findings.manifest,
            "an export",
            f"voidprune export {model} --schedule DIR/schedule.json -o DIR/pruned",
        ),
        (findings.evaluation or findings.harness, "quality", evaluation_command(findings)),
        (findings.benchmark, "time and memory", benchmark_command(findings)),
        (
            findings.comparison,
            "criteria and controls at equal cost",
            f"voidprune compare {model} --dataset DATASET -o DIR/comparison.json",
        ),
        (
            findings.probe,
            "what layers need of earlier tokens",
            f"voidprune probe {model} --tasks TASKS -o DIR/probe.json",
        ),
    ):
        if there is None:
            missing.append((what, command))
    return missing
