"""Budgets become schedules, with the K/V writes that the contract needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiling.test_profile import fill_blocks, make_profile
from voidprune.errors import BudgetError
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.planner import num_kept, plan_schedule, top_layers
from voidprune.profiling.profile import Profile, empty_statistics
from voidprune.schedule import LayerAction, ModelIdentity, Phase, Schedule

MODEL = ModelIdentity("tiny", "llama", 2, "sha256:abc")


def plan(
    profile: Profile | None = None, *, prefill: float, decode: float, criterion: str = "lac", **rest: bool
) -> Schedule:
    keep = {Phase.PREFILL: prefill, Phase.DECODE: decode}
    return plan_schedule(MODEL, profile or make_profile(), criterion=criterion, keep=keep, **rest)


@pytest.mark.parametrize(
    ("keep", "layers", "kept"), [(0.3, 12, 4), (0.5, 5, 3), (0.01, 12, 1), (1, 12, 12), (0.125, 12, 2), (0.29, 50, 15)]
)
def test_half_rounds_up_and_one_layer_stays(keep: float, layers: int, kept: int) -> None:
    assert num_kept(keep, layers) == kept


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, float("nan")])
def test_ratios_outside_are_refused(keep: float) -> None:
    with pytest.raises(BudgetError, match=r"outside of \(0, 1\]"):
        num_kept(keep, 12)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.data())
def test_top_layers_are_the_best(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    chosen = top_layers(scores, count)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    rest = [score for layer, score in enumerate(scores) if layer not in chosen]
    assert not rest or min(scores[layer] for layer in chosen) >= max(rest)


def test_of_equal_scores_the_earlier_layer_is_kept() -> None:
    assert top_layers([1.0, 2.0, 1.0, 2.0], 3) == (0, 1, 3)


def test_phases_are_planned_apart_and_kv_is_inserted() -> None:
    schedule = plan(prefill=0.5, decode=0.5)  # prefill: layer 0 is active more often; decode: layer 1
    assert schedule.prefill == (LayerAction.FULL, LayerAction.KV_ONLY)
    assert schedule.decode == (LayerAction.KV_ONLY, LayerAction.FULL)
    assert schedule.origin["criterion"] == "lac"


def test_single_turn_writes_no_kv_for_later_turns() -> None:
    schedule = plan(prefill=0.5, decode=0.5, single_turn=True)
    assert schedule.prefill == (LayerAction.FULL, LayerAction.KV_ONLY)
    assert schedule.decode == (LayerAction.SKIP, LayerAction.FULL)


def test_shared_phases_are_one_set() -> None:
    schedule = plan(prefill=0.5, decode=0.5, shared=True)
    assert schedule.prefill == schedule.decode == (LayerAction.FULL, LayerAction.SKIP)
    with pytest.raises(BudgetError, match="different keep ratios"):
        plan(prefill=0.5, decode=1.0, shared=True)


def test_controls_need_no_profile() -> None:
    keep = dict.fromkeys(Phase, 0.5)
    assert plan_schedule(MODEL, None, criterion="last-n", keep=keep).decode == (LayerAction.SKIP, LayerAction.FULL)
    with pytest.raises(BudgetError, match="needs a profile"):
        plan_schedule(MODEL, None, criterion="lac", keep=keep)


def test_a_profile_of_another_model_is_refused() -> None:
    other = ModelIdentity("other", "llama", 2, "sha256:def")
    with pytest.raises(BudgetError, match="the profile is of tiny, not of other"):
        plan_schedule(other, make_profile(), criterion="lac", keep=dict.fromkeys(Phase, 0.5))


def test_random_layers_differ_between_phases_that_are_split() -> None:
    large = ModelIdentity("large", "llama", 40, "sha256:abc")
    keep = dict.fromkeys(Phase, 0.5)
    split = plan_schedule(large, None, criterion="random", keep=keep, single_turn=True)
    assert [action.executes for action in split.prefill] != [action.executes for action in split.decode]
    shared = plan_schedule(large, None, criterion="random", keep=keep, shared=True)
    assert shared.prefill == shared.decode


def test_a_phase_without_tokens_is_refused() -> None:
    profile = make_profile()
    nothing = fill_blocks(empty_statistics(2))
    groups = {"default": {Phase.PREFILL: profile.groups["default"][Phase.PREFILL], Phase.DECODE: nothing}}
    silent = Profile(profile.model, profile.sizes, profile.lac, profile.calibration, groups)
    with pytest.raises(BudgetError, match="no token of decode"):
        plan(silent, prefill=0.5, decode=0.5)


def test_a_sublayer_criterion_leaves_the_other_sublayer_in_place() -> None:
    """Layer 1 turns the state less in attention and in its MLP, in both phases."""
    attention = plan(prefill=0.5, decode=0.5, criterion="attention-cosine")
    assert attention.prefill == attention.decode == (LayerAction.FULL, LayerAction.SKIP_ATTENTION)
    mlp = plan(prefill=0.5, decode=1.0, criterion="mlp-cosine")
    assert mlp.prefill == (LayerAction.FULL, LayerAction.SKIP_MLP)
    assert mlp.decode == (LayerAction.FULL, LayerAction.FULL)


def test_attention_that_only_decode_needs_finds_its_keys() -> None:
    schedule = plan(prefill=0.5, decode=1.0, criterion="attention-cosine")
    assert schedule.prefill == (LayerAction.FULL, LayerAction.KV_MLP)
    assert schedule.decode == (LayerAction.FULL, LayerAction.FULL)


def test_every_criterion_keeps_what_the_budget_says() -> None:
    for name in CRITERIA:
        for keep, kept in ((0.5, 1), (1.0, 2)):
            schedule = plan(prefill=keep, decode=keep, criterion=name)
            assert sum(action is LayerAction.FULL for action in schedule.prefill) == kept, name
            assert schedule.origin["criterion"] == name
