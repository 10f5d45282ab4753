"""A model over a calibration set becomes a profile. **Add a measurement here.**

The model is never changed: hooks read the residual stream before and after each decoder layer. Responses are generated first,
then prompt and response go through the model in one teacher-forced pass; for a dense model that is the same computation as
prefill followed by cached decode, and it leaves one path to trace. Rows of a batch are padded on the right, where a causal
model cannot see it, and padding is never counted.

Shapes: L layers, B rows, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from voidprune.models.checkpoint import Checkpoint
from voidprune.models.families import find_family
from voidprune.models.pretrained import generate_greedily
from voidprune.models.sizes import measure_sizes
from voidprune.profiling.calibration import Sample, fingerprint_samples
from voidprune.profiling.profile import Calibration, LacSettings, LayerStatistics, Profile, empty_statistics
from voidprune.schedule import Phase

OnProgress = Callable[[int, int], None]
"""Called with the number of samples and of tokens that were finished since the last call."""


def lac_activity(norms: Tensor, alpha: float) -> Tensor:
    """Which layers LAC calls active, bool [L, ...], from the norms of the residual stream, [L + 1, ...].

    `norms[0]` is the L2 norm of the embedding, `norms[l + 1]` that of the stream after layer l. With d[l] the signed change at
    layer l, a layer is active where d[l] >= alpha * (max - min of the earlier d); layers 0 and 1 have no range yet, so there
    the threshold is 0. A void does not stop anything: later changes are measured on the dense stream all the same. All in the
    dtype of `norms`. Source: arXiv 2505.14467, github manishemirani/void_in_language_models, lac.py.
    """
    changes = norms.diff(dim=0)
    ranges = changes.cummax(dim=0).values - changes.cummin(dim=0).values
    thresholds = torch.cat([torch.zeros_like(ranges[:1]), alpha * ranges[:-1]])
    return changes >= thresholds


@dataclass
class _Trace:
    """What the hooks saw in one pass: norms [L + 1, B, T]; cosine distance and relative change [L, B, T]."""

    norms: list[Tensor]
    cosine_distances: list[Tensor]
    relative_changes: list[Tensor]

    def clear(self) -> None:
        self.norms.clear()
        self.cosine_distances.clear()
        self.relative_changes.clear()


@contextmanager
def _traced(model: PreTrainedModel, *, norm_dtype: torch.dtype) -> Iterator[_Trace]:
    """Read the residual stream around every decoder layer for the duration of the block."""
    layers: Sequence[nn.Module] = operator.attrgetter(find_family(model.config.to_dict()).modules.layers)(model)
    trace = _Trace([], [], [])

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output  # transformers 4 returns a tuple in places
        if not trace.norms:
            trace.norms.append(torch.linalg.vector_norm(before, dim=-1, dtype=norm_dtype))
        trace.norms.append(torch.linalg.vector_norm(after, dim=-1, dtype=norm_dtype))
        before, after = before.float(), after.float()
        trace.cosine_distances.append(1 - torch.cosine_similarity(before, after, dim=-1))
        moved = torch.linalg.vector_norm(after - before, dim=-1)
        trace.relative_changes.append(moved / torch.linalg.vector_norm(before, dim=-1).clamp(min=1e-12))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def generate_responses(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> list[Sample]:
    """The samples with greedy responses of the model, each up to and including its end token."""
    finished: dict[int, Sample] = {}

    def advance(input_ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache) -> Tensor:
        position_ids_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits_B1V: Tensor = model(
                input_ids=input_ids_BT.to(model.device),
                attention_mask=mask_BS.to(model.device),
                position_ids=position_ids_BS[:, -input_ids_BT.shape[1] :].to(model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits_B1V

    for batch in _batches(samples, batch_size):
        prompts = [samples[index].prompt for index in batch]
        responses = generate_greedily(advance, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens)
        for index, response in zip(batch, responses, strict=True):
            finished[index] = replace(samples[index], response=tuple(response))
        if on_progress is not None:
            on_progress(len(batch), sum(len(finished[index].response or ()) for index in batch))
    return [finished[index] for index in range(len(samples))]


def trace_model(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    responses: str,
    max_new_tokens: int = 0,
    lac: LacSettings = LacSettings(),  # noqa: B008  a frozen value
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> Profile:
    """Measure every layer over samples that have responses; `checkpoint` is where `model` was loaded from.

    Prompt tokens count for prefill. Response tokens count for decode, except the last: it ends the response and is never fed
    back. `responses` ("generate" or "dataset") and `max_new_tokens` are written into the profile.
    """
    identity = checkpoint.identity
    per_sample: dict[int, dict[Phase, LayerStatistics]] = {}
    norm_dtype = torch.float32 if lac.arithmetic == "float32" else model.dtype
    with _traced(model, norm_dtype=norm_dtype) as trace:
        for batch in _batches(samples, batch_size):
            rows = [(*samples[index].prompt, *(samples[index].response or ())[:-1]) for index in batch]
            width = max(map(len, rows))
            trace.clear()
            with torch.inference_mode():
                model.base_model(  # no head: nothing here reads logits
                    input_ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device),
                    attention_mask=torch.tensor(
                        [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device
                    ),
                    use_cache=False,
                )
            active_LBT = lac_activity(torch.stack(trace.norms), lac.alpha)
            measured = (active_LBT, torch.stack(trace.cosine_distances), torch.stack(trace.relative_changes))
            for position, (index, row) in enumerate(zip(batch, rows, strict=True)):
                boundary = len(samples[index].prompt)
                per_sample[index] = {
                    Phase.PREFILL: _sum_tokens(measured, position, slice(0, boundary)),
                    Phase.DECODE: _sum_tokens(measured, position, slice(boundary, len(row))),
                }
            if on_progress is not None:
                on_progress(len(batch), sum(map(len, rows)))
    groups: dict[str, dict[Phase, LayerStatistics]] = {}
    for index, sample in enumerate(samples):
        group = groups.setdefault(sample.group, {phase: empty_statistics(identity.num_layers) for phase in Phase})
        for phase in Phase:
            group[phase] += per_sample[index][phase]
    return Profile(
        model=identity,
        sizes=measure_sizes(checkpoint),
        lac=lac,
        calibration=Calibration(
            num_samples=len(samples),
            responses=responses,
            max_new_tokens=max_new_tokens,
            fingerprints=(fingerprint_samples(samples),),
        ),
        groups=groups,
    )


def _sum_tokens(measured: tuple[Tensor, Tensor, Tensor], row: int, tokens: slice) -> LayerStatistics:
    active, distances, changes = (values_LBT[:, row, tokens].double().sum(-1).tolist() for values_LBT in measured)
    return LayerStatistics(
        num_tokens=tokens.stop - tokens.start,
        active=tuple(int(count) for count in active),
        cosine_distance=tuple(distances),
        relative_change=tuple(changes),
    )


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of samples of similar length together, so that little is padded."""
    order = sorted(range(len(samples)), key=lambda index: (len(samples[index].prompt), index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
