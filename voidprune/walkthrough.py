"""What `voidprune demo` does: the main job on the model that ships, with the choice of layers made in the open.

Every criterion is tried at every budget on the validation split; the best of the first budget is exported, verified, evaluated on
the evaluation split and timed. Everything that was found is written into one folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.execution.reference import scheduled
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.evaluation import evaluate_model
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.profile import profile_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.tasks import task_rows
from voidprune.planning.costs import schedule_costs
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.calibration import encode_rows
from voidprune.profiling.profile import Profile, write_profile
from voidprune.quality.evaluation import evaluate
from voidprune.schedule import Phase, Schedule, full_schedule, write_schedule


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found; the same is in its folder."""

    profile: Profile
    schedule: Schedule
    comparison: artifacts.Document
    evaluation: artifacts.Document
    benchmark: artifacts.Document


# (keep_prefill, keep_decode) of the demo's comparison: the part that is nearly free, the part that is not, and a headline ratio.
DEMO_BUDGETS = ((0.5, 1.0), (1.0, 0.75), (0.3, 0.3))
DEMO_CRITERIA = ("lac", "block-influence", "last-n", "random")


def run_demo(
    folder: Path, *, num_items: int = 100, seed: int = 0, overwrite: bool = False, track: Track = untracked
) -> DemoOutcome:
    """The main job on the model that ships: profile, compare criteria, export the best, verify, evaluate, bench.

    The layers are chosen on the calibration and validation splits of the demo's tasks, the result is measured on the evaluation
    split. Exported is the winner of the first of DEMO_BUDGETS.
    """
    checkpoint = open_model("demo")
    with artifacts.staged_folder(folder, overwrite=overwrite, marker="comparison.json") as stage:
        profile = profile_model(
            checkpoint, task_rows("demo", num_items=32, split="calibration"), track=track, batch_size=32
        )
        write_profile(stage / "profile.json", profile)
        comparison, candidates = _compare_criteria(
            checkpoint, profile, num_items=max(8, num_items // 2), seed=seed, track=track
        )
        artifacts.write_file(stage / "comparison.json", artifacts.canonical_bytes(comparison))
        best = next(row for row in comparison["rows"] if row["chosen"])  # the winner of the first budget
        schedule = candidates[best["criterion"], best["keep_prefill"], best["keep_decode"]]
        write_schedule(stage / "schedule.json", schedule)
        with track("exporting and verifying", 2, "bundles") as advance:
            export_model(checkpoint, full_schedule(checkpoint.identity), stage / "whole")
            advance(1)
            export_model(checkpoint, schedule, stage / "pruned")
            advance(1)
        evaluation = evaluate_model(
            str(stage / "pruned"),
            task_rows("demo", num_items=num_items),
            dataset=f"demo, evaluation split, {num_items} items a task",
            baseline="demo",
            track=track,
        ).to_document()
        artifacts.write_file(stage / "evaluation.json", artifacts.canonical_bytes(evaluation))
        benchmark = benchmark_bundle(stage / "pruned", baseline=str(stage / "whole"), seed=seed, track=track)
        artifacts.write_file(stage / "benchmark.json", artifacts.canonical_bytes(benchmark))
    return DemoOutcome(profile, schedule, comparison, evaluation, benchmark)


def _compare_criteria(
    checkpoint: Checkpoint, profile: Profile, *, num_items: int, seed: int, track: Track
) -> tuple[artifacts.Document, dict[tuple[str, float, float], Schedule]]:
    """Every criterion of the demo at every budget: accuracy on the validation split, the best of each budget marked."""
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    rows = task_rows("demo", num_items=num_items, split="validation")
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=checkpoint.architecture.context_length)
    model = load_model(checkpoint.folder, device=default_device())
    candidates = {
        (criterion, keep_prefill, keep_decode): plan_schedule(
            checkpoint.identity,
            profile,
            criterion=criterion,
            keep={Phase.PREFILL: keep_prefill, Phase.DECODE: keep_decode},
            seed=seed,
        )
        for keep_prefill, keep_decode in DEMO_BUDGETS
        for criterion in DEMO_CRITERIA
    }
    table: list[dict[str, Any]] = []
    with track("comparing criteria", len(candidates), "schedules") as advance:
        for (criterion, keep_prefill, keep_decode), schedule in candidates.items():
            with scheduled(model, schedule) as runner:
                result = evaluate(
                    runner,
                    samples,
                    decode_text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
                    end_tokens=ends,
                    batch_size=64,
                )
            table.append(
                {
                    "criterion": criterion,
                    "keep_prefill": keep_prefill,
                    "keep_decode": keep_decode,
                    "weight_bytes": schedule_costs(profile.sizes, schedule).weight_bytes,
                    "accuracy": {task: accuracy.share for task, accuracy in result.accuracy.items()},
                    "perplexity": result.perplexity,
                    "chosen": False,
                }
            )
            advance(1)
    for budget in DEMO_BUDGETS:
        rivals = [row for row in table if (row["keep_prefill"], row["keep_decode"]) == budget]
        max(rivals, key=lambda row: (sum(row["accuracy"].values()), -row["perplexity"]))["chosen"] = True
    document = {
        "schema": artifacts.schema_key("comparison", 1),
        "split": "validation",
        "num_items": num_items,
        "rows": table,
    }
    return document, candidates
