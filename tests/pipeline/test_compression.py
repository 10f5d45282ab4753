"""A compression recipe on the model that ships: every step, and only what has changed when it is run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from voidprune import artifacts
from voidprune.errors import ModelError, QualityGateError, RuntimeProviderError
from voidprune.execution.manifest import read_manifest
from voidprune.pipeline import export as pipeline_export
from voidprune.pipeline import precision
from voidprune.pipeline.compression import compression_steps
from voidprune.pipeline.steps import preview_steps, run_steps
from voidprune.planning.budgets import Budget
from voidprune.recipe import CompressionRecipe
from voidprune.recipe.compression import BenchPart, DataPart, EvaluationPart, ExportPart, HealPart, PlanPart
from voidprune.schedule import read_schedule

RECIPE = CompressionRecipe(
    model="demo",
    plan=PlanPart(Budget(keep_prefill=0.5, keep_decode=0.75), criterion="lac"),
    data=DataPart("demo", num_samples=3, responses="dataset", max_new_tokens=24),
    heal=HealPart(("linear",), num_samples=8),
    evaluation=EvaluationPart("demo", num_items=2, max_new_tokens=8),
    bench=BenchPart(prompt_length=8, num_new_tokens=3, num_rounds=1),
)
ALL = ["profile", "plan", "heal", "evaluate", "export", "bench", "report"]


def write(folder: Path, file: Path) -> None:
    file.write_text(f"<p>{len(list(folder.iterdir()))} files</p>")


def run(recipe: CompressionRecipe, folder: Path, *, rerun: Sequence[str] = ()) -> list[str]:
    """The steps that were run."""
    steps = compression_steps(recipe, folder, write_report=write)
    return [state.name for state in run_steps(steps, folder, rerun=rerun) if state.must_run]


def previewed(recipe: CompressionRecipe, folder: Path) -> list[str]:
    states = preview_steps(compression_steps(recipe, folder, write_report=write), folder)
    return [state.name for state in states if state.must_run]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compression") / "out"
    assert previewed(RECIPE, folder) == ALL
    assert not folder.exists(), "a preview writes nothing"
    assert run(RECIPE, folder) == ALL
    return folder


def test_the_folder_holds_the_whole_job(folder: Path) -> None:
    schedule = read_schedule(folder / "schedule.json")
    assert (sum(action.attends for action in schedule.prefill), len(schedule.prefill)) == (6, 12)
    pruned = read_manifest(folder / "pruned")
    assert pruned.schedule == schedule
    assert pruned.healing is not None
    assert pruned.healing.methods == ("linear",)
    assert pruned.graphs
    evaluation = artifacts.read_document(folder / "evaluation.json", kind="evaluation", version=2)
    assert evaluation["model"] == "healed"
    assert (folder / "report.html").read_text().startswith("<p>")


def test_nothing_is_done_twice(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.name != "steps.json"}
    assert previewed(RECIPE, folder) == []
    assert run(RECIPE, folder) == []
    assert before == {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.name != "steps.json"}


def test_what_a_change_reaches(folder: Path) -> None:
    """A preview cannot know that a step will write the same again, so it may say more than is run."""
    bench = replace(RECIPE, bench=BenchPart(prompt_length=9, num_new_tokens=3, num_rounds=1))
    assert previewed(bench, folder) == ["bench", "report"]
    evaluation = replace(RECIPE, evaluation=replace(RECIPE.evaluation, num_items=3))
    assert previewed(evaluation, folder) == ["evaluate", "export", "bench", "report"]
    assert previewed(replace(RECIPE, plan=replace(RECIPE.plan, single_turn=True)), folder) == ALL[1:]
    assert previewed(replace(RECIPE, alpha=0.5), folder) == ALL
    assert previewed(replace(RECIPE, export=replace(RECIPE.export, operators="standard")), folder) == ALL[4:]


def test_graphs_of_a_recipe_may_have_packed_matrices(tmp_path: Path) -> None:
    packed = ExportPart(precision="int4", block_size=128, zero_points=True, rounding="gptq")
    recipe = replace(RECIPE, heal=None, export=packed, data=replace(RECIPE.data, num_samples=12))
    assert run(recipe, tmp_path / "out") == [step for step in ALL if step != "heal"]
    quantization = read_manifest(tmp_path / "out" / "pruned").quantization
    assert quantization is not None
    assert (quantization.precision, quantization.block_size, quantization.zero_points) == ("int4", 128, True)
    assert quantization.rounding == "gptq"
    assert quantization.fidelity is not None
    # Rounded on the samples, it is made again when they change, even if the schedule does not.
    for export, depends in ((packed, True), (RECIPE.export, False)):
        one, other = (
            compression_steps(replace(recipe, export=export, data=data), tmp_path / "out", write_report=write)
            for data in (recipe.data, RECIPE.data)
        )
        settings = [next(step.settings for step in steps if step.name == "export") for steps in (one, other)]
        assert (settings[0] != settings[1]) is depends


def test_graphs_of_a_recipe_may_hold_keys_and_values_in_8_bits(tmp_path: Path) -> None:
    recipe = replace(RECIPE, heal=None, bench=None, export=ExportPart(kv_cache="int8"))
    recipe = replace(recipe, data=replace(RECIPE.data, num_samples=12))
    assert run(recipe, tmp_path / "out")[-2:] == ["export", "report"]
    record = read_manifest(tmp_path / "out" / "pruned").kv_cache
    assert record is not None
    assert record.fidelity is not None
    for part in ("plan", "export"):  # a folder from before there was a choice goes on
        settings = [
            next(
                step.settings
                for step in compression_steps(one, tmp_path / "out", write_report=write)
                if step.name == part
            )
            for one in (recipe, replace(recipe, export=ExportPart()))
        ]
        assert settings[0]["kv_cache"] == "int8"
        assert "kv_cache" not in settings[1]
    with pytest.raises(ModelError, match="the standard's attention"):
        compression_steps(
            replace(recipe, export=ExportPart(kv_cache="int8", operators="standard")), tmp_path, write_report=write
        )


def test_the_bytes_of_packed_matrices_are_planned_by(tmp_path: Path) -> None:
    plans = []
    for changes in ({}, {"block_size": 128}, {"zero_points": True}, {"rounding": "gptq"}):
        recipe = replace(RECIPE, export=replace(ExportPart(precision="int4"), **changes))  # type: ignore[arg-type]
        steps = compression_steps(recipe, tmp_path / "out", write_report=write)
        plans.append(next(step.settings for step in steps if step.name == "plan"))
    assert plans[0] == plans[3] != plans[1]
    assert plans[2] not in (plans[0], plans[1])


def test_what_packed_graphs_compute_in_is_part_of_what_steps_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is begun on one machine and ended on another: there the default is another."""

    def settings(**changes: str) -> list[object]:
        recipe = replace(RECIPE, export=replace(ExportPart(precision="int4"), **changes))  # type: ignore[arg-type]
        steps = compression_steps(recipe, tmp_path / "out", write_report=write)
        return [step.settings.get("activations") for step in steps if step.name in ("plan", "export")]

    assert settings() == ["int8"] * 2
    assert settings(activations="fp16") == ["fp16"] * 2
    monkeypatch.setattr(precision, "default_provider", lambda: "cuda")
    assert settings() == ["fp16"] * 2
    assert settings(activations="fp32") == ["fp32"] * 2


def test_graphs_that_would_not_run_are_refused_before_a_step_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_export, "default_provider", lambda: "cuda")
    with pytest.raises(RuntimeProviderError, match="would attend in float32"):
        compression_steps(RECIPE, tmp_path / "out", write_report=write)


def test_packed_graphs_that_cannot_be_are_refused_before_a_step_has_run(tmp_path: Path) -> None:
    recipe = replace(RECIPE, export=replace(RECIPE.export, precision="w8a8", operators="standard"))
    with pytest.raises(ModelError, match="take the zero points of packed matrices from the file"):
        compression_steps(recipe, tmp_path / "out", write_report=write)
    recipe = replace(RECIPE, export=replace(RECIPE.export, precision="w8a8", formats=("hf",)))
    with pytest.raises(ModelError, match="w8a8 is a precision of ONNX graphs"):
        compression_steps(recipe, tmp_path / "out", write_report=write)


def test_a_missed_gate_exports_nothing(tmp_path: Path) -> None:
    recipe = replace(RECIPE, heal=None, bench=None, evaluation=replace(RECIPE.evaluation, min_score=1.0))
    recipe = replace(recipe, plan=PlanPart(Budget(keep_prefill=0.2, keep_decode=0.2), criterion="last-n"))
    folder = tmp_path / "out"
    with pytest.raises(QualityGateError) as caught:
        run(recipe, folder)
    assert caught.value.hint is not None
    assert "nothing was exported" in caught.value.hint
    assert not (folder / "pruned").exists()
    assert (folder / "evaluation.json").is_file()
    lenient = replace(recipe, evaluation=replace(recipe.evaluation, min_score=None))
    assert run(lenient, folder) == ["evaluate", "export", "report"], "profile and schedule are kept"
    assert read_manifest(folder / "pruned").healing is None
