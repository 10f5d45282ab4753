"""Steps of a training, and looks at held-out samples between them; it goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from voidprune.errors import HealingError
from voidprune.execution.reference import decoder_layers
from voidprune.healing.adapters import Trainable
from voidprune.healing.lesson import Lesson
from voidprune.healing.settings import DistillSettings
from voidprune.healing.training_data import BatchOrder, sample_length
from voidprune.healing.training_state import (
    Measurement,
    Progress,
    copy_weights,
    read_state,
    restore_optimizer,
    write_state,
)
from voidprune.models.families import find_family
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Schedule

Track = Callable[[str, int | None, str], AbstractContextManager[Callable[[int], None]]]
"""`with track(what, total, unit) as advance: advance(n)`."""


class Training:
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

    def run(
        self, key: Mapping[str, Any], track: Track, *, overwrite: bool
    ) -> tuple[Progress, Mapping[str, Tensor], str]:
        """(how far it came, the best weights, why it ended there), from where the folder says: see `read_state`."""
        self.clock = time.monotonic()
        state = read_state(self.folder, key=key, overwrite=overwrite)
        if state is None:
            progress = Progress(json.loads(json.dumps(key)))
            best = self._look(progress, {}, training_loss=None)
        else:
            self.trainable.load(state.weights)
            restore_optimizer(self.optimizer, self.parameters, state)
            progress, best = state.progress, state.best
        steps = self.settings.steps
        with track("distilling", self.order.num_tokens(range(progress.step, steps)), "tokens") as advance:
            while (stopped := self._reason_to_stop(progress)) is None:
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
        return progress, best, stopped

    def _reason_to_stop(self, progress: Progress) -> str | None:
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


@contextmanager
def checkpointed(student: PreTrainedModel) -> Iterator[None]:
    """Let the layers forget what they computed and run again for their gradients. Raises HealingError where they cannot.

    transformers asks a layer for training mode before it does so. Only the layers are told; what is inside of them stays in
    evaluation mode, so that nothing is dropped out.
    """
    layers = decoder_layers(student, find_family(student.config.to_dict()).modules)
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
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        if hasattr(student, "activation_checkpointing_disable"):
            student.activation_checkpointing_disable()  # type: ignore[no-untyped-call]
        else:
            student.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
