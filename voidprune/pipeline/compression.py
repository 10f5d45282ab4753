"""A compression recipe is run: profile, plan, heal, evaluate, export, bench, report, each step once and again when it must."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import RecipeError
from voidprune.healing.losses import DistillLoss
from voidprune.healing.settings import DistillSettings
from voidprune.models.checkpoint import PRECISIONS, Checkpoint
from voidprune.models.packed import PACKED_PRECISIONS
from voidprune.models.sizes import ModelSizes, measure_sizes
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.evaluation import evaluate_model
from voidprune.pipeline.export import check_graphs, default_formats, export_model, own_schedule
from voidprune.pipeline.gates import Gates
from voidprune.pipeline.heal import heal_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import Calibrated, PlanRequest, plan_from_model
from voidprune.pipeline.precision import PackingRequest, default_activations, measure_packed_sizes
from voidprune.pipeline.profile import profile_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.samples import Answering
from voidprune.pipeline.steps import Step
from voidprune.pipeline.tasks import dataset_name, find_rows
from voidprune.profiling.calibration import Row, default_rows
from voidprune.profiling.profile import LacSettings, read_profile
from voidprune.recipe import CompressionRecipe
from voidprune.schedule import Boundary, read_schedule, write_schedule

PROFILE, SCHEDULE, EVALUATION, BENCHMARK = "profile.json", "schedule.json", "evaluation.json", "benchmark.json"
HEALED, PRUNED, REPORT = "healed", "pruned", "report.html"


def compression_steps(
    recipe: CompressionRecipe, folder: Path, *, write_report: Callable[[Path, Path], object], track: Track = untracked
) -> list[Step]:
    """The steps of a recipe; what they write lies in `folder`. `write_report(folder, file)` makes a page of such a folder.

    Raises what opening the model and reading the data raises, BudgetError for a plan that mixes ways, and
    ModelError for packed graphs that could not be: nothing has run by then.
    """
    return _Compression(recipe, folder, write_report, track).steps()


class _Compression:
    """One recipe in one folder: each method is a step."""

    def __init__(
        self, recipe: CompressionRecipe, folder: Path, write_report: Callable[[Path, Path], object], track: Track
    ) -> None:
        self.recipe, self.folder, self.write_report, self.track = recipe, folder, write_report, track
        self.checkpoint = open_model(recipe.model)
        self.request = _plan_request(recipe)
        self.rows = self.request.calibrated.rows()
        self.packing = _packing_request(recipe, self.request.calibrated)
        self.rounds_kv = recipe.export.kv_cache != "keep"
        check_graphs(
            self.checkpoint,
            formats=recipe.export.formats or default_formats(self.checkpoint)[0],
            precision="keep" if self.packing is not None else recipe.export.precision,
            operators=recipe.export.operators,
            packing=self.packing,
            rounds_kv=self.rounds_kv,
        )
        self.evaluation_rows = find_rows(recipe.evaluation.tasks, num_items=recipe.evaluation.num_items)
        self.gates = Gates(min_score=recipe.evaluation.min_score, max_ppl_ratio=recipe.evaluation.max_ppl_ratio)
        self.gates.check_rows(self.evaluation_rows, has_whole=True)
        self.distill_settings = _distill_settings(recipe)

    def steps(self) -> list[Step]:
        recipe = self.recipe
        shared = {"model": _model_key(self.checkpoint), "seed": recipe.seed, "dtype": recipe.dtype}
        shown = {**shared, "data": asdict(recipe.data), "rows": _rows_key(self.rows)}
        # By default those of what the graphs run on, which may be another machine than that of a run that was killed.
        computed = {} if self.packing is None else {"activations": self.packing.activations}
        plan = {
            **shown,
            "precision": recipe.export.precision,
            "blocks": [recipe.export.block_size, recipe.export.zero_points],
            **computed,
            "plan": _plain(asdict(recipe.plan)),
            "judging": _rows_key(self.request.calibrated.judging_rows()),
            **({"kv_cache": recipe.export.kv_cache} if self.rounds_kv else {}),
        }
        evaluation = {**shared, "evaluation": asdict(recipe.evaluation), "rows": _rows_key(self.evaluation_rows)}
        unsaid = {"activations"} | (
            {"kv_cache"} if not self.rounds_kv else set()
        )  # as in folders from before there was a choice
        written = {name: value for name, value in asdict(recipe.export).items() if name not in unsaid} | computed
        looks = self.packing is not None or self.rounds_kv  # at samples
        export = {**(shown if looks else shared), **written}
        healed = () if recipe.heal is None else (HEALED,)
        steps = [
            Step("profile", PROFILE, {**shown, "alpha": recipe.alpha}, (), self.profile),
            Step("plan", SCHEDULE, plan, (PROFILE,), self.plan),
        ]
        if recipe.heal is not None:
            heal = {**shown, "heal": _plain(asdict(recipe.heal)), "healing rows": _rows_key(self.healing_rows())}
            steps.append(Step("heal", HEALED, heal, (SCHEDULE,), self.heal))
        steps += [
            Step("evaluate", EVALUATION, evaluation, (SCHEDULE, *healed), self.evaluate),
            Step("export", PRUNED, export, (SCHEDULE, *healed, EVALUATION), self.export),
        ]
        findings = [PROFILE, SCHEDULE, EVALUATION, PRUNED]
        if recipe.bench is not None:
            steps.append(Step("bench", BENCHMARK, {**shared, **asdict(recipe.bench)}, (PRUNED,), self.bench))
            findings.append(BENCHMARK)
        steps.append(Step("report", REPORT, {}, tuple(findings), self.report))
        return steps

    def profile(self) -> None:
        recipe = self.recipe
        profile_model(
            self.checkpoint,
            self.rows,
            responses=recipe.data.responses,
            max_new_tokens=recipe.data.max_new_tokens,
            lac=LacSettings(alpha=recipe.alpha),
            batch_size=recipe.data.batch_size,
            dtype=recipe.dtype,
            device=recipe.device,
            output=self.folder / PROFILE,
            overwrite=True,
            track=self.track,
        )

    def plan(self) -> None:
        planned = plan_from_model(
            self.request,
            self.checkpoint,
            sizes=self.sizes(),
            profile=read_profile(self.folder / PROFILE),
            output=self.folder / SCHEDULE,
            overwrite=True,
            track=self.track,
        )
        write_schedule(self.folder / SCHEDULE, planned.schedule, overwrite=True)

    def sizes(self) -> ModelSizes:
        """Of the model as it will be exported."""
        if self.packing is not None:
            sizes = measure_packed_sizes(self.checkpoint, self.packing)
        else:
            sizes = measure_sizes(self.checkpoint, dtype=PRECISIONS.get(self.recipe.export.precision))
        return sizes.with_kv_bytes(self.checkpoint.architecture.kv_width if self.rounds_kv else None)

    def healing_rows(self) -> list[Row]:
        heal, data = self.recipe.heal, self.recipe.data
        assert heal is not None
        dataset, num_samples = heal.dataset or data.dataset, heal.num_samples or data.num_samples
        if dataset is None:
            return default_rows()[:num_samples]
        return find_rows(dataset, num_items=num_samples, split="training")

    def heal(self) -> None:
        recipe = self.recipe
        assert recipe.heal is not None
        data = recipe.data
        heal_model(
            self.checkpoint,
            read_schedule(self.folder / SCHEDULE),
            self.folder / HEALED,
            self.healing_rows(),
            methods=recipe.heal.methods,
            distill_settings=self.distill_settings,
            answering=Answering(data.responses, data.max_new_tokens, None, data.batch_size),
            dtype=recipe.dtype,
            device=recipe.device,
            overwrite=True,
            track=self.track,
        )

    def evaluate(self) -> None:
        """The pruned model, healed where it was, beside the whole one. Raises QualityGateError where it is not good enough."""
        evaluation, is_healed = self.recipe.evaluation, self.recipe.heal is not None
        report = evaluate_model(
            str(self.folder / HEALED) if is_healed else self.recipe.model,
            self.evaluation_rows,
            dataset=dataset_name(evaluation.tasks),
            schedule=None if is_healed else read_schedule(self.folder / SCHEDULE),
            baseline=self.recipe.model if is_healed else None,
            max_new_tokens=evaluation.max_new_tokens,
            track=self.track,
        )
        artifacts.write_file(self.folder / EVALUATION, artifacts.canonical_bytes(report.to_document()), overwrite=True)
        self.gates.check(report, consequence="nothing was exported")

    def export(self) -> None:
        recipe = self.recipe
        checkpoint, schedule = self.checkpoint, read_schedule(self.folder / SCHEDULE)
        if recipe.heal is not None:
            checkpoint = open_model(str(self.folder / HEALED))
            own = own_schedule(checkpoint)
            assert own is not None, "the folder is a bundle"
            schedule = own
        export_model(
            checkpoint,
            schedule,
            self.folder / PRUNED,
            formats=recipe.export.formats or default_formats(checkpoint)[0],
            precision="keep" if self.packing is not None else recipe.export.precision,
            packing=self.packing,
            kv=self.request.calibrated if self.rounds_kv else None,
            operators=recipe.export.operators,
            overwrite=True,
            seed=recipe.seed,
            track=self.track,
        )

    def bench(self) -> None:
        bench = self.recipe.bench
        assert bench is not None
        document = benchmark_bundle(
            self.folder / PRUNED,
            baseline=self.recipe.model,
            prompt_lengths=(bench.prompt_length,),
            context_lengths=(bench.prompt_length,),
            num_new_tokens=bench.num_new_tokens,
            num_rounds=bench.num_rounds,
            seed=self.recipe.seed,
            track=self.track,
        )
        artifacts.write_file(self.folder / BENCHMARK, artifacts.canonical_bytes(document), overwrite=True)

    def report(self) -> None:
        self.write_report(self.folder, self.folder / REPORT)


def _packing_request(recipe: CompressionRecipe, calibrated: Calibrated) -> PackingRequest | None:
    export = recipe.export
    if export.precision not in PACKED_PRECISIONS:
        return None
    return PackingRequest(
        export.precision,
        block_size=export.block_size,
        zero_points=export.zero_points,
        activations=export.activations or default_activations(export.precision),
        rounding=export.rounding,
        calibrated=calibrated,
    )


def _plan_request(recipe: CompressionRecipe) -> PlanRequest:
    plan, data = recipe.plan, recipe.data
    return PlanRequest(
        budget=plan.budget,
        criterion=plan.criterion,
        goal=plan.goal,
        max_loss=plan.max_loss,
        drop_layers=plan.budget.dropped or None,
        boundary=Boundary(plan.boundary),
        single_turn=plan.single_turn,
        search_evaluations=plan.search_evaluations,
        seed=recipe.seed,
        calibrated=replace(
            Calibrated(**asdict(data), dtype=recipe.dtype, device=recipe.device),
            judging=plan.judging,
            num_judging=plan.num_judging,
        ),
    )


def _distill_settings(recipe: CompressionRecipe) -> DistillSettings:
    """Raises RecipeError for a name that is no setting, HealingError for a value that makes no sense."""
    given = dict(recipe.heal.settings or {}) if recipe.heal is not None else {}
    loss = {field.name: given.pop(field.name) for field in fields(DistillLoss) if field.name in given}
    known = {field.name for field in fields(DistillSettings)} - {"loss", "held_out", "phase_blind"}
    if unknown := given.keys() - known:
        raise RecipeError(
            f"heal: distill has unknown keys: {', '.join(sorted(unknown))}",
            hint=f"known here: {', '.join(sorted(known | {field.name for field in fields(DistillLoss)}))}",
        )
    return DistillSettings(**{"seed": recipe.seed, **given}, loss=DistillLoss(**loss))  # type: ignore[arg-type]


def _model_key(checkpoint: Checkpoint) -> dict[str, Any]:
    """What changes when the model does: its shape, and size and time of its weight files, which may be too large to be read."""
    files = sorted({record.file for record in checkpoint.tensors.values()})
    return {
        **checkpoint.identity.to_document(),
        "revision": checkpoint.revision,
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()],
    }


def _rows_key(rows: Sequence[Row] | None) -> str | None:
    """A hash of all that rows say."""
    if rows is None:
        return None
    return hashlib.sha256(artifacts.canonical_bytes({"rows": [asdict(row) for row in rows]})).hexdigest()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them."""
    return {
        name: sorted(value) if isinstance(value, frozenset) else _plain(value) if isinstance(value, dict) else value
        for name, value in settings.items()
    }
