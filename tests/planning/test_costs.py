"""Costs of a schedule, against sums by hand."""

from __future__ import annotations

from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.planning.costs import PROMPT_LENGTH, baseline_costs, schedule_costs
from voidprune.schedule import Boundary, LayerAction, ModelIdentity, Schedule, dropped_schedule, full_schedule

FULL, KV, SKIP = LayerAction.FULL, LayerAction.KV_ONLY, LayerAction.SKIP
MODEL = ModelIdentity("tiny", "llama", 3, "sha256:abc")
LAYER = LayerSizes(
    total_bytes=100, attention_bytes=60, kv_bytes=20, mlp_bytes=40, attention_weights=15, kv_weights=5, mlp_weights=10
)
SIZES = ModelSizes(
    layers=(LAYER,) * 3, other_bytes=50, head_bytes=30, head_weights=7, kv_bytes_per_token=16, attention_width=4
)
T = PROMPT_LENGTH


def test_the_whole_model_with_the_prefill_boundary() -> None:
    costs = schedule_costs(SIZES, full_schedule(MODEL, boundary=Boundary.PREFILL))
    assert costs.weight_bytes == 350
    assert costs.kv_bytes_per_token == 48
    assert costs.decode_bytes == 3 * 100 + 30 + 3 * 16 * T
    assert costs.prefill_flops == 3 * (2 * 25 * T + 4 * 4 * T * (T + 1) // 2) + 2 * 7


def test_above_the_last_kv_only_the_last_token_runs() -> None:
    """Boundary decode: of the last layer that prefill writes, the earlier tokens run the K/V projections alone."""
    costs = schedule_costs(SIZES, full_schedule(MODEL))
    earlier = (T - 1) * (2 * (2 * 25) + 2 * 5) + 2 * 4 * 4 * (T * (T - 1) // 2)
    last = 3 * (2 * 25 + 4 * 4 * T)
    assert costs.prefill_flops == earlier + last + 2 * 7


def test_dropping_a_layer_drops_everything_of_it() -> None:
    costs, whole = (
        schedule_costs(SIZES, dropped_schedule(MODEL, [1])),
        baseline_costs(SIZES, dropped_schedule(MODEL, [1])),
    )
    assert whole.weight_bytes - costs.weight_bytes == 100
    assert whole.kv_bytes_per_token - costs.kv_bytes_per_token == 16
    assert whole.decode_bytes - costs.decode_bytes == 100 + 16 * T


def test_kv_only_counts_its_two_matrices_and_its_cache() -> None:
    schedule = Schedule(MODEL, prefill=(FULL, KV, KV), decode=(FULL, FULL, FULL))
    costs = schedule_costs(SIZES, schedule)
    earlier = (T - 1) * 2 * (25 + 5 + 5) + 4 * 4 * (T * (T - 1) // 2)
    assert costs.prefill_flops == earlier + 3 * (2 * 25 + 4 * 4 * T) + 2 * 7
    assert costs.weight_bytes == 350
    assert costs.kv_bytes_per_token == 48


def test_decode_reads_the_kv_part_of_layers_that_only_write() -> None:
    schedule = Schedule(MODEL, prefill=(FULL, FULL, SKIP), decode=(FULL, KV, SKIP))
    costs = schedule_costs(SIZES, schedule)
    assert costs.decode_bytes == 100 + 20 + 30 + 16 * T
    assert costs.weight_bytes == 250
