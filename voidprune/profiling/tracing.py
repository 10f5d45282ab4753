"""A model over a calibration set becomes a profile. **Add a measurement here.**

The model is never changed: hooks read the residual stream before and after each decoder layer, and what its two sublayers add
to it. Responses are generated first, then prompt and response go through the model in one teacher-forced pass; for a dense
model that is the same computation as prefill followed by cached decode, and it leaves one path to trace. Rows of a batch are
padded on the right, where a causal model cannot see it, and padding is never counted.

Tracing is to cost next to nothing beside the pass: in a layer, only lengths and inner products of vectors are taken, while
those are still in the processor's caches; all else is arithmetic on one number a layer and token, and leaves the device once a
batch.

Shapes: L layers, B rows, T tokens, H hidden size, P phases (prefill, decode), K measures of a layer.
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from voidprune.errors import ModelError
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.families import find_family
from voidprune.models.pretrained import generate_greedily
from voidprune.models.sizes import measure_sizes
from voidprune.profiling.blocks import BlockSums, num_traced
from voidprune.profiling.calibration import Sample, fingerprint_samples
from voidprune.profiling.profile import (
    GRID,
    Blocks,
    Calibration,
    LacSettings,
    Profile,
)
from voidprune.schedule import Phase

OnProgress = Callable[[int, int], None]
"""Called with the number of samples and of tokens that were finished since the last call."""

Array = np.ndarray[Any, np.dtype[np.float64]]


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


# What of a layer is measured, with x and y the stream before and after it, a and m what its sublayers add. LENGTHS in order.
CHANGE, ATTENTION, BETWEEN, MLP, AFTER = range(5)  # |y - x|, |a|, |x + a|, |m|, |y|


class _Trace:
    """What the hooks write in one pass, into memory that is made before it: allocating between layers costs more than measuring.

    On a GPU it is the number of kernels that costs, so what can be had from others is not measured again. `lengths_LFBT`: the five
    lengths of each layer in float32. `ends_LBPH`: the stream at the last token of each phase in float32, L + 1 of them, the
    embedding first.
    """

    def __init__(self, *, num_layers: int, norm_dtype: torch.dtype) -> None:
        self.num_layers = num_layers
        self.norm_dtype = norm_dtype
        self.multipliers = [1.0] * num_layers
        self._scratch = self._before = torch.empty(0)

    def begin(self, batch: PaddedBatch, *, hidden_size: int, device: torch.device) -> None:
        """Make room for a pass over `batch`."""
        (rows, width), states = batch.input_ids_BT.shape, self.num_layers + 1
        self.last = (torch.arange(rows).unsqueeze(-1) * width + batch.last_BP).flatten().to(device)
        self.ends_LBPH = torch.empty(states, rows, len(Phase), hidden_size, device=device)
        self.lengths_LFBT = torch.empty(self.num_layers, 5, rows, width, device=device)
        self.embedding_length_BT = torch.empty(rows, width, device=device)
        self._norms_LBT = torch.empty(states, rows, width, device=device, dtype=self.norm_dtype)
        if self._scratch.shape != (rows, width, hidden_size):
            self._scratch, self._before = torch.empty(2, rows, width, hidden_size, device=device)

    @property
    def norms(self) -> Tensor:
        """|x| of the residual stream in LAC's dtype, [L + 1, B, T], the embedding first."""
        if self.norm_dtype is not torch.float32:
            return self._norms_LBT
        return torch.cat([self.embedding_length_BT.unsqueeze(0), self.lengths_LFBT[:, AFTER]])

    def read_stream(self, point: int, states_BTH: Tensor) -> None:
        """The stream before layer `point`; point L is after the last."""
        length_BT = self.lengths_LFBT[point - 1, AFTER] if point else self.embedding_length_BT
        _measure_length(states_BTH, out=length_BT)
        if self.norm_dtype is not torch.float32:
            torch.linalg.vector_norm(states_BTH, dim=-1, dtype=self.norm_dtype, out=self._norms_LBT[point])
        self.ends_LBPH[point] = states_BTH.flatten(0, 1).index_select(0, self.last).view_as(self.ends_LBPH[point])

    def read_attention(self, layer: int, before_BTH: Tensor, branch_BTH: Tensor) -> None:
        _measure_length(branch_BTH, out=self.lengths_LFBT[layer, ATTENTION])
        before = before_BTH if before_BTH.dtype is torch.float32 else self._before.copy_(before_BTH)
        torch.add(before, branch_BTH, alpha=self.multipliers[layer], out=self._scratch)
        _measure_length(self._scratch, out=self.lengths_LFBT[layer, BETWEEN])

    def read_mlp(self, layer: int, branch_BTH: Tensor) -> None:
        _measure_length(branch_BTH, out=self.lengths_LFBT[layer, MLP])

    def read_change(self, layer: int, before_BTH: Tensor, after_BTH: Tensor) -> None:
        """After `read_attention` of the layer, which has widened what was before."""
        before = before_BTH if before_BTH.dtype is torch.float32 else self._before
        torch.sub(after_BTH, before, out=self._scratch)
        _measure_length(self._scratch, out=self.lengths_LFBT[layer, CHANGE])


def _measure_length(vectors_BTH: Tensor, *, out: Tensor) -> None:
    torch.linalg.vector_norm(vectors_BTH, dim=-1, dtype=torch.float32, out=out)


@contextmanager
def _traced(model: PreTrainedModel, *, norm_dtype: torch.dtype) -> Iterator[_Trace]:
    """Read the residual stream around every decoder layer, and its branches, for the duration of the block."""
    modules = find_family(model.config.to_dict()).modules
    layers: nn.ModuleList = operator.attrgetter(modules.layers)(model)
    trace = _Trace(num_layers=len(layers), norm_dtype=norm_dtype)
    before: list[Tensor] = []  # what the layer that is running was given

    def enter(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before[:] = [args[0] if args else kwargs["hidden_states"]]
            if not layer:
                trace.read_stream(0, before[0])

        return hook

    def leave_attention(layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: trace.read_attention(layer, before[0], _first(output))

    def leave_mlp(layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: trace.read_mlp(layer, _first(output))

    def leave(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            after = _first(output)  # transformers 4 returns a tuple in places
            trace.read_stream(layer + 1, after)
            trace.read_change(layer, before.pop(), after)

        return hook

    handles = []
    for number, layer in enumerate(layers):
        if modules.residual_multiplier is not None:
            trace.multipliers[number] = float(getattr(layer, modules.residual_multiplier))
        attention, mlp = getattr(layer, modules.attention_branch), getattr(layer, modules.mlp_branch)
        handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(attention.register_forward_hook(leave_attention(number)))
        handles.append(mlp.register_forward_hook(leave_mlp(number)))
        handles.append(layer.register_forward_hook(leave(number)))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _cosine_distance(one: Tensor, other: Tensor, between: Tensor) -> Tensor:
    """1 - cos of the angle between two vectors, from their lengths and the length of their difference.

    The law of cosines, between^2 = one^2 + other^2 - 2 one other cos, solved for 1 - cos so that nothing large cancels where the
    vectors nearly agree.
    """
    distance = (between**2 - (one - other) ** 2) / (2 * one * other).clamp(min=torch.finfo(one.dtype).tiny)
    return distance.clamp(0, 2)


def _sum_measures(trace: _Trace, counted_PBT: Tensor, *, alpha: float) -> Array:
    """Sums over the counted tokens, [B, P, K * L + L * (L + 1) / 2]: MEASURES layer by layer, then the spans.

    One transfer from the device. Multiples of GRID.
    """
    active_LBT = lac_activity(trace.norms, alpha)
    lengths_LFBT, ends_BPLH = trace.lengths_LFBT, trace.ends_LBPH.permute(1, 2, 0, 3)
    embedding_length_BT = trace.embedding_length_BT
    if lengths_LFBT.device.type == "mps":  # which has no float64
        active_LBT, lengths_LFBT, ends_BPLH = active_LBT.cpu(), lengths_LFBT.cpu(), ends_BPLH.cpu()
        embedding_length_BT = embedding_length_BT.cpu()
    change, attention, between, mlp, after = lengths_LFBT.double().unbind(1)
    multiplier_L11 = after.new_tensor(trace.multipliers).view(-1, 1, 1)
    before = torch.cat([embedding_length_BT.double().unsqueeze(0), after[:-1]])
    measures_KLBT = torch.stack(
        [
            active_LBT.double(),
            _cosine_distance(before, after, change),
            change / before.clamp(min=1e-12),
            _cosine_distance(before, between, multiplier_L11 * attention),
            _cosine_distance(between, after, multiplier_L11 * mlp),
        ]
    )
    counted_PBT = counted_PBT.to(after.device)
    sums_PKLB = torch.stack([torch.where(counted_BT, measures_KLBT, 0.0).sum(-1) for counted_BT in counted_PBT])
    spans_BPS = torch.where(counted_PBT.any(-1).mT.unsqueeze(-1), _angular_distances(ends_BPLH.double()), 0.0)
    sums = torch.cat([sums_PKLB.permute(3, 0, 1, 2).flatten(2), spans_BPS], dim=-1).cpu().numpy()
    if not np.isfinite(sums).all():
        raise ModelError("the model's hidden states overflow", hint="profile with --dtype bf16 or fp32")
    return np.asarray(np.round(sums / GRID) * GRID)


def _angular_distances(states: Tensor) -> Tensor:
    """arccos(cos) / pi of every pair of states [..., L + 1, H], as [..., L * (L + 1) / 2], in the order of `span_distance`."""
    lengths = torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12)
    unit = states / lengths.unsqueeze(-1)
    start, end = torch.triu_indices(states.shape[-2], states.shape[-2], offset=1, device=states.device)
    return torch.arccos((unit @ unit.mT)[..., start, end].clamp(-1, 1)) / torch.pi


def generate_responses(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    batch_size: int = 8,
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> list[Sample]:
    """The samples with greedy responses of the model, each up to and including its end token. `journal` remembers batches."""
    journal = Journal() if journal is None else journal
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

    for number, batch in enumerate(batch_by_length([len(sample.prompt) for sample in samples], batch_size)):
        prompts = [samples[index].prompt for index in batch]
        responses = journal.get(f"generate {number}")
        if responses is None:
            responses = generate_greedily(advance, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens)
            journal.record(f"generate {number}", responses)
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
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Profile:
    """Measure every layer over samples that have responses; `checkpoint` is where `model` was loaded from.

    Prompt tokens count for prefill. Response tokens count for decode, except the last: it ends the response and is never fed
    back. `responses` ("generate" or "dataset") and `max_new_tokens` are written into the profile. Batches that `journal`
    remembers are not run again. Raises ModelError where hidden states overflow.
    """
    return Profile(
        model=checkpoint.identity,
        sizes=measure_sizes(checkpoint),
        lac=lac,
        calibration=Calibration(
            num_samples=len(samples),
            responses=responses,
            max_new_tokens=max_new_tokens,
            fingerprints=(fingerprint_samples(samples),),
        ),
        groups=trace_layers(model, samples, lac=lac, batch_size=batch_size, journal=journal, on_progress=on_progress),
    )


def trace_layers(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    lac: LacSettings,
    batch_size: int,
    journal: Journal | None = None,
    on_progress: OnProgress | None = None,
) -> Mapping[str, Mapping[Phase, Blocks]]:
    """The statistics of `trace_model`, by group, phase and block."""
    journal = Journal() if journal is None else journal
    norm_dtype = torch.float32 if lac.arithmetic == "float32" else model.dtype
    with _traced(model, norm_dtype=norm_dtype) as trace:
        sums = BlockSums(samples, num_layers=trace.num_layers)
        for number, indices in enumerate(batch_by_length([sum(num_traced(sample)) for sample in samples], batch_size)):
            recorded = journal.get(f"trace {number}")
            if recorded is None:
                batch = pad_sequences([samples[index] for index in indices])
                trace.begin(batch, hidden_size=model.config.hidden_size, device=model.device)
                with torch.inference_mode():
                    run_layers(model, batch)
                    found = _sum_measures(trace, batch.counted_PBT, alpha=lac.alpha)
                journal.record(f"trace {number}", base64.b64encode(found.astype("<f8").tobytes()).decode())
            else:
                found = np.frombuffer(base64.b64decode(recorded), dtype="<f8").reshape(len(indices), len(Phase), -1)
            sums.add(indices, found)
            if on_progress is not None:
                on_progress(len(indices), sum(sum(num_traced(samples[index])) for index in indices))
    return sums.groups()


@dataclass(frozen=True)
class PaddedBatch:
    """Whole sequences, padded on the right. `counted_PBT`: the tokens of each phase; `last_BP`: the last of these."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    counted_PBT: Tensor
    last_BP: Tensor


def pad_sequences(samples: Sequence[Sample]) -> PaddedBatch:
    """Prompts with their responses, but for the last token of these, which is never fed."""
    rows = [(*sample.prompt, *(sample.response or ())[:-1]) for sample in samples]
    width = max(map(len, rows))
    ends_BP = torch.tensor([[len(sample.prompt), len(row)] for sample, row in zip(samples, rows, strict=True)])
    tokens_T = torch.arange(width)
    in_prompt_BT, in_row_BT = tokens_T < ends_BP[:, :1], tokens_T < ends_BP[:, 1:]
    return PaddedBatch(
        input_ids_BT=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        attention_mask_BT=in_row_BT.long(),
        counted_PBT=torch.stack([in_prompt_BT, in_row_BT & ~in_prompt_BT]),
        last_BP=ends_BP - 1,
    )


def run_layers(model: PreTrainedModel, batch: PaddedBatch) -> None:
    """One pass through all layers; no head, because nothing here reads logits."""
    model.base_model(
        input_ids=batch.input_ids_BT.to(model.device),
        attention_mask=batch.attention_mask_BT.to(model.device),
        use_cache=False,
    )


def batch_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of samples of similar length together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
