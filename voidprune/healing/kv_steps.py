"""How large keys and values get, channel by channel: measured on samples, for graphs that hold them in 8 bits.

A channel reaches what it reached on the samples; one that a rotary embedding turns, what it would have reached had the token stood
anywhere in the context, because samples are short. KL of two small models (stories260k, babyllama-105) with steps from 64 tokens of
texts of up to 512 (256), without headroom: 0.22 and 0.019 by the channels as they were, 0.0054 and 0.0008 by the lengths of what is
turned together, 0.0020 and 0.0010 by the arcs that it sweeps; from all tokens 0.0018 and 0.00022, 0.0059 and 0.00023, 0.0019 and
0.00022.

Shapes: B rows, T tokens, N K/V heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from voidprune.errors import ModelError
from voidprune.execution.kv_cache import KvSteps
from voidprune.execution.reference import scheduled
from voidprune.healing.layer_windows import phased_batches
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.rope import Rope
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Phase, Schedule

HEADROOM = 1.2
"""What steps allow for, as a multiple of what was reached: a number that is cut off costs more than coarser steps.

KL with 1, 1.1, 1.2 and 1.35, measured on 20,000, 3,000 and 1,150 tokens: of stories260k 0.0018, 0.0021, 0.0025, 0.0032; 0.0021,
0.0020, 0.0023, 0.0029; 0.0068, 0.0034, 0.0024, 0.0027. Of babyllama-105 0.00023, 0.00027, 0.00033, 0.00040; 0.00096, 0.00060,
0.00047, 0.00044; 0.0031, 0.0015, 0.00086, 0.00049.
"""


def measure_kv_steps(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    schedule: Schedule,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _amount: None,
) -> list[KvSteps]:
    """Steps of every cache slot of `schedule`, from the tokens that write it: of prompts, responses, or both.

    `model` is that of `checkpoint`, with all of its layers. `advance` is told of the samples done. Raises ModelError where keys or
    values overflow, and where no token of the samples writes a slot.
    """
    if not schedule.kv_layers:
        raise ModelError("no layer writes keys and values, so there are none to round", hint="leave --kv-cache out")
    ropes = describe_graph_architecture(checkpoint.config, checkpoint.architecture.spec).ropes
    context = checkpoint.architecture.context_length
    reached: dict[int, tuple[Tensor, Tensor]] = {}
    with scheduled(model, schedule) as running:
        for batch in phased_batches(samples, schedule.boundary, batch_size=batch_size):
            cache = DynamicCache()
            running.forward(
                batch.padded.input_ids_BT,
                is_decode_BT=batch.is_decode_BT,
                attention_mask_BS=batch.padded.attention_mask_BT,
                cache=cache,
                last_only=True,
            )
            for layer in schedule.kv_layers:
                written_BT = batch.counted_BT([phase for phase in Phase if schedule.actions(phase)[layer].writes_kv])
                if not written_BT.any():
                    continue
                kept = cache.layers[layer]
                found = (
                    _reach(reach_anywhere(kept.keys.float(), ropes[layer], context_length=context), written_BT),  # type: ignore[union-attr]
                    _reach(kept.values.float().abs(), written_BT),  # type: ignore[union-attr]
                )
                before = reached.get(layer, found)
                reached[layer] = (before[0].maximum(found[0]), before[1].maximum(found[1]))
            advance(len(batch.is_decode_BT))
    steps = []
    for layer in schedule.kv_layers:
        if layer not in reached:
            raise ModelError(
                f"no token of the samples writes keys and values of layer {layer}, so nothing says how large they get",
                hint="give samples with longer responses",
            )
        keys_NH, values_NH = reached[layer]
        if not (torch.isfinite(keys_NH).all() and torch.isfinite(values_NH).all()):
            raise ModelError(
                f"keys or values of layer {layer} overflow, so nothing says how to round them",
                hint="leave --kv-cache out",
            )
        steps.append(KvSteps.reaching((HEADROOM * keys_NH).numpy(), (HEADROOM * values_NH).numpy()))
    return steps


def reach_anywhere(keys_BNTH: Tensor, rope: Rope | None, *, context_length: int) -> Tensor:
    """How large each channel of the keys of tokens 0 to T - 1 gets where their tokens may stand, [B, N, T, H].

    A pair of channels is a vector of some length, which every position turns on by the same angle: over a context it sweeps an arc,
    and each channel reaches the length times the largest |cos|, or |sin|, on it.
    """
    width = 0 if rope is None else rope.width
    turned, rest = keys_BNTH[..., :width], keys_BNTH[..., width:].abs()
    if rope is None or not width:
        return rest
    halves = turned[..., : width // 2], turned[..., width // 2 :]
    one, other = (turned[..., ::2], turned[..., 1::2]) if rope.interleaved else halves
    lengths = torch.hypot(one, other)
    reached: tuple[Tensor, ...] = (lengths, lengths)
    if not rope.long_frequencies:  # with them, angles depend on how long a sequence will be
        frequencies = torch.tensor(rope.frequencies, dtype=torch.float64)
        positions_T1 = torch.arange(keys_BNTH.shape[2], dtype=torch.float64).unsqueeze(-1)
        first = torch.atan2(other, one).double().cpu() - frequencies * positions_T1
        last = first + frequencies * (context_length - 1)
        reached = tuple(
            lengths * _largest_cosine(first - shift, last - shift).to(lengths) for shift in (0.0, math.pi / 2)
        )
    together = torch.stack(reached, -1).flatten(-2) if rope.interleaved else torch.cat(reached, -1)
    return torch.cat([together, rest], -1)


def _largest_cosine(first: Tensor, last: Tensor) -> Tensor:
    """Of |cos| between two angles."""
    passes_end = (last / math.pi).floor() >= (first / math.pi).ceil()
    return torch.where(passes_end, 1.0, first.cos().abs().maximum(last.cos().abs()))


def _reach(sizes_BNTH: Tensor, counted_BT: Tensor) -> Tensor:
    """The largest of each channel over the tokens that count: [N, H], on the CPU."""
    counted_B1T1 = counted_BT[:, None, :, None].to(sizes_BNTH.device)
    return torch.where(counted_B1T1, sizes_BNTH, 0.0).amax((0, 2)).cpu()
