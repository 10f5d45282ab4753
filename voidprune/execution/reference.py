"""What a schedule means: the stock transformers model with two hooks a layer. The only place that says so in torch.

For a token t of phase p(t), in layer l with action a = schedule.actions(p(t))[l]:

- the attention output is added to the residual stream where `a.attends`, else nothing is added;
- the MLP output is added where `a.runs_mlp`, else nothing is added;
- keys and values are those of the residual stream that enters the layer, changed by earlier layers or not.

Here every layer computes everything and the hooks leave out what does not count: slow and plain, because every export must
equal it. A layer that counts for all tokens of a pass is not touched, so an all-FULL schedule is bitwise the stock model.
Keys and values are computed even where the schedule writes none; by the K/V contract nothing that counts attends to those.

Shapes: B rows, T tokens of this pass, S tokens with the past, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from voidprune.execution.generation import check_vocabulary
from voidprune.models.architecture import ModulePaths
from voidprune.models.families import find_family
from voidprune.models.pretrained import generate_greedily
from voidprune.schedule import Boundary, Phase, Schedule

LOGIT_VALUES = 2**26
"""Logits that one pass of scoring makes at most, unless a single response needs more: 256 MiB in float32."""


def decoder_layers(model: PreTrainedModel, modules: ModulePaths) -> Sequence[nn.Module]:
    return operator.attrgetter(modules.layers)(model)  # type: ignore[no-any-return]


def decode_mask(num_prompt_tokens: int, num_tokens: int, boundary: Boundary) -> list[bool]:
    """For each token of prompt + response, whether it runs the decode schedule."""
    first = num_prompt_tokens - (1 if boundary is Boundary.DECODE else 0)
    return [token >= first for token in range(num_tokens)]


@dataclass(frozen=True, eq=False)
class AlignedBatch:
    """Prompts with their responses, but for the last token of these, behind which nothing is due.

    Rows are padded on both sides so that all responses begin in the same column: the head then runs on the `num_logits` last
    columns alone, which are those of the longest response. `num_prompt_columns` hold the prompts.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    num_prompt_columns: int
    response_lengths: tuple[int, ...]

    @property
    def num_logits(self) -> int:
        return max(self.response_lengths)

    def is_decode_BT(self, boundary: Boundary) -> Tensor:  # noqa: N802  the shape of what it gives
        """Which tokens run the decode schedule."""
        num_rows, width = self.input_ids_BT.shape
        return torch.tensor(decode_mask(self.num_prompt_columns, width, boundary)).expand(num_rows, -1)


def align_responses(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> AlignedBatch:
    """Teacher-forced rows of one pass, in the order of the prompts."""
    left, right = max(map(len, prompts)), max(map(len, responses))
    rows, masks = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = [*prompt, *response[:-1]]
        before, after = left - len(prompt), right - len(response)
        rows.append([0] * before + tokens + [0] * after)
        masks.append([0] * before + [1] * len(tokens) + [0] * after)
    return AlignedBatch(
        input_ids_BT=torch.tensor(rows),
        attention_mask_BT=torch.tensor(masks),
        num_prompt_columns=left,
        response_lengths=tuple(map(len, responses)),
    )


class ScheduledModel:
    """A stock model under a schedule. Use through `scheduled`, which takes the hooks away again."""

    def __init__(self, model: PreTrainedModel, schedule: Schedule) -> None:
        self.model = model
        self.schedule = schedule
        self._is_decode_BT: Tensor = torch.zeros(0, dtype=torch.bool)

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        is_decode_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        cache: DynamicCache | None = None,
        last_only: bool = False,
        num_logits: int = 0,
    ) -> Tensor:
        """Logits, [B, T, V] (or [B, 1, V] of the last token), of one pass in which every token runs the actions of its phase.

        `attention_mask_BS` is 0 for padding, on either side; positions count its ones. `cache` is read and extended. With
        `num_logits`, the head runs on that many last tokens only. Raises ModelError for a token that the model has not.
        """
        check_vocabulary(input_ids_BT.cpu().numpy(), self.vocab_size)
        with torch.inference_mode():
            return self.differentiable(
                input_ids_BT,
                is_decode_BT=is_decode_BT,
                attention_mask_BS=attention_mask_BS,
                cache=cache,
                last_only=last_only,
                num_logits=num_logits,
            )

    def differentiable(
        self,
        input_ids_BT: Tensor,
        *,
        is_decode_BT: Tensor,
        attention_mask_BS: Tensor | None = None,
        cache: DynamicCache | None = None,
        last_only: bool = False,
        num_logits: int = 0,
    ) -> Tensor:
        """`forward`, with gradients where torch records them. Call `backward` before the next pass: checkpointed layers run again
        in it, and what counts is that of the latest pass."""
        if attention_mask_BS is None:
            past = 0 if cache is None else cache.get_seq_length()
            attention_mask_BS = torch.ones(len(input_ids_BT), past + input_ids_BT.shape[1], dtype=torch.long)
        position_ids_BS = (attention_mask_BS.cumsum(-1) - 1).clamp(min=0)
        device = self.model.device
        self._is_decode_BT = is_decode_BT.to(device)
        logits_BTV: Tensor = self.model(
            input_ids=input_ids_BT.to(device),
            attention_mask=attention_mask_BS.to(device),
            position_ids=position_ids_BS[:, -input_ids_BT.shape[1] :].to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else num_logits,
        ).logits
        return logits_BTV

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy responses, each up to and including its end token: see `models.pretrained.generate_greedily`."""

        def advance(input_ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache) -> Tensor:
            width = input_ids_BT.shape[1]
            is_first = mask_BS.shape[1] == width
            flags = decode_mask(width, width, self.schedule.boundary) if is_first else [True]
            is_decode_BT = torch.tensor(flags).expand_as(input_ids_BT)
            return self.forward(
                input_ids_BT, is_decode_BT=is_decode_BT, attention_mask_BS=mask_BS, cache=cache, last_only=True
            )

        return generate_greedily(advance, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Log-probability, in nats, of each response token, teacher-forced in one pass."""
        scores = []
        for response, logits_TV in zip(responses, self._response_logits(prompts, responses), strict=True):
            targets_T1 = torch.tensor(response, device=logits_TV.device).unsqueeze(-1)
            chosen_T = logits_TV.gather(-1, targets_T1).squeeze(-1).double()
            scores.append((chosen_T - logits_TV.double().logsumexp(-1)).cpu().numpy())
        return scores

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Log-probabilities, in nats, of the whole vocabulary where each response token is due: [T, V] an item, teacher-forced.

        The caller keeps the sum of T small enough for memory.
        """
        return [
            logits_TV.float().log_softmax(-1).cpu().numpy() for logits_TV in self._response_logits(prompts, responses)
        ]

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]

    def _response_logits(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """Logits [T, V] where each response token is due, item by item. Rows run together as far as their logits stay below
        LOGIT_VALUES."""
        longest = max(map(len, responses))
        num_rows = max(1, LOGIT_VALUES // (longest * self.vocab_size))
        for start in range(0, len(prompts), num_rows):
            batch = align_responses(prompts[start : start + num_rows], responses[start : start + num_rows])
            logits_BTV = self.forward(
                batch.input_ids_BT,
                is_decode_BT=batch.is_decode_BT(self.schedule.boundary),
                attention_mask_BS=batch.attention_mask_BT,
                num_logits=batch.num_logits,
            )
            for length, logits_TV in zip(batch.response_lengths, logits_BTV, strict=True):
                yield logits_TV[:length]

    def _counted(self, flags: dict[Phase, bool]) -> Tensor | None:
        """Which tokens of the pass count, [B, T, 1]; None where all do."""
        if all(flags.values()):
            return None
        in_decode, in_prefill = flags[Phase.DECODE], flags[Phase.PREFILL]
        return ((self._is_decode_BT & in_decode) | (~self._is_decode_BT & in_prefill)).unsqueeze(-1)


@contextmanager
def scheduled(model: PreTrainedModel, schedule: Schedule) -> Iterator[ScheduledModel]:
    """Run a stock model under a schedule for the duration of the block."""
    modules = find_family(model.config.to_dict()).modules
    layers = decoder_layers(model, modules)
    assert len(layers) == schedule.num_layers, "the caller checks the schedule against the model"
    running = ScheduledModel(model, schedule)
    handles = []
    for layer, prefill, decode in zip(layers, schedule.prefill, schedule.decode, strict=True):
        attends = {Phase.PREFILL: prefill.attends, Phase.DECODE: decode.attends}
        runs_mlp = {Phase.PREFILL: prefill.runs_mlp, Phase.DECODE: decode.runs_mlp}
        attention, mlp = modules.branches(layer)
        handles.append(attention.register_forward_hook(_leave_out(running, attends)))
        handles.append(mlp.register_forward_hook(_leave_out(running, runs_mlp)))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _leave_out(running: ScheduledModel, flags: dict[Phase, bool]) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that zeroes a sublayer's output for the tokens for which it does not count."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        counted_BT1 = running._counted(flags)
        if counted_BT1 is None:
            return None
        if isinstance(output, tuple):  # attention: (output, weights); a mixture of experts: (output, router scores)
            return (torch.where(counted_BT1, output[0], 0.0), *output[1:])
        return torch.where(counted_BT1, output, 0.0)

    return hook
