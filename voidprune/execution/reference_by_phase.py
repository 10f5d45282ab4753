"""Two stock models under one schedule: prompts run the weights of the one, generated tokens those of the other.

What a bundle means whose graphs read matrices of their own. A prompt of one token is a decode step under the boundary "decode",
as for `session.Conversation`. Shapes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from voidprune.execution.reference import ScheduledModel, decode_mask, scheduled
from voidprune.schedule import Schedule


class PhasedModel(ScheduledModel):
    """Use through `scheduled_by_phase`. A pass is of prompts or of generated tokens, not of both."""

    def __init__(self, prefill: ScheduledModel, decode: ScheduledModel) -> None:
        super().__init__(decode.model, decode.schedule)
        self._prefill = prefill
        self._decode = decode

    def differentiable(self, input_ids_BT: Tensor, *, is_decode_BT: Tensor, **settings: Any) -> Tensor:
        """By the model of the phase: of prefill where any token runs it."""
        running = self._decode if bool(is_decode_BT.all()) else self._prefill
        return running.differentiable(input_ids_BT, is_decode_BT=is_decode_BT, **settings)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        """As `ScheduledModel.generate`, row by row: among longer ones, a prompt of one token would be padded into prefill."""
        generate = super().generate
        return [generate([prompt], max_new_tokens=max_new_tokens, end_tokens=end_tokens)[0] for prompt in prompts]

    def _response_logits(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        for prompt, response in zip(prompts, responses, strict=True):
            cache = DynamicCache()
            flags = [decode_mask(len(prompt), len(prompt), self.schedule.boundary)]
            logits_BTV = [
                self.forward(torch.tensor([prompt]), is_decode_BT=torch.tensor(flags), cache=cache, last_only=True)
            ]
            if len(response) > 1:
                later = torch.tensor([response[:-1]])
                logits_BTV.append(self.forward(later, is_decode_BT=torch.ones_like(later) > 0, cache=cache))
            yield torch.cat(logits_BTV, dim=1)[0]


@contextmanager
def scheduled_by_phase(prefill: PreTrainedModel, decode: PreTrainedModel, schedule: Schedule) -> Iterator[PhasedModel]:
    """Run two models of one architecture under a schedule for the duration of the block."""
    with scheduled(prefill, schedule) as first, scheduled(decode, schedule) as later:
        yield PhasedModel(first, later)
