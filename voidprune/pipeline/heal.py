"""A model and a schedule become a healed bundle: slim weights, some of them better than the source's, and the record of how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from voidprune import artifacts
from voidprune.errors import HealingError
from voidprune.execution import manifest as manifests
from voidprune.execution.manifest import Healing, HeldOutLoss, Manifest, Parity
from voidprune.execution.reference import scheduled
from voidprune.export.bundle import Healed, export_bundle
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.healing.adapters import load_weights, require_peft
from voidprune.healing.distillation import Distilled, distill, open_accelerator
from voidprune.healing.linear import check_foldable, fit_projections
from voidprune.healing.settings import DistillSettings, Parameters
from voidprune.healing.training_data import hold_out, prompt_hash
from voidprune.healing.training_state import Measurement
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import DTYPES, default_device, load_model
from voidprune.models.tensors import precision_name
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.rounds import Rounds, prune_further
from voidprune.pipeline.samples import Answering, prepare_samples
from voidprune.planning.budgets import Budget
from voidprune.profiling.calibration import Row, Sample, fingerprint_samples
from voidprune.quality.evaluation import evaluate
from voidprune.quality.parity import check_bundle, count_passes
from voidprune.schedule import Schedule, full_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

HELD_OUT = 0.1
"""Share of the samples that nothing is fitted to."""

State = Mapping[str, Tensor]
"""New values of tensors, by their names in the whole checkpoint."""


@dataclass(frozen=True, eq=False)
class Patient:
    """What a method is given. `state` is what the methods before it changed; a training keeps its own state in `training`."""

    checkpoint: Checkpoint
    schedule: Schedule
    samples: Sequence[Sample]
    state: State
    dtype: str
    device: str
    batch_size: int
    track: Track
    training: Path
    overwrite: bool
    distill_settings: DistillSettings
    report: Callable[[Measurement], None]

    def load_whole(self) -> PreTrainedModel:
        """The whole model, with what was changed so far."""
        model = self.load_original()
        load_weights(model, self.state)
        return model

    def load_original(self) -> PreTrainedModel:
        return load_model(self.checkpoint.folder, dtype=self.dtype, device=self.device)


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
            patient.load_original(), patient.schedule, fitting, held_out, batch_size=patient.batch_size, advance=advance
        )
    return Treatment(
        fitted.state, {"held_out": HELD_OUT}, {"branches": [branch.to_document() for branch in fitted.branches]}
    )


def _teach(patient: Patient) -> Treatment:
    accelerator = open_accelerator(on_cpu=patient.device == "cpu")
    settings = replace(patient.distill_settings, held_out=HELD_OUT)
    student = _load_student(patient, accelerator)
    done = distill(
        patient.load_original(),
        student,
        patient.schedule,
        _agree(accelerator, patient.samples),
        settings=settings,
        folder=patient.training,
        overwrite=patient.overwrite,
        track=patient.track,
        report=patient.report,
    )
    return Treatment(_in_whole(done.state, patient), settings.to_document(), _outcome(done))


def _agree(accelerator: Accelerator | None, value: T) -> T:
    """What the first process has, in all of them."""
    values = [value]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(values)  # type: ignore[no-untyped-call]
    return values[0]


def _load_student(patient: Patient, accelerator: Accelerator) -> PreTrainedModel:
    """The slim model, with what was changed so far. It is on disk for as long as it takes to load it."""
    folder = patient.training / "student"
    if accelerator.is_main_process:
        with artifacts.disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir(parents=True)
            write_slim_checkpoint(patient.checkpoint, patient.schedule.union, folder)
    accelerator.wait_for_everyone()
    student = load_model(folder, dtype=patient.dtype, device=patient.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder)
    load_weights(student, _in_slim(patient.state, patient))
    return student


def _outcome(done: Distilled) -> dict[str, Any]:
    """Without what the clock says: a training that was killed and taken up again has the same record."""
    history = [asdict(measurement) for measurement in done.history]
    for measurement in history:
        del measurement["tokens_per_second"]
    return {
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "best_step": done.best_step,
        "stopped": done.stopped,
        "history": history,
    }


METHODS: Mapping[str, Callable[[Patient], Treatment]] = {"linear": _fit, "distill": _teach}
"""What `--method` can be."""


def heal_model(
    checkpoint: Checkpoint,
    schedule: Schedule,
    folder: Path,
    rows: Sequence[Row],
    *,
    methods: Sequence[str] = ("linear",),
    distill_settings: DistillSettings = DistillSettings(),  # noqa: B008  a frozen value
    rounds: Rounds | None = None,
    answering: Answering = Answering(),  # noqa: B008  a frozen value
    dataset: str = "",
    num_samples: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    track: Track = untracked,
    report: Callable[[Measurement], None] = lambda _measurement: None,
) -> Manifest:
    """Heal a model under a schedule, one method after the other, and write a bundle without graphs: `voidprune export` makes them.

    What is not better on held-out samples is not kept; the record in the manifest says what came of the methods up to the last one
    that is. The folder is verified before it is published.

    A training keeps its state in `<folder>.training` until the bundle stands: the same call takes it up again where it was killed;
    another one is refused, or with `overwrite` begins anew.
    What is held out is the same for all methods, whatever `distill_settings` say, and `report` is told what a training measures.

    With `rounds` the schedule is where they begin: each leaves out more, chosen on the model as the rounds before healed it, and
    heals again, by the last method; `distill_settings` are those of a round.

    `dataset` is what the rows are called, and `num_samples` how many of them were asked for: both for the record.

    Started by the launcher of accelerate, all processes train, and the first does all else: the whole of a fit. Raises
    every VoidpruneError of the way.
    """
    artifacts.check_output_folder(folder, overwrite=overwrite, marker=manifests.FILE)
    schedule.check_model(checkpoint.identity, place="the schedule")
    _check_healable(checkpoint, schedule, methods, rounds)
    device = device or default_device()
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    trains = "distill" in methods
    accelerator = None
    if trains or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = _open_processes(device, dtype, distill_settings if trains else None)
        device = str(accelerator.device)
        if not accelerator.is_main_process:
            track = untracked
            if not trains:  # there is nothing to share
                accelerator.wait_for_everyone()
                return manifests.read_manifest(folder)
    samples = prepare_samples(checkpoint, rows, answering, dtype=dtype, device=device, track=track)
    _, held_out = hold_out(samples, share=HELD_OUT)
    training = folder.with_name(folder.name + ".training")
    patient = Patient(
        checkpoint,
        schedule,
        samples,
        {},
        dtype,
        device,
        answering.batch_size,
        track,
        training,
        overwrite,
        distill_settings,
        report,
    )
    settings: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    states: list[State] = [{}]
    if rounds is None:
        for method in methods:
            patient, settings[method], outcomes[method] = _treat(patient, method)
            states.append(patient.state)
    else:
        for number, budget in enumerate(rounds.budgets, start=1):
            pruned = _prune(patient, budget, training / f"round-{number}", accelerator if trains else None)
            if pruned.schedule.actions_equal(patient.schedule):  # more rounds than layers
                continue
            patient = pruned
            for method in methods[-1:] if outcomes else methods:
                patient, settings[method], outcome = _treat(patient, method)
                done = outcomes.setdefault(method, {"rounds": []})["rounds"]
                done.append({"layers": list(patient.schedule.union), **outcome})
        if not outcomes:
            raise HealingError("the rounds leave nothing out, so there is nothing to heal", hint="keep fewer layers")
        states.append(patient.state)
    if accelerator is not None and not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return manifests.read_manifest(folder)
    found, num_kept = _measure(patient, states, held_out)
    state, kept = states[num_kept], methods if rounds is not None else methods[: num_kept or None]
    record = Healing(
        methods=tuple(kept),
        settings={method: settings[method] for method in kept},
        outcomes={method: outcomes[method] for method in kept},
        samples=fingerprint_samples(samples),
        prompts=tuple(sorted({prompt_hash(sample.prompt) for sample in samples})),
        held_out=found,
        origin={
            name: value
            for name, value in {
                "dataset": dataset,
                "num_samples": num_samples,
                "responses": answering.responses,
                "max_new_tokens": answering.max_new_tokens,
                "max_length": answering.max_length,
                "dtype": dtype,
                "rounds": None if rounds is None else rounds.num_rounds,
            }.items()
            if value
        },
    )

    def verify(stage: Path) -> Parity:
        """The folder gives what the whole model gives with the same weights changed, in the dtype of the folder."""
        with track("verifying", count_passes(stage), "runs") as advance:
            source = load_model(checkpoint.folder, dtype=precision_name(checkpoint.dtype), device=device)
            load_weights(source, state)
            return check_bundle(stage, source=source, schedule=patient.schedule, on_pass=lambda: advance(1))

    manifest = export_bundle(
        checkpoint,
        patient.schedule,
        folder,
        verify=verify,
        formats=("hf",),
        overwrite=overwrite,
        healed=Healed({name: tensor.float().numpy() for name, tensor in _in_slim(state, patient).items()}, record),
    )
    shutil.rmtree(training, ignore_errors=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return manifest


def _treat(patient: Patient, method: str) -> tuple[Patient, Mapping[str, Any], Mapping[str, Any]]:
    """The patient afterwards, the settings, and what came of it. The fit always begins with the weights of the source."""
    if method == "linear":
        patient = replace(patient, state={})
    treatment = METHODS[method](patient)
    stored = {name: _rounded(tensor, patient.checkpoint) for name, tensor in treatment.state.items()}
    return replace(patient, state={**patient.state, **stored}), treatment.settings, treatment.outcome


def _prune(patient: Patient, budget: Budget, training: Path, accelerator: Accelerator | None) -> Patient:
    """The patient under a schedule that leaves out more, chosen by what raises the loss of the healed model least."""
    fitting, _ = hold_out(patient.samples, share=HELD_OUT)
    schedule = prune_further(
        patient.load_whole(), patient.schedule, fitting, budget, batch_size=patient.batch_size, track=patient.track
    )
    prefill, decode = _agree(accelerator, (schedule.prefill, schedule.decode))
    origin = {"criterion": "search-loss", **budget.to_origin()}
    schedule = replace(schedule, prefill=prefill, decode=decode, origin=origin)
    return replace(patient, schedule=schedule, training=training)


def _open_processes(device: str, dtype: str, settings: DistillSettings | None) -> Accelerator:
    """Raise HealingError or MissingExtraError where a training could not begin, before anything was done for it.

    `settings` are None where nothing is trained.
    """
    if settings is not None and dtype == "fp16":
        raise HealingError("nothing is trained in fp16: gradients vanish", hint="add --dtype fp32 or bf16")
    if settings is not None and settings.parameters is Parameters.LORA:
        require_peft()
    accelerator = open_accelerator(on_cpu=device == "cpu")
    index = torch.device(device).index
    if index not in (None, accelerator.device.index or 0):
        raise HealingError(
            f"a training runs on {accelerator.device}, not on {device}", hint=f"set CUDA_VISIBLE_DEVICES={index}"
        )
    return accelerator


def _check_healable(checkpoint: Checkpoint, schedule: Schedule, methods: Sequence[str], rounds: Rounds | None) -> None:
    if rounds is not None:
        rounds.budget.check_layers(schedule.num_layers)
    elif schedule.is_full:
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
    if len(set(methods)) != len(methods) or "linear" in methods[1:]:
        raise HealingError(
            f"the methods {', '.join(methods)} do not follow each other", hint="give each once, and linear first"
        )
    if "linear" in methods:
        check_foldable(checkpoint)


def _in_whole(state: State, patient: Patient) -> State:
    """Tensors of the slim checkpoint, by their names in the whole one."""
    names, kept = patient.checkpoint.architecture.spec.tensors, patient.schedule.union
    places = ((name, names.layer_of(name)) for name in state)
    return {name if at is None else names.layer(kept[at[0]], at[1]): state[name] for name, at in places}


def _in_slim(state: State, patient: Patient) -> State:
    """The reverse. Layers that the slim checkpoint does not have are left out."""
    names, kept = patient.checkpoint.architecture.spec.tensors, patient.schedule.union
    places = ((name, names.layer_of(name)) for name in state)
    return {
        name if at is None else names.layer(kept.index(at[0]), at[1]): state[name]
        for name, at in places
        if at is None or at[0] in kept
    }


def _rounded(tensor: Tensor, checkpoint: Checkpoint) -> Tensor:
    """As the checkpoint will hold it, so that what is measured is what is written."""
    return tensor.cpu().to(getattr(torch, DTYPES[precision_name(checkpoint.dtype)]))


def _measure(patient: Patient, states: Sequence[State], held_out: Sequence[Sample]) -> tuple[HeldOutLoss, int]:
    """The losses on held-out samples, and which state is best there, the first of equals. Each state changes more than the last."""
    questions = [replace(sample, answer=None, choices=()) for sample in held_out]

    def loss(model: PreTrainedModel, schedule: Schedule) -> float:
        with scheduled(model, schedule) as running:
            found = evaluate(
                running, questions, decode_text=str, end_tokens=(), batch_size=patient.batch_size, on_progress=advance
            ).loss
        assert found is not None
        return found

    losses = []
    with patient.track("measuring", (1 + len(states)) * len(questions), "samples") as advance:
        model = patient.load_original()
        whole = loss(model, full_schedule(patient.schedule.model, boundary=patient.schedule.boundary))
        for state in states:
            load_weights(model, state)
            losses.append(loss(model, patient.schedule))
    num_tokens = sum(len(sample.response or ()) for sample in questions)
    return HeldOutLoss(len(questions), num_tokens, whole, losses[0], min(losses)), losses.index(min(losses))
