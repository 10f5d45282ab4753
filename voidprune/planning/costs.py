"""What a schedule costs on a model: bytes of weights, K/V bytes a token, arithmetic of prefill, bytes read by decode.

Computed from the checkpoint's header alone. Counts are exact for weights and K/V; FLOPs count matrix products (two a weight and
token) and attention scores, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from voidprune.models.checkpoint import DTYPE_BYTES, Checkpoint
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


@dataclass(frozen=True)
class _LayerParts:
    """Sizes of the parts of one layer: bytes, and weights in matrices, of attention, of its K/V part, and of the MLP."""

    attention_bytes: int
    kv_bytes: int
    mlp_bytes: int
    attention_weights: int
    kv_weights: int
    mlp_weights: int


def schedule_costs(checkpoint: Checkpoint, schedule: Schedule) -> ScheduleCosts:
    """Costs of a schedule on the model that it was made for."""
    architecture, names = checkpoint.architecture, checkpoint.architecture.spec.tensors
    layers = [_measure_layer(checkpoint, layer) for layer in range(schedule.num_layers)]
    head_name = names.embedding if architecture.tied_embeddings else names.head
    head = checkpoint.tensors[f"{head_name}.weight"]
    layer_bytes = checkpoint.layer_bytes()
    dropped = sum(layer_bytes[layer] for layer in range(schedule.num_layers) if layer not in schedule.union)
    kv_bytes = 2 * architecture.num_kv_heads * architecture.head_dim * DTYPE_BYTES[head.dtype]
    attending = sum(action.attends for action in schedule.decode)
    return ScheduleCosts(
        weight_bytes=checkpoint.num_bytes - dropped,
        kv_bytes_per_token=kv_bytes * len(schedule.kv_layers),
        prefill_flops=_prefill_flops(checkpoint, schedule, layers)
        + 2 * architecture.vocab_size * architecture.hidden_size,
        decode_bytes=sum(_bytes_read(parts, action) for parts, action in zip(layers, schedule.decode, strict=True))
        + head.num_bytes
        + attending * kv_bytes * PROMPT_LENGTH,
    )


def baseline_costs(checkpoint: Checkpoint) -> ScheduleCosts:
    """Costs of the whole model."""
    return schedule_costs(checkpoint, full_schedule(checkpoint.identity))


def _prefill_flops(checkpoint: Checkpoint, schedule: Schedule, layers: list[_LayerParts]) -> int:
    """All tokens but the last run prefill up to the last K/V that it writes; the last runs the schedule of its boundary."""
    writers = [layer for layer, action in enumerate(schedule.prefill) if action.writes_kv]
    final = writers[-1] if writers else -1
    last_phase = Phase.DECODE if schedule.boundary is Boundary.DECODE else Phase.PREFILL
    total = 0
    for layer, parts in enumerate(layers):
        action = schedule.prefill[layer]
        if layer == final and schedule.boundary is Boundary.DECODE:
            action = LayerAction.KV_ONLY
        if layer <= final:
            total += (PROMPT_LENGTH - 1) * _flops(parts, action)
            if action.attends:
                total += _attention_flops(checkpoint, PROMPT_LENGTH * (PROMPT_LENGTH - 1) // 2)
        last_action = schedule.actions(last_phase)[layer]
        total += _flops(parts, last_action)
        if last_action.attends:
            total += _attention_flops(checkpoint, PROMPT_LENGTH)
    return total


def _attention_flops(checkpoint: Checkpoint, num_pairs: int) -> int:
    """Scores and weighted sums over (query, key) pairs: two products of head_dim a head."""
    return 4 * num_pairs * checkpoint.architecture.num_heads * checkpoint.architecture.head_dim


def _flops(parts: _LayerParts, action: LayerAction) -> int:
    weights = parts.attention_weights if action.attends else parts.kv_weights if action.writes_kv else 0
    return 2 * (weights + (parts.mlp_weights if action.runs_mlp else 0))


def _bytes_read(parts: _LayerParts, action: LayerAction) -> int:
    read = parts.attention_bytes if action.attends else parts.kv_bytes if action.writes_kv else 0
    return read + (parts.mlp_bytes if action.runs_mlp else 0)


def _measure_layer(checkpoint: Checkpoint, layer: int) -> _LayerParts:
    names = checkpoint.architecture.spec.tensors
    attention = (names.attention_norm, names.query, names.key, names.value, names.output)
    kv = (names.attention_norm, names.key, names.value)
    mlp = (names.mlp_norm, names.gate, names.up, names.down)

    def measure(suffixes: tuple[str, ...]) -> tuple[int, int]:
        records = [
            checkpoint.tensors[name]
            for suffix in suffixes
            for name in (f"{names.layer(layer, suffix)}.weight", f"{names.layer(layer, suffix)}.bias")
            if name in checkpoint.tensors
        ]
        weights = sum(record.shape[0] * record.shape[1] for record in records if len(record.shape) == 2)
        return sum(record.num_bytes for record in records), weights

    (attention_bytes, attention_weights), (kv_bytes, kv_weights), (mlp_bytes, mlp_weights) = map(
        measure, (attention, kv, mlp)
    )
    return _LayerParts(attention_bytes, kv_bytes, mlp_bytes, attention_weights, kv_weights, mlp_weights)
