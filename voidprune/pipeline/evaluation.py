"""A bundle or a model is evaluated, with the whole model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import voidprune
from voidprune import artifacts
from voidprune.errors import ModelError, ScheduleError
from voidprune.execution.manifest import is_bundle, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.reference_by_phase import scheduled_by_phase
from voidprune.execution.session import BundleSession
from voidprune.healing.training_data import check_disjoint
from voidprune.models.checkpoint import Checkpoint, open_packed, precision_name
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.pipeline.models import default_provider, open_model, whole_identity
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row, Sample, encode_rows
from voidprune.quality.agreement import Agreement, OpenRunner, measure_agreement
from voidprune.quality.evaluation import Evaluation, count_differences, count_steps, evaluate, require_agreement
from voidprune.quality.layer_streaming import resident_model
from voidprune.quality.paired import Comparison, compare_runners
from voidprune.quality.statistics import CONFIDENCE, NUM_RESAMPLES, SEED
from voidprune.schedule import Phase, Schedule, full_schedule, schedule_hash

WHOLE, REFERENCE, ONNX = "whole model", "reference", "onnx"


@dataclass(frozen=True)
class EvaluationReport:
    """Evaluations of several runners on the same items, by name: WHOLE, REFERENCE, ONNX, in this order, as far as they are there.

    `model_fingerprint` is that of the whole model: see `schedule.ModelIdentity`. `schedule` is None where only that ran.
    `agreements` are with the whole model, by the name of the other runner. `different` counts the
    responses that the reference and the ONNX bundle give differently; None where there is no bundle.
    """

    model: str
    model_fingerprint: str
    dataset: str
    num_items: int
    max_new_tokens: int
    evaluations: dict[str, Evaluation]
    schedule: Schedule | None = None
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    different: int | None = None

    @property
    def judged(self) -> str:
        """The runner whose quality counts: what would be shipped."""
        return list(self.evaluations)[-1]

    def compare(self, name: str) -> Comparison | None:
        """A runner beside the whole model; None where that did not run, or is itself asked for."""
        if name == WHOLE or WHOLE not in self.evaluations:
            return None
        return compare_runners(self.evaluations[WHOLE], self.evaluations[name])

    def to_document(self) -> artifacts.Document:
        runners = []
        for name, result in self.evaluations.items():
            comparison, agreement = self.compare(name), self.agreements.get(name)
            against = None
            if comparison is not None:
                against = {
                    **comparison.to_document(),
                    "agreement": None if agreement is None else agreement.to_document(),
                }
            runners.append({"name": name, **result.to_document(), "against_whole": against})
        return {
            "schema": artifacts.schema_key("evaluation", 2),
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "dataset": self.dataset,
            "num_items": self.num_items,
            "schedule_hash": None if self.schedule is None else schedule_hash(self.schedule),
            "max_new_tokens": self.max_new_tokens,
            "intervals": {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "seed": SEED},
            "runners": runners,
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
    """Evaluate a bundle or a model by name: see `evaluate_checkpoint`. `baseline` names the whole model of a bundle."""
    return evaluate_checkpoint(
        open_model(name),
        rows,
        dataset=dataset,
        schedule=schedule,
        baseline=None if baseline is None else open_model(baseline),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        provider=provider,
        track=track,
    )


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    dataset: str,
    schedule: Schedule | None = None,
    baseline: Checkpoint | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    provider: str | None = None,
    track: Track = untracked,
) -> EvaluationReport:
    """Evaluate a bundle (reference and graphs, which must agree in float32) or a model (whole, and under a schedule).

    All runners are in memory together, because their predictions are compared batch by batch. Raises HealingError where a bundle
    was fitted to these items, ParityError where a float32 bundle disagrees with its reference, ScheduleError and ModelError where
    the options do not go with what the checkpoint is.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    samples = encode_rows(
        rows,
        tokenizer,
        end_tokens=ends,
        max_length=checkpoint.architecture.context_length,
        max_new_tokens=max_new_tokens,
    )
    check_never_fitted_to(checkpoint, samples, dataset=dataset)
    runners, judged_schedule = open_runners(checkpoint, schedule=schedule, baseline=baseline, provider=provider)
    results: dict[str, Evaluation] = {}
    for label, opened in runners.items():
        with track(label, count_steps(samples), "items") as advance, opened() as runner:
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
    if ONNX in results:
        if read_manifest(checkpoint.folder).is_exact:
            require_agreement(results[REFERENCE], results[ONNX])
        different = count_differences(results[REFERENCE], results[ONNX])
    agreements: dict[str, Agreement] = {}
    if WHOLE in runners and len(runners) > 1:
        whole, others = runners[WHOLE], {label: opened for label, opened in runners.items() if label != WHOLE}
        num_scored = sum(sample.response is not None for sample in samples)
        with track("agreement with the whole model", num_scored, "items") as advance:
            agreements = measure_agreement(whole, others, samples, batch_size=batch_size, on_progress=advance)
    return EvaluationReport(
        model=checkpoint.name,
        model_fingerprint=whole_identity(checkpoint).fingerprint,
        dataset=dataset,
        num_items=len(rows),
        max_new_tokens=max_new_tokens,
        evaluations=results,
        schedule=judged_schedule,
        agreements=agreements,
        different=different,
    )


def check_never_fitted_to(checkpoint: Checkpoint, samples: Sequence[Sample], *, dataset: str) -> None:
    """Raise HealingError where weights of a bundle were healed with, or rounded on, items that it is to be evaluated on."""
    trained = fitted_prompts(checkpoint)
    if trained is not None:
        check_disjoint(trained, [sample.prompt for sample in samples], what=dataset)


def fitted_prompts(checkpoint: Checkpoint) -> frozenset[str] | None:
    """See `Manifest.fitted_prompts`; None where there are none."""
    return (read_manifest(checkpoint.folder).fitted_prompts or None) if is_bundle(checkpoint.folder) else None


def open_runners(
    checkpoint: Checkpoint,
    *,
    schedule: Schedule | None = None,
    baseline: Checkpoint | None = None,
    provider: str | None = None,
) -> tuple[dict[str, OpenRunner], Schedule | None]:
    """Everything that can be run of a bundle (with its whole model, if given) or a model (with a schedule, if given).

    Runners by name, whole model first, and the schedule of the others; each is entered when it is its turn.
    """
    if not is_bundle(checkpoint.folder):
        if baseline is not None:
            raise ModelError(
                f"{checkpoint.name} is no bundle to put beside a baseline",
                hint="leave --baseline out, or give a bundle",
            )
        model = load_model(checkpoint.folder, device=default_device())
        full = full_schedule(checkpoint.identity)
        runners: dict[str, OpenRunner] = {WHOLE: lambda: scheduled(model, full)}
        if schedule is not None:
            schedule.check_model(checkpoint.identity, place="the schedule")
            runners[REFERENCE] = lambda: scheduled(model, schedule)
        return runners, schedule
    if schedule is not None:
        raise ScheduleError(f"{checkpoint.name} is a bundle and has its schedule already", hint="give the whole model")
    manifest, device = read_manifest(checkpoint.folder), default_device()
    dtype = precision_name(manifest.dtype)
    runners = {}
    if baseline is not None:
        manifest.schedule.check_model(baseline.identity, place=str(checkpoint.folder))
        whole, whole_schedule = (
            load_model(baseline.folder, dtype=dtype, device=device),
            full_schedule(baseline.identity),
        )
        runners[WHOLE] = lambda: scheduled(whole, whole_schedule)
    slim_schedule = manifest.schedule.on_slim_model(checkpoint.identity)
    if manifest.quantization is None:
        slim = load_model(checkpoint.folder, dtype=dtype, device=device)
    else:  # what the graphs must equal: the packed matrices, not what they were made of
        packed = checkpoint.folder / manifest.quantization.file
        slim = resident_model(open_packed(packed), device=device)
    runners[REFERENCE] = lambda: scheduled(slim, slim_schedule)
    if manifest.quantization is not None and manifest.quantization.differs_by_phase:
        of_prefill = resident_model(open_packed(packed, phase=Phase.PREFILL), device=device)
        runners[REFERENCE] = lambda: scheduled_by_phase(of_prefill, slim, slim_schedule)
    if manifest.graphs:
        session = BundleSession(checkpoint.folder, provider=provider or default_provider())
        runners[ONNX] = lambda: nullcontext(session)
    return runners, manifest.schedule
