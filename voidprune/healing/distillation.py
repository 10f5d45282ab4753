"""A slim model learns from the whole one: distillation under a schedule, each token in its phase.

The teacher is the whole stock model. The student is the model of the layers that are left, run by the reference semantics in one
teacher-forced pass (`execution.reference`): prompt tokens run the prefill actions, response tokens the decode actions, and
gradients follow what counted. Devices, processes and their gradients are the business of accelerate; started by its launcher, every
process holds both models and sees its share of each batch.

What comes back is never worse on held-out samples than what went in: the input is the first candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from voidprune.errors import HealingError, MissingExtraError
from voidprune.healing.adapters import Trainable
from voidprune.healing.lesson import Lesson
from voidprune.healing.settings import DistillSettings
from voidprune.healing.training import Track, Training, checkpointed
from voidprune.healing.training_data import hold_out, prompt_hash
from voidprune.healing.training_state import Measurement
from voidprune.profiling.calibration import Sample, fingerprint_samples, require_responses
from voidprune.schedule import Schedule, full_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

WAIT = timedelta(hours=12)
"""How long a process waits for another one."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """What came of it.

    `state`: the weights that changed, by their names in the slim checkpoint and in the dtype of the student; empty where nothing
    that was tried beats the input on the held-out samples (`improved` is False). `loss_before` and `loss_after` are that measure, a
    token's loss, of the input and of what `state` makes of it, merged. `trained` and `held_out` are the hashes of the prompts.
    """

    state: Mapping[str, Tensor]
    history: tuple[Measurement, ...]
    best_step: int
    loss_before: float
    loss_after: float
    stopped: str
    seconds: float
    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def improved(self) -> bool:
        return bool(self.state)

    def to_document(self) -> dict[str, Any]:
        return {
            "improved": self.improved,
            "best_step": self.best_step,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "history": [asdict(measurement) for measurement in self.history],
            "trained": list(self.trained),
            "held_out": list(self.held_out),
        }


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    schedule: Schedule,
    samples: Sequence[Sample],
    *,
    settings: DistillSettings = DistillSettings(),  # noqa: B008  a frozen value
    folder: Path,
    overwrite: bool = False,
    track: Track | None = None,
    report: Callable[[Measurement], None] = lambda _measurement: None,
) -> Distilled:
    """Train `student`, the slim model of the layers that `schedule` (of the teacher) keeps, on samples that have responses.

    The state of the training is kept in `folder`, and taken up again there: on a CPU, a run that was killed ends in the same bits
    as one that was not. The folder is the caller's to remove. `report` is told every measurement, in the main process only. The
    student is used up: what counts is what is returned, in every process the same.

    Raises HealingError, DatasetError where a sample has no response, MissingExtraError, ArtifactError where the folder holds the
    state of another run (with `overwrite` it is replaced), OutputError.
    """
    require_responses(samples)
    training, held_out = hold_out(samples, share=settings.held_out)
    slim_schedule = schedule.on_slim_model(replace(schedule.model, num_layers=len(schedule.union)))
    accelerator = open_accelerator(on_cpu=student.device.type == "cpu")
    if min(settings.batch_size, len(training), len(held_out)) < accelerator.num_processes:
        raise HealingError(
            f"{accelerator.num_processes} processes do not each get a sample: batches of {settings.batch_size}, "
            f"{len(training)} samples, {len(held_out)} held out",
            hint="start fewer processes, or give more samples",
        )
    key = {
        "settings": {name: value for name, value in settings.to_document().items() if name != "max_minutes"},
        "schedule": slim_schedule.to_document() | {"origin": {}},
        "samples": fingerprint_samples(samples),
        "student": _weights_hash(student),
    }
    trainable = Trainable(
        student,
        parameters=settings.parameters,
        rank=settings.rank,
        alpha=settings.alpha,
        embeddings=settings.embeddings,
        seed=settings.seed,
    )
    whole = full_schedule(schedule.model, boundary=schedule.boundary)
    with Lesson(
        accelerator,
        teacher=(teacher, whole),
        student=student,
        loss=settings.loss,
        max_tokens=settings.pass_tokens(vocab_size=student.get_output_embeddings().weight.shape[0]),  # type: ignore[no-untyped-call]
        precision=settings.precision,
    ) as lesson:
        taught = (
            full_schedule(slim_schedule.model, boundary=schedule.boundary) if settings.phase_blind else slim_schedule
        )
        run = Training(lesson, trainable, settings, (taught, slim_schedule), training, held_out, folder, report)
        with checkpointed(student) if settings.checkpointing else nullcontext():
            progress, best, stopped = run.run(key, track or _untracked, overwrite=overwrite)
        trainable.load(best)
        state = trainable.merge()
        loss_after = lesson.measure(held_out, slim_schedule)
    before = progress.history[0].held_out_loss
    improved = progress.best.step > 0 and loss_after < before
    return Distilled(
        state={name: tensor.cpu().clone() for name, tensor in state.items()} if improved else {},
        history=tuple(progress.history),
        best_step=progress.best.step if improved else 0,
        loss_before=before,
        loss_after=loss_after if improved else before,
        stopped=stopped,
        seconds=progress.seconds,
        trained=tuple(prompt_hash(sample.prompt) for sample in training),
        held_out=tuple(prompt_hash(sample.prompt) for sample in held_out),
    )


def open_accelerator(*, on_cpu: bool) -> Accelerator:
    """Devices and processes, as accelerate's launcher says. Whoever opens another one gets the same processes.

    Raises MissingExtraError, HealingError.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise MissingExtraError("accelerate is not installed", hint="pip install 'voidprune[heal]'") from error
    # The others wait while the first one writes what may be many gigabytes.
    patience = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patience])
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise HealingError(
            f"accelerate was started for {accelerator.distributed_type.value}; every process has to hold the whole student",
            hint="start it with accelerate launch --multi_gpu, or without a launcher",
        )
    return accelerator


def _weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return "sha256:" + digest.hexdigest()


@contextmanager
def _untracked(_what: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], None]]:
    yield lambda _amount: None
