"""What `voidprune demo` does: the main job on the model that ships, with the choice of layers made in the open.

Layers are chosen on the calibration split of the demo's tasks, schedules are judged on the validation split, and what is exported
is measured on the evaluation split. Everything that was found is written into one folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from voidprune import artifacts
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.sizes import measure_sizes
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.comparison import compare_criteria, comparison_document
from voidprune.pipeline.evaluation import evaluate_model
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.planning import FreePart, find_free_schedule
from voidprune.pipeline.profile import profile_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.tasks import task_rows
from voidprune.pipeline.trials import Trials, open_trials
from voidprune.profiling.profile import Profile, write_profile
from voidprune.schedule import full_schedule, write_schedule


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found; the same is in its folder."""

    profile: Profile
    free: FreePart
    comparison: artifacts.Document
    evaluation: artifacts.Document
    benchmark: artifacts.Document


PROVIDER = "cpu"
"""Of the graphs, which are in float32: onnxruntime has no attention in float32 on CUDA."""
# (scope, keep ratio): the part that is nearly free, the part that is not, and what is left of a headline ratio.
DEMO_BUDGETS = (("prefill", 0.5), ("decode", 0.75), ("bytes", 0.5))
NUM_CHOOSING = 32
NUM_REFINEMENTS = 24
NUM_COMPARED = 25
NUM_JUDGING = 200
"""Validation items a task, by which criteria are compared, and by which the free part is found. To show that at most 1 % is
lost takes 163 or more."""
MAX_NEW_TOKENS = 48
"""No right response is longer, and a ruined model never stops."""


def run_demo(
    folder: Path,
    *,
    num_items: int = 100,
    max_loss: float = 0.01,
    seed: int = 0,
    overwrite: bool = False,
    track: Track = untracked,
) -> DemoOutcome:
    """The main job on the model that ships: profile, compare criteria, find what is free, export, verify, evaluate, bench.

    Exported is the smallest prefill that loses at most `max_loss`. `num_items` are the items a task of the final evaluation.
    """
    checkpoint = open_model("demo")
    with artifacts.staged_folder(folder, overwrite=overwrite, marker="comparison.json") as stage:
        profile = profile_model(
            checkpoint, task_rows("demo", num_items=NUM_CHOOSING, split="calibration"), track=track, batch_size=32
        )
        write_profile(stage / "profile.json", profile)
        trials = _open_trials(checkpoint, track)
        comparison = _compare(trials, profile, seed=seed, track=track)
        artifacts.write_file(stage / "comparison.json", artifacts.canonical_bytes(comparison))
        free = find_free_schedule(trials, goal="fast-prompt", max_loss=max_loss, track=track)
        write_schedule(stage / "schedule.json", free.schedule)
        with track("exporting and verifying", 2, "bundles") as advance:
            export_model(checkpoint, full_schedule(checkpoint.identity), stage / "whole", provider=PROVIDER)
            advance(1)
            export_model(checkpoint, free.schedule, stage / "pruned", provider=PROVIDER)
            advance(1)
        evaluation = evaluate_model(
            str(stage / "pruned"),
            task_rows("demo", num_items=num_items),
            dataset=f"demo, evaluation split, {num_items} items a task",
            baseline="demo",
            provider=PROVIDER,
            track=track,
        ).to_document()
        artifacts.write_file(stage / "evaluation.json", artifacts.canonical_bytes(evaluation))
        benchmark = benchmark_bundle(
            stage / "pruned", baseline=str(stage / "whole"), provider=PROVIDER, seed=seed, track=track
        )
        artifacts.write_file(stage / "benchmark.json", artifacts.canonical_bytes(benchmark))
    return DemoOutcome(profile, free, comparison, evaluation, benchmark)


def _open_trials(checkpoint: Checkpoint, track: Track) -> Trials:
    return open_trials(
        checkpoint,
        task_rows("demo", num_items=NUM_CHOOSING, split="calibration"),
        task_rows("demo", num_items=NUM_JUDGING, split="validation"),
        whole=full_schedule(checkpoint.identity),
        sizes=measure_sizes(checkpoint),
        responses="dataset",
        max_new_tokens=MAX_NEW_TOKENS,
        track=track,
    )


def _compare(trials: Trials, profile: Profile, *, seed: int, track: Track) -> artifacts.Document:
    """Every criterion at every budget of the demo, on the first items of each task."""
    some = [trials.judging[index] for items in trials.groups.values() for index in items[:NUM_COMPARED]]
    trials = replace(trials, judging=tuple(some))
    entries = []
    for scope, keep in DEMO_BUDGETS:
        entries += compare_criteria(
            trials,
            profile,
            keeps=(keep,),
            scopes=(scope,),
            max_evaluations=NUM_REFINEMENTS,
            seed=seed,
            track=track,
        )
    return comparison_document(trials, entries, dataset="demo")
