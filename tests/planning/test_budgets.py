"""What a user may spend: texts become numbers and back, nonsense is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planning.test_costs import MODEL, SIZES
from tests.strategies import schedules
from voidprune.errors import BudgetError
from voidprune.planning.budgets import Budget, format_layers, num_kept, parse_amount, parse_layers, spent
from voidprune.planning.costs import schedule_costs
from voidprune.schedule import Phase, Schedule, dropped_schedule, full_schedule

# ---- texts


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("700000000", 700_000_000),
        ("700MB", 700_000_000),
        (" 700 mb ", 700_000_000),
        ("1.5GiB", 3 << 29),
        ("1.5g", 1_500_000_000),
        ("2T", 2 * 10**12),
        ("2TFLOPs", 2 * 10**12),
        ("2 TiFLOP", 2 << 40),
        ("8kib", 8192),
        ("0.3KB", 300),  # exact, unlike 0.3 * 1000 in binary fractions of other amounts
        ("1.1GB", 1_100_000_000),
        ("7b", 7),
    ],
)
def test_amounts_are_read_exactly(text: str, amount: int) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    "text",
    ["", " ", "MB", "-1", "+5", "1e9", "1,000", "0x10", "5i", "5ib", "1.", ".5", "nan", "inf", "1MB2", "1PB", "½"],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is no amount") as caught:
        parse_amount(text)
    assert caught.value.hint is not None


def test_layers_are_read_with_both_ends_of_a_range() -> None:
    assert parse_layers("3,7,11-14") == {3, 7, 11, 12, 13, 14}
    assert parse_layers(" 3 , 3-3,2-4 ") == {2, 3, 4}
    assert parse_layers("0") == {0}


@pytest.mark.parametrize(
    "text",
    ["", ",", "3,", "a", "-1", "1--2", "5-3", "1.5", "0-99999999999", "9" * 5000, "1-2-3", "all", "²"],
)
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    """At once: "0-99999999999" would fill the memory if it were counted out."""
    with pytest.raises(BudgetError, match="is no list of layers"):
        parse_layers(text)


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_layers_survive_the_round_trip(layers: frozenset[int]) -> None:
    text = format_layers(layers)
    assert parse_layers(text) == layers
    assert format_layers(sorted(layers, reverse=True)) == text


def test_runs_are_written_as_ranges() -> None:
    assert format_layers({11, 12, 3, 7, 13}) == "3,7,11-13"
    assert format_layers([1, 2]) == "1-2"


# ---- keep ratios


@pytest.mark.parametrize(
    ("keep", "layers", "kept"),
    [(0.3, 12, 4), (0.5, 5, 3), (0.01, 12, 1), (1, 12, 12), (0.125, 12, 2), (0.29, 50, 15), (0.5, 1, 1)],
)
def test_half_rounds_up_and_one_layer_stays(keep: float, layers: int, kept: int) -> None:
    assert num_kept(keep, layers) == kept


@given(st.integers(1, 200), st.data())
def test_a_share_that_is_a_whole_number_of_layers_is_that_number(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_layers))
    assert num_kept(count / num_layers, num_layers) == count


# ---- budgets


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["keep_prefill", "keep_decode"])
def test_ratios_outside_are_refused(name: str, keep: float) -> None:
    with pytest.raises(BudgetError, match=r"outside of \(0, 1\]"):
        Budget(**{name: keep})


@pytest.mark.parametrize("name", ["max_bytes", "max_kv_bytes_per_token", "max_prefill_flops", "max_decode_bytes"])
@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_nothing_meets_are_refused_by_name(name: str, limit: int) -> None:
    with pytest.raises(BudgetError, match=f"--{name.replace('_', '-')} {limit}"):
        Budget(**{name: limit})


def test_contradictions_are_refused() -> None:
    with pytest.raises(BudgetError, match="layer 3 is both protected and dropped"):
        Budget(protected=frozenset({1, 3, 5}), dropped=frozenset({3, 5}))
    with pytest.raises(BudgetError, match="shared phases cannot have different keep ratios"):
        Budget(keep_prefill=0.5, keep_decode=1.0, shared=True)
    assert Budget(keep_prefill=0.5, keep_decode=0.5, shared=True).shared


def test_layers_that_the_model_does_not_have_are_named() -> None:
    Budget(protected=frozenset({2}), dropped=frozenset({0})).check_layers(3)
    with pytest.raises(BudgetError, match="there is no layer 3; the model has 3") as caught:
        Budget(protected=frozenset({2}), dropped=frozenset({7, 3})).check_layers(3)
    assert caught.value.hint == "layers are 0 to 2"


def test_what_is_limited() -> None:
    assert not Budget().is_limited
    assert not Budget(protected=frozenset({1}), shared=True).is_limited
    assert Budget(dropped=frozenset({1})).is_limited
    assert Budget(max_bytes=1).is_limited
    assert Budget(keep_decode=0.5, dropped=frozenset({1})).counts_only
    assert not Budget(keep_decode=0.5, max_decode_bytes=1).counts_only


@given(data=st.data())
def test_overshoot_is_the_sum_of_the_shares_above_each_limit(data: st.DataObject) -> None:
    schedule = data.draw(schedules(MODEL))
    limits = {
        "max_bytes": data.draw(st.integers(1, 400)),
        "max_kv_bytes_per_token": data.draw(st.integers(1, 60)),
        "max_decode_bytes": data.draw(st.integers(1, 40_000)),
        "max_prefill_flops": data.draw(st.integers(1, 30_000_000)),
    }
    keep = data.draw(st.sampled_from([1 / 3, 2 / 3, 1.0]))
    costs = schedule_costs(SIZES, schedule)
    pairs = [
        (costs.weight_bytes, limits["max_bytes"]),
        (costs.kv_bytes_per_token, limits["max_kv_bytes_per_token"]),
        (costs.decode_bytes, limits["max_decode_bytes"]),
        (costs.prefill_flops, limits["max_prefill_flops"]),
        (schedule.num_executed(Phase.DECODE), round(3 * keep)),
    ]
    expected = sum((cost - limit) / limit for cost, limit in pairs if cost > limit)
    assert Budget(**limits, keep_decode=keep).overshoot(schedule, SIZES) == pytest.approx(expected)


def test_layers_are_counted_without_sizes() -> None:
    schedule = dropped_schedule(MODEL, [1])
    assert spent(schedule, None) == {"layers in prefill": 2, "layers in decode": 2}
    assert Budget(keep_prefill=1 / 3).overshoot(schedule, None) == 1.0
    assert Budget(keep_prefill=1 / 3).overshoot(full_schedule(MODEL), None) == 2.0


def test_the_origin_tells_every_limit_and_is_written() -> None:
    budget = Budget(keep_decode=0.5, max_bytes=300, protected=frozenset({0, 1}), dropped=frozenset({2}))
    origin = budget.to_origin()
    assert origin == {"keep_decode": 0.5, "max_bytes": 300, "protected": "0-1", "dropped": "2", "phases": "split"}
    schedule = full_schedule(MODEL)
    Schedule(MODEL, schedule.prefill, schedule.decode, origin=origin).to_document()
