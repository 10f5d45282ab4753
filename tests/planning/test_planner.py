"""Budgets become schedules, with the K/V writes that the contract needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.profiling.test_profile import fill_blocks, make_profile
from voidprune.errors import BudgetError
from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.planning.budgets import Budget, spent
from voidprune.planning.criteria import CRITERIA, Part
from voidprune.planning.planner import explicit_schedule, plan_schedule
from voidprune.profiling.profile import Profile, empty_statistics
from voidprune.schedule import LayerAction, ModelIdentity, Phase, Schedule, full_schedule

MODEL = ModelIdentity("tiny", "llama", 2, "sha256:abc")


HALF = Budget(keep_prefill=0.5, keep_decode=0.5)
FULL, SKIP = LayerAction.FULL, LayerAction.SKIP


def plan(
    profile: Profile | None = None,
    *,
    prefill: float,
    decode: float,
    criterion: str = "lac",
    shared: bool = False,
    **rest: bool,
) -> Schedule:
    budget = Budget(keep_prefill=prefill, keep_decode=decode, shared=shared)
    return plan_schedule(MODEL, profile or make_profile(), criterion=criterion, budget=budget, **rest)


def large(num_layers: int = 8) -> tuple[ModelIdentity, ModelSizes]:
    layer = LayerSizes(100, 60, 20, 40, 15, 5, 10)
    return ModelIdentity("large", "llama", num_layers, "sha256:def"), ModelSizes(
        (layer,) * num_layers, 50, 30, 7, 16, 4
    )


def runs(schedule: Schedule, phase: Phase) -> list[int]:
    return [layer for layer, action in enumerate(schedule.actions(phase)) if action is FULL]


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
    assert plan_schedule(MODEL, None, criterion="last-n", budget=HALF).decode == (LayerAction.SKIP, LayerAction.FULL)
    with pytest.raises(BudgetError, match="needs a profile"):
        plan_schedule(MODEL, None, criterion="lac", budget=HALF)


def test_a_profile_of_another_model_is_refused() -> None:
    other = ModelIdentity("other", "llama", 2, "sha256:def")
    with pytest.raises(BudgetError, match="the profile is of tiny, not of other"):
        plan_schedule(other, make_profile(), criterion="lac", budget=HALF)


def test_random_layers_differ_between_phases_that_are_split() -> None:
    model, _ = large(40)
    split = plan_schedule(model, None, criterion="random", budget=HALF, single_turn=True)
    assert [action.executes for action in split.prefill] != [action.executes for action in split.decode]
    shared = plan_schedule(model, None, criterion="random", budget=replace(HALF, shared=True))
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


# ---- protected and dropped layers


def test_protected_layers_stay_and_take_their_share_of_the_count() -> None:
    model, _ = large()
    kept = plan_schedule(model, None, criterion="last-n", budget=replace(HALF, protected=frozenset({5})))
    assert runs(kept, Phase.PREFILL) == runs(kept, Phase.DECODE) == [0, 1, 5, 7]
    with pytest.raises(BudgetError, match="5 layers are protected, but only 4 may run"):
        plan_schedule(model, None, criterion="last-n", budget=replace(HALF, protected=frozenset(range(5))))


def test_dropped_layers_go_and_others_take_their_place() -> None:
    model, _ = large()
    kept = plan_schedule(model, None, criterion="last-n", budget=replace(HALF, dropped=frozenset({1, 7})))
    assert runs(kept, Phase.PREFILL) == [0, 2, 3, 4]
    assert 1 not in kept.union
    rest = plan_schedule(model, None, criterion="last-n", budget=Budget(dropped=frozenset({1, 7})))
    assert rest.union == (0, 2, 3, 4, 5, 6)


def test_a_model_whose_layers_are_all_protected_stays_whole() -> None:
    model, sizes = large(3)
    everything = Budget(protected=frozenset(range(3)), max_bytes=sizes.total_bytes)
    assert plan_schedule(model, None, criterion="last-n", budget=everything, sizes=sizes).is_full
    with pytest.raises(BudgetError, match="no schedule is within 349 bytes"):
        plan_schedule(model, None, criterion="last-n", budget=replace(everything, max_bytes=349), sizes=sizes)


@pytest.mark.parametrize("criterion", ["last-n", "evenly-spaced"])
def test_dropping_every_layer_is_refused(criterion: str) -> None:
    model, _ = large(3)
    with pytest.raises(BudgetError, match="no layer is left"):
        plan_schedule(model, None, criterion=criterion, budget=Budget(dropped=frozenset(range(3))))


def test_a_model_of_one_layer_keeps_it() -> None:
    model, _ = large(1)
    for name, criterion in CRITERIA.items():
        if not criterion.needs_profile:
            assert plan_schedule(model, None, criterion=name, budget=HALF).is_full, name


@pytest.mark.parametrize("name", ["protected", "dropped"])
def test_layers_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(BudgetError, match="there is no layer 2; the model has 2"):
        plan_schedule(MODEL, None, criterion="last-n", budget=replace(HALF, **{name: frozenset({2})}))


def test_sets_are_chosen_as_a_whole() -> None:
    model, _ = large()
    with pytest.raises(BudgetError, match="evenly-spaced chooses layers as a whole"):
        plan_schedule(model, None, criterion="evenly-spaced", budget=replace(HALF, protected=frozenset({1})))


# ---- limits in other units than layers


def test_limits_need_sizes() -> None:
    with pytest.raises(BudgetError, match="need the sizes of the model"):
        plan_schedule(large()[0], None, criterion="last-n", budget=Budget(max_bytes=500))


def test_the_sizes_of_the_profile_serve() -> None:
    assert plan_schedule(MODEL, make_profile(), criterion="lac", budget=Budget(max_bytes=150)).union == (0,)


def test_bytes_take_layers_from_both_phases_and_decode_bytes_from_one() -> None:
    model, sizes = large()
    small = plan_schedule(model, None, criterion="last-n", budget=Budget(max_bytes=550), sizes=sizes)
    assert small.union == (0, 1, 2, 3, 7)
    full = full_schedule(model)
    limit = spent(full, sizes)["decode bytes"] * 3 // 4
    fast = plan_schedule(model, None, criterion="last-n", budget=Budget(max_decode_bytes=limit), sizes=sizes)
    assert runs(fast, Phase.PREFILL) == list(range(8))
    assert 4 <= len(runs(fast, Phase.DECODE)) <= 6
    assert spent(fast, sizes)["decode bytes"] <= limit


@pytest.mark.parametrize("criterion", list(CRITERIA))
@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_bytes=300),
        Budget(max_decode_bytes=17_000),
        Budget(max_prefill_flops=60_000, keep_decode=1.0),
        Budget(max_bytes=250, shared=True),
    ],
    ids=lambda budget: ",".join(budget.to_origin()),
)
def test_every_criterion_is_within_the_limit_or_says_that_it_cannot_be(criterion: str, budget: Budget) -> None:
    profile = make_profile()
    sizes = replace(profile.sizes, other_bytes=150)  # 350 bytes in all
    # Sublayers leave no layer out of the checkpoint, and the last layer's cost prefill nothing.
    stuck = CRITERIA[criterion].part is not Part.LAYER and budget.max_decode_bytes is None
    if stuck or (budget.max_bytes is not None and not_alike(criterion, budget)):
        with pytest.raises(BudgetError, match=f"criterion {criterion} finds nothing within the budget"):
            plan_schedule(MODEL, profile, criterion=criterion, budget=budget, sizes=sizes)
        return
    schedule = plan_schedule(MODEL, profile, criterion=criterion, budget=budget, sizes=sizes)
    assert budget.overshoot(schedule, sizes) == 0


def not_alike(criterion: str, budget: Budget) -> bool:
    """Sets are chosen for each phase apart: where they share no layer, no layer leaves the checkpoint."""
    return criterion == "angular" and not budget.shared


def test_sets_and_sublayers_lose_as_few_layers_as_bytes_demand() -> None:
    model, sizes = large()
    spread = plan_schedule(model, None, criterion="evenly-spaced", budget=Budget(max_bytes=550), sizes=sizes)
    assert runs(spread, Phase.PREFILL) == runs(spread, Phase.DECODE) == [0, 2, 4, 5, 7]
    # Sublayers leave no whole layer out of the checkpoint: bytes cannot be saved by them.
    profile = make_profile()
    with pytest.raises(BudgetError, match="attention-cosine finds nothing within the budget"):
        plan_schedule(MODEL, profile, criterion="attention-cosine", budget=Budget(max_bytes=249))
    whole = spent(full_schedule(MODEL), profile.sizes)["decode bytes"]
    cut = plan_schedule(
        MODEL, profile, criterion="attention-cosine", budget=Budget(max_decode_bytes=whole - 1), sizes=profile.sizes
    )
    assert cut.decode == (FULL, LayerAction.SKIP_ATTENTION) or cut.decode == (FULL, LayerAction.KV_MLP)
    assert cut.prefill == (FULL, FULL)


# ---- layers by name


def test_layers_that_the_user_names() -> None:
    full = full_schedule(large()[0])
    assert explicit_schedule(full, keep=[0, 7]).union == (0, 7)
    assert explicit_schedule(full, drop=[1, 2, 3]).union == (0, 4, 5, 6, 7)
    both = explicit_schedule(full, keep=[0, 1, 7], drop=[3])
    assert both.prefill == both.decode
    assert both.union == (0, 1, 7)
    assert both.origin["criterion"] == "explicit"


def test_layers_that_the_user_names_wrongly() -> None:
    full = full_schedule(large()[0])
    with pytest.raises(BudgetError, match="there is no layer 8"):
        explicit_schedule(full, keep=[0, 8])
    with pytest.raises(BudgetError, match="layer 1 is both kept and dropped"):
        explicit_schedule(full, keep=[0, 1], drop=[1, 2])
    with pytest.raises(BudgetError, match="no layer is left"):
        explicit_schedule(full, drop=range(8))


def test_the_origin_says_how_it_came_about() -> None:
    origin = plan(prefill=0.5, decode=1.0).origin
    assert origin["keep_prefill"] == 0.5
    assert origin["phases"] == "split"
    assert origin["alpha"] == 0.8
    assert origin["calibration"] == "sha256:default1"
