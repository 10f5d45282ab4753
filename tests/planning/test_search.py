"""Searches against objectives whose best schedule is known, and against all schedules tried one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import schedules
from voidprune.errors import BudgetError
from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.planning import search as search_module
from voidprune.planning.budgets import Budget, spent
from voidprune.planning.search import (
    BOTH,
    Move,
    Search,
    apply_move,
    drop_unread,
    estimate_evaluations,
    search_schedule,
    wanted,
    whole_schedule,
)
from voidprune.schedule import Boundary, LayerAction, ModelIdentity, Phase, Schedule, dropped_schedule, full_schedule

NUM_LAYERS = 6
MODEL = ModelIdentity("tiny", "llama", NUM_LAYERS, "sha256:abc")
SIZES = ModelSizes((LayerSizes(100, 60, 20, 40, 15, 5, 10),) * NUM_LAYERS, 50, 30, 7, 16, 4)
WHOLE = full_schedule(MODEL)


@dataclass
class Additive:
    """Every sublayer that is left out costs a price of its own; `curve` makes the sum convex or whatever else."""

    prices: Mapping[tuple[Phase, int, str], float]
    curve: Callable[[float], float] = lambda total: total
    asked: list[Schedule] = field(default_factory=list)
    bases: list[Schedule] = field(default_factory=list)

    def value(self, schedule: Schedule) -> float:
        self.asked.append(schedule)
        return self.curve(self.price(schedule))

    def price(self, schedule: Schedule) -> float:
        return sum(
            (not action.attends) * self.prices[phase, layer, "attention"]
            + (not action.runs_mlp) * self.prices[phase, layer, "mlp"]
            for phase in Phase
            for layer, action in enumerate(schedule.actions(phase))
        )

    def rebase(self, schedule: Schedule) -> None:
        self.bases.append(schedule)


def additive(seed: int, curve: Callable[[float], float] = lambda total: total) -> Additive:
    generator = random.Random(seed)
    places = itertools.product(Phase, range(NUM_LAYERS), ("attention", "mlp"))
    return Additive({place: generator.uniform(0.1, 1) for place in places}, curve)


def layer_price(objective: Additive, phases: tuple[Phase, ...], layer: int) -> float:
    return sum(objective.prices[phase, layer, part] for phase in phases for part in ("attention", "mlp"))


def skipped(schedule: Schedule, phase: Phase) -> set[int]:
    return {layer for layer, action in enumerate(schedule.actions(phase)) if not action.executes}


HALF = Budget(keep_prefill=0.5, keep_decode=2 / 3)


# ---- greedy


@pytest.mark.parametrize("seed", range(5))
def test_greedy_finds_the_optimum_where_costs_add_up(seed: int) -> None:
    objective = additive(seed)
    found = search_schedule(Search(objective, HALF), WHOLE, max_evaluations=0)
    for phase, count in ((Phase.PREFILL, 3), (Phase.DECODE, 2)):
        cheapest = sorted(range(NUM_LAYERS), key=lambda layer: layer_price(objective, (phase,), layer))[:count]
        assert skipped(found.schedule, phase) == set(cheapest)
    assert found.value == pytest.approx(objective.price(found.schedule))


@pytest.mark.parametrize("seed", range(5))
def test_shared_phases_lose_the_same_layers(seed: int) -> None:
    objective = additive(seed)
    budget = Budget(keep_prefill=0.5, keep_decode=0.5, shared=True)
    found = search_schedule(Search(objective, budget), WHOLE, max_evaluations=0).schedule
    cheapest = sorted(range(NUM_LAYERS), key=lambda layer: layer_price(objective, BOTH, layer))[:3]
    assert skipped(found, Phase.PREFILL) == skipped(found, Phase.DECODE) == set(cheapest)
    assert len(found.union) == 3


@pytest.mark.parametrize("seed", range(5))
def test_lazy_steps_find_what_full_ones_find_and_measure_less(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that rise as more is left out: what was once measured is a lower bound."""

    def run() -> tuple[Schedule, int]:
        search = Search(additive(seed, lambda total: total**2), Budget(keep_prefill=1 / 6, keep_decode=1 / 6))
        return search_schedule(search, WHOLE, max_evaluations=0).schedule, search.num_evaluations

    monkeypatch.setattr(search_module, "NUM_MEASURED", 10**6)
    full, num_full = run()
    monkeypatch.setattr(search_module, "NUM_MEASURED", 1)
    lazy, num_lazy = run()
    assert lazy.actions_equal(full)
    assert num_lazy < num_full


def test_a_change_that_helps_is_taken_whatever_it_saves() -> None:
    objective = additive(0)
    objective.prices = {**objective.prices, (Phase.DECODE, 3, "mlp"): -5.0}
    first = next(Search(objective, HALF).grow(Search(objective, HALF).measure(WHOLE)))
    assert skipped(first.schedule, Phase.DECODE) == {3}
    assert not skipped(first.schedule, Phase.PREFILL)


def test_every_step_starts_from_the_last_and_rebases_on_it() -> None:
    objective = additive(1)
    search = Search(objective, HALF)
    start = search.measure(WHOLE)
    steps = list(search.grow(start))
    assert [step.schedule for step in [start, *steps][:-1]] == objective.bases
    for before, after in itertools.pairwise([start, *steps]):
        gone = sum(len(skipped(after.schedule, phase) - skipped(before.schedule, phase)) for phase in Phase)
        assert gone == 1
    assert search.budget.overshoot(steps[-1].schedule, None) == 0


def test_phases_that_are_not_named_are_not_touched() -> None:
    found = search_schedule(Search(additive(2), Budget(keep_prefill=0.5), phases=(Phase.PREFILL,)), WHOLE)
    assert not skipped(found.schedule, Phase.DECODE)
    assert len(skipped(found.schedule, Phase.PREFILL)) == 3


# ---- budgets


BUDGETS = (
    HALF,
    Budget(keep_prefill=0.5, keep_decode=0.5, shared=True),
    Budget(max_bytes=400),
    Budget(max_kv_bytes_per_token=60),
    Budget(max_prefill_flops=6_000_000),
    Budget(max_decode_bytes=35_000),
    Budget(max_bytes=450, max_decode_bytes=30_000, keep_prefill=0.5),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: ",".join(budget.to_origin()))
@pytest.mark.parametrize("sublayers", [False, True])
@pytest.mark.parametrize("protected", [frozenset(), frozenset({2, 4})], ids=["free", "protected"])
def test_budgets_are_never_exceeded_and_protected_layers_never_cut(
    budget: Budget, sublayers: bool, protected: frozenset[int]
) -> None:
    budget = replace(budget, protected=protected)
    assert budget.overshoot(WHOLE, SIZES) > 0
    objective = additive(3, lambda total: total + 0.1 * total**2)
    found = search_schedule(Search(objective, budget, sizes=SIZES, sublayers=sublayers), WHOLE, max_evaluations=60)
    assert budget.overshoot(found.schedule, SIZES) == 0
    for schedule in objective.asked:
        for layer, phase in itertools.product(protected, Phase):
            assert schedule.actions(phase)[layer] is LayerAction.FULL


def test_dropped_layers_go_first_and_stay_away() -> None:
    objective = additive(4)
    objective.prices = {**objective.prices, (Phase.DECODE, 1, "mlp"): 50.0}
    budget = Budget(keep_prefill=0.5, keep_decode=0.5, dropped=frozenset({1}))
    found = search_schedule(Search(objective, budget), WHOLE, max_evaluations=100).schedule
    assert 1 not in found.union
    assert found.num_executed(Phase.PREFILL) == found.num_executed(Phase.DECODE) == 3


@pytest.mark.parametrize("sublayers", [False, True])
def test_sublayers_are_cut_for_costs_and_never_for_layers(sublayers: bool) -> None:
    actions = {LayerAction.SKIP_ATTENTION, LayerAction.SKIP_MLP, LayerAction.KV_MLP}
    counted = search_schedule(Search(additive(5), HALF, sizes=SIZES, sublayers=sublayers), WHOLE).schedule
    assert not actions & {*counted.prefill, *counted.decode}
    limit = spent(WHOLE, SIZES)["decode bytes"] - 40  # an MLP
    cost = Search(additive(5), Budget(max_decode_bytes=limit), sizes=SIZES, sublayers=sublayers)
    assert bool(actions & {*search_schedule(cost, WHOLE).schedule.decode}) is sublayers


def test_what_no_change_leads_to_is_refused() -> None:
    with pytest.raises(BudgetError, match="found no layer to leave out"):
        search_schedule(Search(additive(0), Budget(max_bytes=149), sizes=SIZES), WHOLE)
    protected = Budget(keep_decode=0.5, protected=frozenset(range(NUM_LAYERS)))
    with pytest.raises(BudgetError, match="found no layer to leave out"):
        search_schedule(Search(additive(0), protected), WHOLE)
    with pytest.raises(BudgetError, match="needs the sizes"):
        Search(additive(0), Budget(max_bytes=149))
    with pytest.raises(BudgetError, match="no proposal is within the budget"):
        search_schedule(Search(additive(0), HALF), None, proposals=[WHOLE])


def test_a_model_of_one_layer_has_nothing_to_leave_out() -> None:
    single = full_schedule(ModelIdentity("one", "llama", 1, "sha256:1"))
    objective = Additive(dict.fromkeys(itertools.product(Phase, range(1), ("attention", "mlp")), 1.0))
    assert search_schedule(Search(objective, Budget(keep_prefill=0.1)), single).schedule.is_full
    sizes = replace(SIZES, layers=SIZES.layers[:1])
    with pytest.raises(BudgetError, match="found no layer"):
        search_schedule(Search(objective, Budget(max_bytes=100), sizes=sizes), single)


# ---- proposals and refinement


def test_the_best_proposal_wins_where_greedy_is_led_astray() -> None:
    """Layers 0 and 1 are dear alone and free together."""
    objective = additive(6)

    def price(schedule: Schedule) -> float:
        gone = skipped(schedule, Phase.PREFILL)
        return 0.0 if gone == {0, 1} else 1.0 + len(gone & {0, 1})

    objective.price = price  # type: ignore[method-assign]
    budget = Budget(keep_prefill=4 / 6)
    greedy = search_schedule(Search(objective, budget), WHOLE, max_evaluations=0)
    assert greedy.value > 0
    proposal = WHOLE
    for layer in (0, 1):
        proposal = apply_move(proposal, Move(layer, (Phase.PREFILL,), LayerAction.SKIP))
    found = search_schedule(Search(objective, budget), WHOLE, proposals=[WHOLE, proposal], max_evaluations=0)
    assert found.schedule.actions_equal(proposal)


@given(seed=st.integers(0, 10**6), limit=st.integers(0, 60))
def test_refinement_is_never_worse_and_keeps_to_its_evaluations(seed: int, limit: int) -> None:
    generator = random.Random(seed)
    noise: dict[tuple[object, ...], float] = {}
    objective = additive(seed)
    objective.price = lambda schedule: noise.setdefault((schedule.prefill, schedule.decode), generator.random())  # type: ignore[method-assign]
    search = Search(objective, HALF)
    begin = search.measure(dropped_schedule(MODEL, [0, 1, 2]))
    begin_evaluations = search.num_evaluations
    found = search.refine(begin, max_evaluations=limit)
    assert found.value <= begin.value
    assert HALF.overshoot(found.schedule, None) == 0
    # A step that was begun is finished.
    assert search.num_evaluations - begin_evaluations <= limit + 2 * NUM_LAYERS
    assert limit or found == begin


def test_refinement_finds_what_greedy_missed() -> None:
    """The first step is a mistake that only the second shows; putting it back mends it."""
    objective = additive(7)
    best = {2, 5}

    def price(schedule: Schedule) -> float:
        gone = skipped(schedule, Phase.PREFILL)
        if len(gone) == 1:
            return 0.0 if gone == {3} else 0.5
        return 0.1 if gone == best else 1.0 + 0.01 * sum(gone) - 0.9 * (5 in gone)

    objective.price = price  # type: ignore[method-assign]
    budget = Budget(keep_prefill=4 / 6)
    greedy = search_schedule(Search(objective, budget), WHOLE, max_evaluations=0)
    assert 3 in skipped(greedy.schedule, Phase.PREFILL)
    refined = search_schedule(Search(objective, budget), WHOLE, max_evaluations=200)
    assert skipped(refined.schedule, Phase.PREFILL) == best


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: ",".join(budget.to_origin()))
def test_the_same_search_finds_the_same(budget: Budget) -> None:
    first, second = additive(8), additive(8)
    runs = [search_schedule(Search(one, budget, sizes=SIZES, sublayers=True), WHOLE) for one in (first, second)]
    assert runs[0] == runs[1]
    assert first.asked == second.asked


# ---- moves


@given(data=st.data())
def test_a_move_sets_what_it_says_and_nothing_else_but_writes(data: st.DataObject) -> None:
    schedule = data.draw(schedules(MODEL))
    phases = data.draw(st.sampled_from([(Phase.PREFILL,), (Phase.DECODE,), BOTH]))
    move = Move(data.draw(st.integers(0, NUM_LAYERS - 1)), phases, LayerAction.FULL)
    after = apply_move(schedule, move)
    for phase, layer in itertools.product(Phase, range(NUM_LAYERS)):
        before = wanted(schedule.actions(phase)[layer])
        expected = LayerAction.FULL if layer == move.layer and phase in phases else before
        assert wanted(after.actions(phase)[layer]) is expected
    assert (after.boundary, after.single_turn) == (schedule.boundary, schedule.single_turn)


def test_writes_that_nothing_needs_any_more_are_taken_away() -> None:
    cut = apply_move(WHOLE, Move(2, (Phase.PREFILL,), LayerAction.SKIP))
    assert cut.prefill[2] is LayerAction.KV_ONLY
    assert 2 not in apply_move(cut, Move(2, (Phase.DECODE,), LayerAction.SKIP)).union


def test_the_whole_of_a_schedule() -> None:
    like = replace(dropped_schedule(MODEL, [1]), single_turn=True)
    assert whole_schedule(like).is_full
    assert whole_schedule(like).single_turn


def test_the_estimate_is_what_greedy_steps_measure_at_most() -> None:
    for budget in (HALF, Budget(keep_prefill=0.5, keep_decode=0.5, shared=True), Budget(keep_decode=1 / 6)):
        search = Search(additive(9), budget)
        list(search.grow(search.measure(WHOLE)))
        estimate = estimate_evaluations(budget, NUM_LAYERS)
        assert estimate is not None
        assert search.num_evaluations <= estimate + 3
    assert estimate_evaluations(Budget(max_bytes=100), NUM_LAYERS) > NUM_LAYERS


def test_what_nothing_reads_is_dropped() -> None:
    assert drop_unread(WHOLE).prefill == (*WHOLE.prefill[:-1], LayerAction.KV_ONLY)
    assert drop_unread(WHOLE).decode == WHOLE.decode
    kept = frozenset({NUM_LAYERS - 1})
    assert drop_unread(WHOLE, protected=kept) == WHOLE
    at_prefill = replace(WHOLE, boundary=Boundary.PREFILL)
    assert drop_unread(at_prefill) == at_prefill
    one = apply_move(WHOLE, Move(0, BOTH, LayerAction.FULL))
    for layer in range(1, NUM_LAYERS):
        one = apply_move(one, Move(layer, BOTH, LayerAction.SKIP))
    assert drop_unread(one) == one, "prefill has to run something"
