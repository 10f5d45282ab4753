"""A model and a schedule become a healed bundle: slim weights, some of them better than the source's, and the record of how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from voidprune import artifacts
from voidprune.errors import HealingError
from voidprune.execution import manifest as manifests
from voidprune.execution.manifest import Healing, HeldOutLoss, Manifest, Parity
from voidprune.execution.reference import scheduled
from voidprune.export.bundle import Healed, export_bundle
from voidprune.healing.linear import check_foldable, fit_projections
from voidprune.healing.training_data import hold_out, prompt_hash
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import DTYPES, default_device, load_model
from voidprune.models.tensors import precision_name
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.samples import Answering, prepare_samples
from voidprune.profiling.calibration import Row, Sample, fingerprint_samples
from voidprune.quality.evaluation import evaluate
from voidprune.quality.parity import check_bundle
from voidprune.schedule import Schedule, full_schedule

HELD_OUT = 0.1
"""Share of the samples that nothing is fitted to."""

State = Mapping[str, Tensor]
"""New values of tensors, by their names in the slim checkpoint."""


@dataclass(frozen=True, eq=False)
class Patient:
    """What a method is given. `state` is what the methods before it changed."""

    checkpoint: Checkpoint
    schedule: Schedule
    samples: Sequence[Sample]
    state: State
    dtype: str
    device: str
    batch_size: int
    track: Track

    def load_whole(self) -> PreTrainedModel:
        """The whole model, with what was changed so far."""
        model = load_model(self.checkpoint.folder, dtype=self.dtype, device=self.device)
        apply_state(model, self.checkpoint, self.schedule, self.state)
        return model


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a method did: the tensors that it changed, and its settings and outcome as plain JSON."""

    state: State
    settings: Mapping[str, Any]
    outcome: Mapping[str, Any]


def _fit(patient: Patient) -> Treatment:
    fitting, held_out = hold_out(patient.samples, share=HELD_OUT)
    with patient.track("fitting", patient.schedule.num_layers, "layers") as advance:
        fitted = fit_projections(
            patient.load_whole(), patient.schedule, fitting, held_out, batch_size=patient.batch_size, advance=advance
        )
    names, kept = patient.checkpoint.architecture.spec.tensors, patient.schedule.union
    state = {}
    for name, tensor in fitted.state.items():
        place = names.layer_of(name)
        assert place is not None
        state[names.layer(kept.index(place[0]), place[1])] = tensor
    return Treatment(state, {"held_out": HELD_OUT}, {"branches": [branch.to_document() for branch in fitted.branches]})


METHODS: Mapping[str, Callable[[Patient], Treatment]] = {"linear": _fit}
"""What `--method` can be."""


def heal_model(
    checkpoint: Checkpoint,
    schedule: Schedule,
    folder: Path,
    rows: Sequence[Row],
    *,
    methods: Sequence[str] = ("linear",),
    answering: Answering = Answering(),  # noqa: B008  a frozen value
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> Manifest:
    """Heal a model under a schedule, one method after the other, and write a bundle without graphs: `voidprune export` makes them.

    What is not better on held-out samples is not kept; the record in the manifest says what came of it. The folder is verified
    before it is published. Raises every VoidpruneError of the way.
    """
    artifacts.check_output_folder(folder, overwrite=overwrite, marker=manifests.FILE)
    schedule.check_model(checkpoint.identity, place="the schedule")
    _check_healable(checkpoint, schedule, methods)
    device = device or default_device()
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    samples = prepare_samples(checkpoint, rows, answering, dtype=dtype, device=device, track=track)
    _, held_out = hold_out(samples, share=HELD_OUT)
    patient = Patient(checkpoint, schedule, samples, {}, dtype, device, answering.batch_size, track)
    settings, outcomes = {}, {}
    for method in methods:
        treatment = METHODS[method](patient)
        settings[method], outcomes[method] = treatment.settings, treatment.outcome
        stored = {name: _rounded(tensor, checkpoint) for name, tensor in treatment.state.items()}
        patient = replace(patient, state={**patient.state, **stored})
    found, state = _measure(patient, held_out)
    record = Healing(
        methods=tuple(methods),
        settings=settings,
        outcomes=outcomes,
        samples=fingerprint_samples(samples),
        prompts=tuple(sorted({prompt_hash(sample.prompt) for sample in samples})),
        held_out=found,
    )

    def verify(stage: Path) -> Parity:
        """The folder gives what the whole model gives with the same weights changed, in the dtype of the folder."""
        with track("verifying", None, "steps"):
            source = load_model(checkpoint.folder, dtype=precision_name(checkpoint.dtype), device=device)
            apply_state(source, checkpoint, schedule, state)
            return check_bundle(stage, source=source, schedule=schedule)

    return export_bundle(
        checkpoint,
        schedule,
        folder,
        verify=verify,
        formats=("hf",),
        overwrite=overwrite,
        healed=Healed({name: tensor.float().numpy() for name, tensor in state.items()}, record),
    )


def _check_healable(checkpoint: Checkpoint, schedule: Schedule, methods: Sequence[str]) -> None:
    if schedule.is_full:
        raise HealingError("the schedule leaves nothing out, so there is nothing to heal", hint="plan one that does")
    if manifests.is_bundle(checkpoint.folder):
        raise HealingError(
            f"{checkpoint.name} is a bundle: what was left out is not there to learn from",
            hint="give the whole model, and the bundle's schedule with --schedule",
        )
    if checkpoint.config.get("quantization_config"):
        raise HealingError(
            f"{checkpoint.name} is quantized, and healed weights are not",
            hint="heal the checkpoint that was quantized, then quantize it again",
        )
    if "linear" in methods:
        check_foldable(checkpoint)


def apply_state(model: PreTrainedModel, checkpoint: Checkpoint, schedule: Schedule, state: State) -> None:
    """Give the whole model the weights that were changed in the slim one."""
    architecture = checkpoint.architecture
    names, place = architecture.spec.tensors, architecture.spec.modules.layers
    for name, tensor in state.items():
        found = names.layer_of(name)
        if found is not None:
            name = f"{place}.{schedule.union[found[0]]}.{found[1]}"
        with torch.no_grad():
            model.get_parameter(name).copy_(tensor)


def _rounded(tensor: Tensor, checkpoint: Checkpoint) -> Tensor:
    """As the checkpoint will hold it, so that what is measured is what is written."""
    return tensor.cpu().to(getattr(torch, DTYPES[precision_name(checkpoint.dtype)]))


def _measure(patient: Patient, held_out: Sequence[Sample]) -> tuple[HeldOutLoss, State]:
    """The losses on held-out samples, and the state that is best there: what was changed, or nothing."""
    questions = [replace(sample, answer=None, choices=()) for sample in held_out]

    def loss(model: PreTrainedModel, schedule: Schedule) -> float:
        with scheduled(model, schedule) as running:
            found = evaluate(
                running, questions, decode_text=str, end_tokens=(), batch_size=patient.batch_size, on_progress=advance
            ).loss
        assert found is not None
        return found

    with patient.track("measuring", 3 * len(questions), "samples") as advance:
        model = replace(patient, state={}).load_whole()
        whole = loss(model, full_schedule(patient.schedule.model, boundary=patient.schedule.boundary))
        before = loss(model, patient.schedule)
        apply_state(model, patient.checkpoint, patient.schedule, patient.state)
        after = loss(model, patient.schedule)
    is_better = after < before
    num_tokens = sum(len(sample.response or ()) for sample in questions)
    found = HeldOutLoss(len(questions), num_tokens, whole, before, after if is_better else before)
    return found, patient.state if is_better else {}
