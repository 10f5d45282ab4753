"""Results in the forms in which they are written, small: a folder with all of them, and one at a time."""

from __future__ import annotations

from pathlib import Path

from tests.benchmark_documents import benchmark_document
from tests.profiling.test_profile import make_profile
from tests.report.test_findings import evaluation
from tests.test_plots import make_comparison
from voidprune import artifacts
from voidprune.planning.budgets import Budget
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.profile import Profile, write_profile
from voidprune.schedule import Schedule, schedule_hash, write_schedule

HOSTILE = "<script>alert(1)</script>&\"'"


def make_schedule(profile: Profile) -> Schedule:
    """Layer 1 of 2 runs in decode only."""
    budget = Budget(keep_prefill=0.5, keep_decode=1.0)
    return plan_schedule(profile.model, profile, criterion="lac", budget=budget)


def benchmark(*, ratio: float = 0.5, spread: float = 0.02) -> artifacts.Document:
    return benchmark_document(ratio=ratio, spread=spread, machine=f"a machine {HOSTILE}")


def probe(*, task: str = "capitals", num_layers: int = 2, scored: bool = False) -> artifacts.Document:
    def point(depth: int, value: float) -> artifacts.Document:
        key, value = ("perplexity_ratio", 3 - 2 * value) if scored else ("accuracy", value)
        found = {
            key: {"value": value, "interval": [value * 0.9, value * 1.1 if scored else min(1.0, value * 1.1)]},
            "loss": 0.1,
            "loss_upper": 0.2,
            "holds": value > 0.8,
            "unharmed": True,
        }
        return {"depth": depth, "tasks": {task: found}}

    def result(intervention: str, scope: str, harmless: int | None, unharmed: int | None) -> artifacts.Document:
        points = [point(depth, (depth + 1) / num_layers) for depth in range(num_layers)]
        return {
            "intervention": intervention,
            "scope": scope,
            "points": points,
            "harmless_from": harmless,
            "unharmed_from": unharmed,
        }

    return {
        "schema": "voidprune.probe/1",
        "model": {"name": "tiny", "model_type": "llama", "num_layers": num_layers, "fingerprint": "sha256:abc"},
        "dataset": "capitals",
        "settings": {
            "interventions": ["freeze", "random", "skip-attention"],
            "scopes": ["prompt", "published"],
            "margin": 0.01,
            "max_new_tokens": 12,
            "batch_size": 64,
            "seed": 3,
            "dtype": "fp32",
        },
        "whole": {
            task: {
                "num_items": 20,
                "accuracy": None if scored else 0.95,
                "perplexity": 2.5 if scored else None,
                "num_items_needed": None if scored else 300,
            }
        },
        "results": [
            result("freeze", "prompt", 1, 1),
            result("freeze", "published", None, 1),
            result("random", "prompt", None, None),
            result("random", "published", None, None),
            result("skip-attention", "any", 1, 0),
        ],
        "samples": "sha256:probed",
    }


def harness() -> artifacts.Document:
    def runner(name: str, value: float) -> artifacts.Document:
        against = None if name == "whole model" else {"difference": -0.25, "interval": [-0.5, 0.0], "p_value": 0.5}
        metric = {"value": value, "interval": [value - 0.1, value + 0.1], "against_whole": against}
        return {
            "name": name,
            "num_cut_contexts": 0,
            "tasks": {HOSTILE: {"version": "1", "num_items": 8, "metrics": {"acc,none": metric}}},
        }

    return {
        "schema": "voidprune.harness/1",
        "model": "tiny",
        "model_fingerprint": "sha256:abc",
        "schedule_hash": None,
        "settings": {},
        "runners": [runner("whole model", 0.75), runner("onnx", 0.5)],
        "written_by": "voidprune, lm_eval 1",
    }


def adaptive() -> artifacts.Document:
    used = {"num_tokens": 10, "mean_use": 0.5, "mean_depth": 1.5, "last_layer_share": 0.25, "depths": [0, 5, 5]}
    usage = {"generated": {"prefill": used, "decode": used, "read": used}}

    def run(name: str, alpha: float | None) -> artifacts.Document:
        accuracy = {"sorting": {"num_right": 1, "num_items": 2, "share": 0.5, "interval": [0.1, 0.9]}}
        rules = {part: {"kind": "whole"} for part in ("scored", "generated")}
        return {
            "name": name,
            "alpha": alpha,
            "rules": rules,
            "perplexity": None,
            "accuracy": accuracy,
            "same_as_whole": 1,
            "usage": usage,
        }

    return {
        "schema": "voidprune.adaptive-evaluation/1",
        "model": "tiny",
        "model_fingerprint": "sha256:abc",
        "num_layers": 2,
        "dtype": "fp32",
        "dataset": "demo",
        "num_samples": 2,
        "samples": "sha256:adaptive",
        "settings": {"sampling": None, "arithmetic": "float32", "seed": 0},
        "runs": [run("whole model", None), run("mask", 0.8)],
        "written_by": "voidprune",
    }


def write_results(folder: Path, **documents: artifacts.Document) -> None:
    for name, document in documents.items():
        artifacts.write_file(folder / f"{name}.json", artifacts.canonical_bytes(document), overwrite=True)


def fill_folder(folder: Path) -> None:
    """Every kind of result but bundles."""
    profile = make_profile()
    schedule = make_schedule(profile)
    write_profile(folder / "profile.json", profile)
    write_schedule(folder / "schedule.json", schedule)
    write_results(
        folder,
        evaluation={**evaluation(), "schedule_hash": schedule_hash(schedule)},
        benchmark=benchmark(),
        comparison=make_comparison(),
        probe=probe(),
        harness=harness(),
        adaptive=adaptive(),
    )
    (folder / "unrelated.json").write_text("[1, 2]")
