"""A bundle or a model is evaluated, with the whole model beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import voidprune
from voidprune import artifacts
from voidprune.errors import ModelError, ScheduleError
from voidprune.execution.manifest import is_bundle, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import Checkpoint, precision_name
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.pipeline.models import default_provider, open_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row, encode_rows
from voidprune.quality.evaluation import Evaluation, Runner, count_differences, evaluate, require_agreement
from voidprune.schedule import Schedule, full_schedule


@dataclass(frozen=True)
class EvaluationReport:
    """Evaluations of several runners on the same items, by runner name.

    `different` counts the responses that the reference and the ONNX bundle give differently; None where there is no bundle.
    """

    model: str
    dataset: str
    max_new_tokens: int
    evaluations: dict[str, Evaluation]
    different: int | None = None

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key("evaluation", 1),
            "model": self.model,
            "dataset": self.dataset,
            "max_new_tokens": self.max_new_tokens,
            "runners": [{"name": name, **result.to_document()} for name, result in self.evaluations.items()],
            "different_responses": self.different,
            "written_by": f"voidprune {voidprune.__version__}",
        }


def evaluate_model(
    name: str,
    rows: Sequence[Row],
    *,
    dataset: str,
    schedule: Schedule | None = None,
    baseline: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    provider: str | None = None,
    track: Track = untracked,
) -> EvaluationReport:
    """Evaluate a bundle (reference and graphs, which must agree in float32) or a model (whole, and under a schedule).

    For a bundle, `baseline` names the whole model to put beside it. Raises ParityError where a float32 bundle disagrees with its
    reference, ScheduleError and ModelError where the options do not go with what `name` is.
    """
    checkpoint = open_model(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    samples = encode_rows(
        rows,
        tokenizer,
        end_tokens=ends,
        max_length=checkpoint.architecture.context_length,
        max_new_tokens=max_new_tokens,
    )
    results: dict[str, Evaluation] = {}

    def run(label: str, runner: Runner) -> None:
        total = sum((sample.response is not None) + (sample.answer is not None) for sample in samples)
        with track(label, total, "items") as advance:
            results[label] = evaluate(
                runner,
                samples,
                decode_text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
                end_tokens=ends,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_progress=advance,
            )

    different = None
    if is_bundle(checkpoint.folder):
        if schedule is not None:
            raise ScheduleError(f"{name} is a bundle and has its schedule already", hint="give the whole model")
        different = _run_bundle(checkpoint, run, baseline=baseline, provider=provider, results=results)
    elif baseline is not None:
        raise ModelError(f"{name} is no bundle to put beside a baseline", hint="leave --baseline out, or give a bundle")
    else:
        schedules = {"whole model": full_schedule(checkpoint.identity)}
        if schedule is not None:
            schedule.check_model(checkpoint.identity, place="the schedule")
            schedules["reference"] = schedule
        model = load_model(checkpoint.folder, device=default_device())
        for label, actions in schedules.items():
            with scheduled(model, actions) as runner:
                run(label, runner)
    return EvaluationReport(checkpoint.name, dataset, max_new_tokens, results, different)


def _run_bundle(
    checkpoint: Checkpoint,
    run: Callable[[str, Runner], None],
    *,
    baseline: str | None,
    provider: str | None,
    results: dict[str, Evaluation],
) -> int | None:
    """Whole model, reference and graphs of a bundle; how many responses of the last two differ."""
    manifest, device = read_manifest(checkpoint.folder), default_device()
    dtype = precision_name(manifest.dtype)
    if baseline is not None:
        whole = open_model(baseline)
        manifest.schedule.check_model(whole.identity, place=str(checkpoint.folder))
        with scheduled(load_model(whole.folder, dtype=dtype, device=device), full_schedule(whole.identity)) as runner:
            run("whole model", runner)
    slim = manifest.schedule.on_slim_model(checkpoint.identity)
    with scheduled(load_model(checkpoint.folder, dtype=dtype, device=device), slim) as runner:
        run("reference", runner)
    if not manifest.graphs:
        return None
    run("onnx", BundleSession(checkpoint.folder, provider=provider or default_provider()))
    if manifest.dtype == "F32":
        require_agreement(results["reference"], results["onnx"])
    return count_differences(results["reference"], results["onnx"])
