"""A slim model learns from the whole one: distillation under a schedule, each token in its phase.

The teacher is the whole stock model. The student is the model of the layers that are left, run by the reference semantics in one
teacher-forced pass (`execution.reference`): prompt tokens run the prefill actions, response tokens the decode actions, and
gradients follow what counted. Devices, processes and their gradients are the business of accelerate; started by its launcher, every
process holds both models and sees its share of each batch.

What comes back is never worse on held-out samples than what went in: the input is the first candidate.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from voidprune.errors import HealingError, MissingExtraError
from voidprune.healing.adapters import Parameters, Trainable
from voidprune.healing.lesson import Lesson
from voidprune.healing.losses import DistillLoss
from voidprune.healing.training_data import BatchOrder, hold_out, prompt_hash, sample_length
from voidprune.healing.training_state import (
    Measurement,
    Progress,
    copy_weights,
    read_state,
    restore_optimizer,
    write_state,
)
from voidprune.profiling.calibration import Sample, fingerprint_samples, require_responses
from voidprune.schedule import Schedule, full_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

Track = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], None]]]
"""`with track(what, total, unit) as advance: advance(n)`."""

LEARNING_RATES = {Parameters.LORA: 0.8, Parameters.FULL: 0.2}
"""Peak learning rate times hidden size."""


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained. Raises HealingError where a value makes no sense.

    - `parameters`: "lora" (`rank`, `alpha`, all linear maps of the layers, merged at the end) or "full" (all weights of the
      layers, in float32 while they are trained; with `embeddings` those and the head, too).
    - `learning_rate`: the peak; by default a number over the hidden size, LEARNING_RATES, because the best step of Adam shrinks
      with the width (arXiv 2203.03466). It rises over the share `warmup` of `steps`, then falls along a cosine to zero.
    - `batch_size`: samples a step, over all processes. They go through the models in passes of at most `max_pass_tokens`, padding
      counted: gradients add up over as many passes as that takes.
    - Every `evaluate_every` steps, and at the end, the loss of the held-out samples (a share `held_out` of all) is measured and the
      state is written. Training ends early once `patience` measurements in a row were no better than the best one, or after
      `max_minutes` of training; the learning rate follows the steps, so whoever limits minutes limits `steps` to what they hold.
    - `precision`: "fp32", or "bf16" for autocast. `checkpointing` saves memory, not time: layers run again for their gradients.
    - `phase_blind`: a control. The student is trained as if both phases ran all of its layers whole, and measured under its
      schedule.
    """

    parameters: Parameters = Parameters.FULL
    rank: int = 32
    alpha: int = 32
    embeddings: bool = False
    learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_gradient: float = 1.0
    steps: int = 1000
    batch_size: int = 32
    max_pass_tokens: int = 8192
    evaluate_every: int = 100
    patience: int = 5
    held_out: float = 0.05
    loss: DistillLoss = field(default_factory=DistillLoss)
    precision: str = "fp32"
    checkpointing: bool = False
    phase_blind: bool = False
    max_minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", Parameters(self.parameters))
        for name in ("rank", "alpha", "steps", "batch_size", "max_pass_tokens", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise HealingError(f"{name} is {getattr(self, name)}", hint="give a number from 1 up")
        for name in ("learning_rate", "max_gradient", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise HealingError(f"{name} is {value:g}", hint="give a number above 0")
        if not 0 <= self.warmup < 1 or not 0 < self.held_out < 1 or not self.weight_decay >= 0:
            raise HealingError(
                f"warm-up {self.warmup:g}, held-out share {self.held_out:g} or weight decay {self.weight_decay:g} is out of range",
                hint="give shares from 0 to 1, and a weight decay from 0 up",
            )
        if self.precision not in ("fp32", "bf16"):
            raise HealingError(f"training in {self.precision} is not offered", hint="use fp32 or bf16")

    def learning_rate_at(self, step: int, *, hidden_size: int) -> float:
        """The learning rate of a step (0-based)."""
        peak = self.learning_rate or LEARNING_RATES[self.parameters] / hidden_size
        warmup_steps = round(self.warmup * self.steps)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (self.steps - warmup_steps)))

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


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
    settings: DistillSettings = DistillSettings(),
    folder: Path,
    track: Track | None = None,
    report: Callable[[Measurement], None] = lambda _measurement: None,
) -> Distilled:
    """Train `student`, the slim model of the layers that `schedule` (of the teacher) keeps, on samples that have responses.

    The state of the training is kept in `folder`, and taken up again there: on a CPU, a run that was killed ends in the same bits
    as one that was not. The folder is the caller's to remove. `report` is told every measurement, in the main process only. The
    student is used up: what counts is what is returned, in every process the same.

    Raises HealingError, DatasetError where a sample has no response, MissingExtraError, ArtifactError where the folder holds the
    state of another run, OutputError.
    """
    require_responses(samples)
    training, held_out = hold_out(samples, share=settings.held_out)
    slim_schedule = schedule.on_slim_model(replace(schedule.model, num_layers=len(schedule.union)))
    accelerator = _open_accelerator(student)
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
        max_tokens=settings.max_pass_tokens,
        precision=settings.precision,
    ) as lesson:
        taught = (
            full_schedule(slim_schedule.model, boundary=schedule.boundary) if settings.phase_blind else slim_schedule
        )
        training_run = _Training(
            lesson, trainable, settings, (taught, slim_schedule), training, held_out, folder, report
        )
        with _checkpointed(student) if settings.checkpointing else nullcontext():
            progress, best = training_run.run(key, track or _untracked)
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
        stopped=str(training_run.reason_to_stop(progress)),
        seconds=progress.seconds,
        trained=tuple(prompt_hash(sample.prompt) for sample in training),
        held_out=tuple(prompt_hash(sample.prompt) for sample in held_out),
    )


class _Training:
    """The steps, and the looks at held-out samples between them. `schedules`: what is trained, and what is measured."""

    def __init__(
        self,
        lesson: Lesson,
        trainable: Trainable,
        settings: DistillSettings,
        schedules: tuple[Schedule, Schedule],
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        folder: Path,
        report: Callable[[Measurement], None],
    ) -> None:
        self.lesson, self.trainable, self.settings = lesson, trainable, settings
        self.taught, self.judged = schedules
        self.training, self.held_out, self.folder, self.report = training, held_out, folder, report
        self.order = BatchOrder(tuple(map(sample_length, training)), settings.batch_size, settings.seed)
        self.parameters = trainable.parameters()
        matrices = [parameter for parameter in self.parameters.values() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters.values() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )

    def run(self, key: Mapping[str, Any], track: Track) -> tuple[Progress, Mapping[str, Tensor]]:
        """(how far it came, the best weights), from where the folder says."""
        self.clock = time.monotonic()
        state = read_state(self.folder, key=key)
        if state is None:
            progress = Progress(json.loads(json.dumps(key)))
            best = self._look(progress, {}, training_loss=None)
        else:
            self.trainable.load(state.weights)
            restore_optimizer(self.optimizer, self.parameters, state)
            progress, best = state.progress, state.best
        steps = self.settings.steps
        with track("distilling", self.order.num_tokens(range(progress.step, steps)), "tokens") as advance:
            while self.reason_to_stop(progress) is None:
                next_look = min(
                    steps, (progress.step // self.settings.evaluate_every + 1) * self.settings.evaluate_every
                )
                losses = []
                with self.lesson.student_under(self.taught):
                    while progress.step < next_look and not self._time_is_up(progress):
                        losses.append(self._step(progress.step))
                        advance(self.order.num_tokens(range(progress.step, progress.step + 1)))
                        progress.step += 1
                if losses:
                    best = self._look(progress, best, training_loss=self.lesson.add_up(torch.stack(losses).mean()))
        return progress, best

    def reason_to_stop(self, progress: Progress) -> str | None:
        """ "steps", "patience" or "time"; None to go on."""
        if progress.step >= self.settings.steps:
            return "steps"
        if sum(look.step > progress.best.step for look in progress.history) >= self.settings.patience:
            return "patience"
        return "time" if self._time_is_up(progress) else None

    def _time_is_up(self, progress: Progress) -> bool:
        """The same answer in every process."""
        if self.settings.max_minutes is None:
            return False
        seconds = progress.seconds + time.monotonic() - self.clock
        return self.lesson.add_up(torch.tensor(float(seconds > 60 * self.settings.max_minutes))) > 0

    def _step(self, step: int) -> Tensor:
        """One update. The mean loss of a token of this process's share, counted so that the processes' add up to that of all."""
        samples = [self.training[index] for index in self.order.indices(step)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(step, hidden_size=self.lesson.hidden_size)
        loss = self.lesson.accumulate_gradients(samples)
        self.lesson.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _look(
        self, progress: Progress, best: Mapping[str, Tensor], *, training_loss: float | None
    ) -> Mapping[str, Tensor]:
        """Measure, write the state, and return the best weights so far."""
        held_out_loss = self.lesson.measure(self.held_out, self.judged)
        if not math.isfinite(held_out_loss) or not math.isfinite(training_loss or 0.0):
            raise HealingError(
                f"the loss is not a number any more after {progress.step} steps",
                hint="train with a lower learning rate",
            )
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        progress.seconds += seconds
        rate = None
        if progress.history:
            rate = self.order.num_tokens(range(progress.history[-1].step, progress.step)) / seconds
        progress.history.append(Measurement(progress.step, held_out_loss, training_loss, rate))
        if progress.best.step == progress.step:
            best = copy_weights(self.parameters)
        if self.lesson.accelerator.is_main_process:
            write_state(self.folder, progress, self.parameters, self.optimizer, best)
            self.report(progress.history[-1])
        return best


def _open_accelerator(student: PreTrainedModel) -> Accelerator:
    """Devices and processes, as accelerate's launcher says."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise MissingExtraError("accelerate is not installed", hint="pip install 'voidprune[heal]'") from error
    accelerator = Accelerator(cpu=student.device.type == "cpu", mixed_precision="no")
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise HealingError(
            f"accelerate was started for {accelerator.distributed_type.value}; every process has to hold the whole student",
            hint="start it with accelerate launch --multi_gpu, or without a launcher",
        )
    return accelerator


@contextmanager
def _checkpointed(student: PreTrainedModel) -> Iterator[None]:
    """Let the layers forget what they computed and run again for their gradients. Raises HealingError where they cannot.

    transformers asks the layers for training mode before it does so. Only they are told; what is inside stays in evaluation mode,
    so that nothing is dropped out.
    """
    try:
        # transformers 5.23 calls by another name what 4.57 and others know by this one.
        if hasattr(student, "activation_checkpointing_enable"):
            student.activation_checkpointing_enable({"use_reentrant": False})
        else:
            student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise HealingError(
            f"transformers cannot checkpoint the layers of {type(student).__name__}", hint="train without checkpointing"
        ) from error
    layers = [module for module in student.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def _weights_hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return "sha256:" + digest.hexdigest()


@contextmanager
def _untracked(_what: str, _total: int | None, _unit: str) -> Iterator[Callable[[int], None]]:
    yield lambda _amount: None
