"""One pass of a lesson: the teacher and the student read the same rows, and how far apart they are.

Every process of accelerate holds both models and takes its share of the samples; sums over all processes are the same in each.

Shapes: B rows, T columns, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.execution.reference import AlignedBatch, ScheduledModel, align_responses, scheduled
from voidprune.healing.losses import DistillLoss, Prediction
from voidprune.healing.training_data import cut_passes, sample_length
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples of one pass. Of the last columns, [B, T] each: what a token counts, and the response token that is due there."""

    batch: AlignedBatch
    weights_BT: Tensor
    labels_BT: Tensor
    is_response_BT: Tensor


def make_rows(samples: Sequence[Sample], *, prompt_weight: float) -> Rows:
    """Samples with responses. Without a weight for prompts, the columns are those of the responses alone."""
    responses = [sample.response or () for sample in samples]
    batch = align_responses([sample.prompt for sample in samples], responses)
    width = batch.input_ids_BT.shape[1] if prompt_weight else batch.num_logits
    is_response_BT = torch.zeros(len(samples), width, dtype=torch.bool)
    labels_BT = torch.zeros(len(samples), width, dtype=torch.long)
    first = width - batch.num_logits
    for row, response in enumerate(responses):
        is_response_BT[row, first : first + len(response)] = True
        labels_BT[row, first : first + len(response)] = torch.tensor(response)
    is_prompt_BT = batch.attention_mask_BT[:, -width:].bool() & ~is_response_BT
    return Rows(batch, is_response_BT + prompt_weight * is_prompt_BT, labels_BT, is_response_BT)


class Predictor(nn.Module):
    """A model as one module that accelerate can spread: rows go in, predictions of the tokens that count come out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._running: ScheduledModel | None = None

    @contextmanager
    def under(self, schedule: Schedule) -> Iterator[None]:
        """For the duration of the block."""
        with scheduled(self.model, schedule) as self._running:
            yield

    def forward(self, batch: AlignedBatch, counted_BT: Tensor) -> Prediction:
        """`counted_BT` covers the last columns of the batch."""
        assert self._running is not None
        states: list[Tensor] = []
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        handle = head.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
        try:
            logits_BTV = self._running.differentiable(
                batch.input_ids_BT,
                is_decode_BT=batch.is_decode_BT(self._running.schedule.boundary),
                attention_mask_BS=batch.attention_mask_BT,
                num_logits=counted_BT.shape[1],
            )
        finally:
            handle.remove()
        return Prediction(logits_BTV[counted_BT], states[0][counted_BT])


class Lesson:
    """What is the same for every pass: both models, the loss, the devices. A context: it hooks the teacher."""

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        teacher: tuple[PreTrainedModel, Schedule],
        student: PreTrainedModel,
        loss: DistillLoss,
        max_tokens: int,
        precision: str,
    ) -> None:
        self.accelerator = accelerator
        model, self._teacher_schedule = teacher
        model.to(accelerator.device).requires_grad_(False)  # type: ignore[arg-type]
        self._teacher = Predictor(model)
        self._student = Predictor(student)
        self._spread_student: nn.Module = accelerator.prepare_model(self._student)
        self._loss, self._max_tokens, self._precision = loss, max_tokens, precision
        self._stack = ExitStack()

    def __enter__(self) -> Lesson:
        self._stack.enter_context(self._teacher.under(self._teacher_schedule))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @property
    def hidden_size(self) -> int:
        """Width of the student's residual stream."""
        embedding: nn.Module = self._student.model.get_input_embeddings()  # type: ignore[no-untyped-call]
        return embedding.get_parameter("weight").shape[1]

    def student_under(self, schedule: Schedule) -> AbstractContextManager[None]:
        return self._student.under(schedule)

    def accumulate_gradients(self, samples: Sequence[Sample]) -> Tensor:
        """Add the gradients of the samples' mean loss, over all processes. Returns this process's part of that loss."""
        total = self._total_weight(samples)
        loss = torch.zeros((), device=self.accelerator.device)
        passes = list(self._share(samples))
        for number, rows in enumerate(passes, start=1):
            is_last = number == len(passes)
            # Gradients are averaged over processes, and are to be added.
            with nullcontext() if is_last else self.accelerator.no_sync(self._spread_student):
                part = self._sum_losses(self._spread_student, rows) / total
                self.accelerator.backward(part * self.accelerator.num_processes)
            loss += part.detach()
        return loss

    def measure(self, samples: Sequence[Sample], schedule: Schedule) -> float:
        """The samples' mean loss of a token, of the student as it stands under a schedule."""
        with torch.no_grad(), self.student_under(schedule):
            losses = [self._sum_losses(self._student, rows).double().cpu() for rows in self._share(samples)]
        return self.add_up(torch.stack(losses).sum()) / self._total_weight(samples)

    def add_up(self, value: Tensor) -> float:
        """The sum over all processes."""
        total: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum")
        return float(total)

    def _share(self, samples: Sequence[Sample]) -> Iterator[Rows]:
        """The passes of this process."""
        lengths = [sample_length(sample) for sample in samples]
        ranked = sorted(range(len(samples)), key=lambda index: (lengths[index], index))
        mine = ranked[self.accelerator.process_index :: self.accelerator.num_processes]
        for rows in cut_passes(mine, lengths, max_tokens=self._max_tokens):
            yield make_rows([samples[index] for index in rows], prompt_weight=self._loss.prompt_weight)

    def _total_weight(self, samples: Sequence[Sample]) -> float:
        """What all tokens of the samples count together."""
        prompt_weight = self._loss.prompt_weight
        return sum(len(sample.response or ()) + prompt_weight * (len(sample.prompt) - 1) for sample in samples)

    def _sum_losses(self, student: nn.Module, rows: Rows) -> Tensor:
        """The sum over the tokens of a pass, each as it counts."""
        device = self.accelerator.device
        weights_BT = rows.weights_BT.to(device)
        counted_BT = weights_BT > 0
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            with torch.no_grad():
                wanted = self._teacher(rows.batch, counted_BT)
            found = student(rows.batch, counted_BT)
        losses_N = self._loss.per_token(
            found, wanted, rows.labels_BT.to(device)[counted_BT], rows.is_response_BT.to(device)[counted_BT]
        )
        return (weights_BT[counted_BT] * losses_N).sum()
