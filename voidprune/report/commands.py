"""The commands that make results, or would add what is missing. DIR is the folder of the results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voidprune.execution.manifest import Healing, Manifest
from voidprune.planning.budgets import format_layers
from voidprune.profiling.profile import Profile
from voidprune.report.findings import Findings
from voidprune.schedule import Scalar, Schedule

LIMITS = {
    "keep_prefill": "--keep-prefill",
    "keep_decode": "--keep-decode",
    "max_bytes": "--max-bytes",
    "max_kv_bytes_per_token": "--max-kv-bytes-per-token",
    "max_prefill_flops": "--max-prefill-flops",
    "max_decode_bytes": "--max-decode-bytes",
    "protected": "--protect",
    "dropped": "--drop-layers",
    "phases": "--phases",
    "seed": "--seed",
}
"""Keys of a schedule's origin that are options of `voidprune plan`."""


def source_name(findings: Findings) -> str:
    """What the model is called on the command line, as far as that was written down."""
    known = findings.schedule or findings.profile
    result = findings.comparison or findings.probe
    name = known.model.name if known is not None else "MODEL" if result is None else str(result["model"]["name"])
    if findings.manifest is not None:
        name = findings.manifest.source
    return {"voidprune-demo": "demo"}.get(name, name)


def quoted_source(findings: Findings) -> str:
    """`source_name` as a shell takes it."""
    return shlex.quote(source_name(findings))


def bundle_path(findings: Findings) -> str:
    """As a shell takes it."""
    return shlex.quote({"": "DIR/pruned", ".": "DIR"}.get(findings.bundle, f"DIR/{findings.bundle}"))


def export_options(manifest: Manifest) -> str:
    """What a bundle was made with, as far as it is not what `export` does anyway."""
    found = ["--precision", manifest.precision]
    if not manifest.graphs or not manifest.has_checkpoint:
        found += ["--format", "onnx" if manifest.graphs else "hf"]
    if manifest.graphs and manifest.operators != "ort":
        found += ["--ops", manifest.operators]
    if len({graph.file for graph in manifest.graphs.values()}) == 1:
        found += ["--layout", "single"]
    if (packed := manifest.quantization) is not None:
        found += ["--block-size", str(packed.block_size), "--activations", packed.activations]
        found += ["--zero-points"] if packed.zero_points else []
        found += ["--rounding", packed.rounding] if packed.rounding != "nearest" else []
        found += ["--bits", f"{packed.average_bits:.3g}"] if packed.precision == "mixed" else []
    if manifest.kv_cache is not None:
        found += ["--kv-cache", manifest.kv_cache.dtype]
    return shlex.join(found)


def evaluation_command(findings: Findings) -> str:
    if findings.manifest is None and findings.schedule is not None:
        return f"voidprune eval {quoted_source(findings)} --schedule DIR/schedule.json --tasks TASKS -o DIR/evaluation.json"
    return f"voidprune eval {bundle_path(findings)} --baseline {quoted_source(findings)} --tasks TASKS -o DIR/evaluation.json"


def benchmark_command(findings: Findings) -> str:
    return f"voidprune bench {bundle_path(findings)} --baseline {quoted_source(findings)} -o DIR/benchmark.json"


def profile_command(profile: Profile, model: str) -> str:
    """`model` as a shell takes it."""
    calibration, origin = profile.calibration, profile.calibration.origin
    found = {
        "--dataset": _dataset(origin.get("dataset")),
        "--num-samples": origin.get("num_samples"),
        "--responses": calibration.responses,
        "--max-new-tokens": calibration.max_new_tokens or None,  # 0 where responses are those of the dataset
        "--max-length": origin.get("max_length"),
        "--alpha": f"{profile.lac.alpha:g}",
        "--lac-arithmetic": profile.lac.arithmetic,
        "--dtype": origin.get("dtype"),
    }
    return f"voidprune profile {model} -o DIR/profile.json{_options(found)}"


def heal_command(healing: Healing, schedule: Schedule, model: str, *, folder: str = "DIR/healed") -> str:
    """With rounds, the schedule is what they came to; else it is what was healed. `model` and `folder` as a shell takes them."""
    origin, training = healing.origin, healing.settings.get("distill", {})
    loss = training.get("loss", {})
    is_lora = training.get("parameters") == "lora"
    limits: dict[str, Any] = {"--schedule": "DIR/schedule.json"}
    if "rounds" in origin:
        limits = {option: schedule.origin.get(name) for name, option in LIMITS.items()}
        limits["--rounds"] = origin["rounds"]
    found = {
        **limits,
        "--method": healing.methods,
        "--dataset": _dataset(origin.get("dataset")),
        "--num-samples": origin.get("num_samples"),
        "--responses": origin.get("responses"),
        "--max-new-tokens": origin.get("max_new_tokens"),
        "--max-length": origin.get("max_length"),
        "--parameters": training.get("parameters"),
        "--rank": training.get("rank") if is_lora else None,
        "--embeddings": training.get("embeddings"),
        "--steps": training.get("steps"),
        "--max-minutes": training.get("max_minutes"),
        "--evaluate-every": training.get("evaluate_every"),
        "--heal-batch-size": training.get("batch_size"),
        "--learning-rate": training.get("learning_rate"),
        "--temperature": loss.get("temperature"),
        "--top-k": loss.get("top_k"),
        "--precision": training.get("precision"),
        "--checkpointing": training.get("checkpointing"),
        "--seed": training.get("seed"),
        "--dtype": origin.get("dtype"),
    }
    return f"voidprune heal {model} -o {folder}{_options(found)}"


def task_options(evaluation: Mapping[str, Any]) -> str:
    """On what was evaluated, of a `voidprune.evaluation` document."""
    counts = [task["num_items"] for task in evaluation["runners"][-1]["accuracy"].values()]
    return _options(_tasks(str(evaluation["dataset"]), total=evaluation["num_items"], of_each=counts)).strip()


def probe_command(probe: Mapping[str, Any], model: str) -> str:
    """Of a `voidprune.probe` document."""
    settings, dataset = probe["settings"], str(probe["dataset"])
    counts = [task["num_items"] for task in probe["whole"].values()]
    depths = {point["depth"] for result in probe["results"] for point in result["points"]}
    found = {
        **_tasks(dataset, total=sum(counts), of_each=counts),
        "--intervention": settings["interventions"],
        "--scope": settings["scopes"],
        "--depths": format_layers(depths) if len(depths) < probe["model"]["num_layers"] else None,
        "--margin": f"{settings['margin']:g}",
        "--max-new-tokens": settings["max_new_tokens"],
        "--batch-size": settings.get("batch_size"),
        "--dtype": settings.get("dtype"),
        "--seed": settings["seed"],
    }
    return f"voidprune probe {model} -o DIR/probe.json{_options(found)}"


def _is_file(dataset: str) -> bool:
    """Whether data is called by the name of a file, whose folder is not known: tasks that ship with the package have no suffix."""
    return bool(Path(dataset).suffix)


def _tasks(dataset: str, *, total: int, of_each: Sequence[int]) -> dict[str, Any]:
    """Of a file the first items were used, of tasks that ship with the package as many of each."""
    if _is_file(dataset):
        return {"--tasks": "TASKS", "--num-samples": total}
    return {"--tasks": dataset, "--num-samples": max(of_each, default=total)}


def _dataset(name: Scalar | None) -> str | None:
    """As an option takes it: "default" is what ships with the package, and needs none."""
    if name == "default":
        return None
    return "DATASET" if name is None or _is_file(str(name)) else str(name)


def _options(found: Mapping[str, Any]) -> str:
    """As a shell takes them, after a space; without those that are None or False, lists once for each entry."""
    words: list[str] = []
    for option, value in found.items():
        if value is None or value is False:
            continue
        for one in value if isinstance(value, list | tuple) else (value,):
            words += [option] if one is True else [option, str(one)]
    return f" {shlex.join(words)}" if words else ""
