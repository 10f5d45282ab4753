"""The same samples under many schedules: what a search needs, with nothing computed twice.

Prompt and response go through the stock model in one teacher-forced pass. The states that enter each layer under a base schedule
are kept; another schedule is run from the first layer on that it changes. Layers that count for no token are not run at all.
Meaning comes from `reference.scheduled`; this module only leaves out what cannot change the result.

Shapes: B rows, T tokens, D hidden size, V vocabulary, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.errors import DatasetError
from voidprune.execution.reference import decode_mask, decoder_layers, scheduled
from voidprune.models.families import find_family
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Schedule

GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class Likelihoods:
    """Results per sample, [N]: `nll` in nats summed over the response, its `num_tokens`, and whether the response is `greedy`:
    whether every token of it is the most likely one, so that greedy decoding from the prompt would give exactly this response.
    """

    nll: np.ndarray[Any, np.dtype[np.float64]]
    num_tokens: np.ndarray[Any, np.dtype[np.int64]]
    greedy: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class _Batch:
    """Rows of similar length, padded on the right. `states[l]` enters layer l under the base schedule, [B, T, D]."""

    indices: list[int]
    input_ids_BT: Tensor
    mask_BT: Tensor
    states: dict[int, Tensor]


class Rescorer:
    """Samples with responses, under one base schedule and any number of others that start like it.

    `max_cache_bytes` bounds the states that are kept: if those of every layer do not fit, every second, third ... is.
    Raises DatasetError where a sample has no response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        base: Schedule,
        *,
        batch_size: int = 16,
        max_cache_bytes: int = 4 * GIBIBYTE,
    ) -> None:
        for sample in samples:
            if not sample.response:
                raise DatasetError(f"{sample.place} has no response to score", hint="add one, or let the model answer")
        self.model = model
        self.samples = tuple(samples)
        self._layers = decoder_layers(model, find_family(model.config.to_dict()).modules)
        order = sorted(range(len(samples)), key=lambda index: (len(_row(samples[index])), index))
        self._batches = [self._pad(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
        state_bytes = sum(batch.input_ids_BT.numel() for batch in self._batches) * _bytes_per_token(model)
        self._stride = -(-len(self._layers) * state_bytes // max_cache_bytes) or 1
        self._in_tuple = self._returns_tuples()
        self._base: Schedule | None = None
        self._base_likelihoods = self.rebase(base)

    @property
    def base(self) -> Schedule:
        assert self._base is not None
        return self._base

    def rebase(self, schedule: Schedule) -> Likelihoods:
        """Make a schedule the one that others are compared to; states that it shares with the last one are kept."""
        start = 0 if self._base is None else first_difference(self._base, schedule)
        if start < len(self._layers):
            self._base = None  # until all states are those of the new one: a run that broke off leaves some of each
            self._base_likelihoods = self._run(schedule, start, keep_states=True)
        self._base = schedule
        return self._base_likelihoods

    def measure(self, schedule: Schedule) -> Likelihoods:
        """The samples under a schedule with the boundary of the base."""
        start = first_difference(self.base, schedule)
        return self._base_likelihoods if start == len(self._layers) else self._run(schedule, start, keep_states=False)

    def _run(self, schedule: Schedule, start: int, *, keep_states: bool) -> Likelihoods:
        nll = np.zeros(len(self.samples))
        greedy = np.zeros(len(self.samples), dtype=bool)
        idle = {layer for layer in range(schedule.num_layers) if not any(_effect(schedule, layer))}
        with scheduled(self.model, schedule) as runner:
            for batch in self._batches:
                begin = max((layer for layer in batch.states if layer <= start), default=0)
                rows = [self.samples[index] for index in batch.indices]
                width = batch.input_ids_BT.shape[1]
                flags = [decode_mask(len(row.prompt), width, schedule.boundary) for row in rows]
                with ExitStack() as hooks:
                    for layer in idle | set(range(begin)):
                        hooks.enter_context(_bypassed(self._layers[layer], in_tuple=self._in_tuple))
                    if begin:
                        hooks.enter_context(_entering(self._layers[begin], batch.states[begin]))
                    if keep_states:
                        for layer in range(max(start, 1), schedule.num_layers):
                            if layer % self._stride == 0:
                                hooks.enter_context(_reading(self._layers[layer], batch.states, layer))
                    logits_BTV = runner.forward(
                        batch.input_ids_BT, is_decode_BT=torch.tensor(flags), attention_mask_BS=batch.mask_BT
                    )
                for index, row, logits_TV in zip(batch.indices, rows, logits_BTV, strict=True):
                    nll[index], greedy[index] = _judge(logits_TV, row)
        num_tokens = np.array([len(sample.response or ()) for sample in self.samples])
        return Likelihoods(nll, num_tokens, greedy)

    def _returns_tuples(self) -> bool:
        """Whether decoder layers return (states,), as in places they do in transformers 4."""
        seen: list[bool] = []

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))

        handle = self._layers[0].register_forward_hook(look)
        try:
            with torch.inference_mode():
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    def _pad(self, indices: list[int]) -> _Batch:
        rows = [_row(self.samples[index]) for index in indices]
        width = max(map(len, rows))
        return _Batch(
            indices=indices,
            input_ids_BT=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
            mask_BT=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            states={},
        )


def first_difference(one: Schedule, other: Schedule) -> int:
    """The first layer that adds something else to the residual stream; the number of layers where there is none.

    Whether K/V are written does not count: nothing that counts attends to those that are not.
    """
    assert one.boundary is other.boundary, "schedules of one search share their boundary"
    differing = (layer for layer in range(one.num_layers) if _effect(one, layer) != _effect(other, layer))
    return next(differing, one.num_layers)


def _effect(schedule: Schedule, layer: int) -> tuple[bool, bool, bool, bool]:
    prefill, decode = schedule.prefill[layer], schedule.decode[layer]
    return prefill.attends, prefill.runs_mlp, decode.attends, decode.runs_mlp


def _row(sample: Sample) -> tuple[int, ...]:
    return (*sample.prompt, *(sample.response or ())[:-1])


def _judge(logits_TV: Tensor, sample: Sample) -> tuple[float, bool]:
    response = sample.response or ()
    predicted_RV = logits_TV[len(sample.prompt) - 1 : len(sample.prompt) - 1 + len(response)].float()
    targets_R = torch.tensor(response, device=predicted_RV.device)
    log_likelihoods_R = predicted_RV.log_softmax(-1).gather(-1, targets_R.unsqueeze(-1)).squeeze(-1)
    return -float(log_likelihoods_R.double().sum()), bool((predicted_RV.argmax(-1) == targets_R).all())


def _bytes_per_token(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(config.hidden_size) * model.dtype.itemsize


@contextmanager
def _bypassed(layer: nn.Module, *, in_tuple: bool) -> Iterator[None]:
    """The layer hands its input on, and nothing in it is computed."""

    def hand_on(hidden_states_BTD: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states_BTD,) if in_tuple else hidden_states_BTD

    layer.forward = hand_on  # an attribute of the instance hides the method of the class
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def _entering(layer: nn.Module, states_BTD: Tensor) -> Iterator[None]:
    """The layer gets these states in place of what comes from below."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (states_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states_BTD}

    with _hooked(layer, replace):
        yield


@contextmanager
def _reading(layer: nn.Module, states: dict[int, Tensor], index: int) -> Iterator[None]:
    """What enters the layer is kept in `states[index]`."""

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[index] = args[0] if args else kwargs["hidden_states"]

    with _hooked(layer, keep):
        yield


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
