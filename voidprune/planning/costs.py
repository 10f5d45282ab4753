"""What a schedule costs: bytes of weights, K/V bytes a token, arithmetic of prefill, bytes read by decode.

Exact for weights and K/V. FLOPs count matrix products (two a weight and token) and attention scores, nothing else; with the
boundary "prefill" they are a little high, because the graph leaves the last layer's output projection and MLP to the last token.
Sliding windows are counted as full attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, full_schedule

PROMPT_LENGTH = 512  # tokens: the prompt for which prefill is counted, and the context for which decode is


@dataclass(frozen=True)
class ScheduleCosts:
    """Costs of a schedule.

    `weight_bytes`: the checkpoint (the union of both phases). `kv_bytes_per_token`: cache growth. `prefill_flops`: a prompt of
    PROMPT_LENGTH tokens, logits of the last. `decode_bytes`: weights and K/V read for one token after PROMPT_LENGTH tokens.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    prefill_flops: int
    decode_bytes: int


def schedule_costs(sizes: ModelSizes, schedule: Schedule) -> ScheduleCosts:
    """Costs of a schedule on the model that it was made for."""
    dropped = sum(
        sizes.layers[layer].total_bytes for layer in range(schedule.num_layers) if layer not in schedule.union
    )
    attending = sum(action.attends for action in schedule.decode)
    return ScheduleCosts(
        weight_bytes=sizes.total_bytes - dropped,
        kv_bytes_per_token=sizes.kv_bytes_per_token * len(schedule.kv_layers),
        prefill_flops=_prefill_flops(sizes, schedule),
        decode_bytes=sum(
            _bytes_read(layer, action) for layer, action in zip(sizes.layers, schedule.decode, strict=True)
        )
        + sizes.head_bytes
        + attending * sizes.kv_bytes_per_token * PROMPT_LENGTH,
    )


def baseline_costs(sizes: ModelSizes, schedule: Schedule) -> ScheduleCosts:
    """Costs of the whole model under the boundary of `schedule`."""
    return schedule_costs(sizes, full_schedule(schedule.model, boundary=schedule.boundary))


def _prefill_flops(sizes: ModelSizes, schedule: Schedule) -> int:
    """All tokens but the last run prefill up to the last K/V that it writes; the last runs the schedule of its boundary."""
    writers = [layer for layer, action in enumerate(schedule.prefill) if action.writes_kv]
    final = writers[-1] if writers else -1
    last_phase = Phase.DECODE if schedule.boundary is Boundary.DECODE else Phase.PREFILL
    total = 2 * sizes.head_weights
    for layer, parts in enumerate(sizes.layers):
        earlier = schedule.prefill[layer] if layer <= final else LayerAction.SKIP
        if layer == final and schedule.boundary is Boundary.DECODE:
            earlier = LayerAction.KV_ONLY
        last = schedule.actions(last_phase)[layer]
        total += (PROMPT_LENGTH - 1) * _flops(parts, earlier) + _flops(parts, last)
        pairs = PROMPT_LENGTH * (PROMPT_LENGTH - 1) // 2 if earlier.attends else 0
        pairs += PROMPT_LENGTH if last.attends else 0
        total += 4 * pairs * sizes.attention_width
    return total


def _flops(layer: LayerSizes, action: LayerAction) -> int:
    weights = layer.attention_weights if action.attends else layer.kv_weights if action.writes_kv else 0
    return 2 * (weights + (layer.mlp_weights if action.runs_mlp else 0))


def _bytes_read(layer: LayerSizes, action: LayerAction) -> int:
    read = layer.attention_bytes if action.attends else layer.kv_bytes if action.writes_kv else 0
    return read + (layer.mlp_bytes if action.runs_mlp else 0)
