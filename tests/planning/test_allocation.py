"""The integer programme against all choices tried one by one, on models small enough for that."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from voidprune.errors import BudgetError
from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.planning.allocation import CHOICES, allocate_layers, silent_stdout
from voidprune.planning.budgets import Budget, spent
from voidprune.planning.planner import plan_schedule
from voidprune.schedule import (
    Boundary,
    LayerAction,
    ModelIdentity,
    Phase,
    Schedule,
    full_schedule,
    satisfy_kv_contract,
)

LIMIT_OF = {
    "layers in prefill": "keep_prefill",
    "layers in decode": "keep_decode",
    "bytes": "max_bytes",
    "K/V bytes per token": "max_kv_bytes_per_token",
    "prefill FLOPs": "max_prefill_flops",
    "decode bytes": "max_decode_bytes",
}


def identity(num_layers: int) -> ModelIdentity:
    return ModelIdentity("tiny", "llama", num_layers, "sha256:abc")


@st.composite
def sizes_of(draw: st.DrawFn, num_layers: int) -> ModelSizes:
    """Layers of different sizes, as few real models have them: what is taken for granted shows."""
    layers = []
    for _ in range(num_layers):
        kv, rest, mlp = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 80))
        layers.append(LayerSizes(2 * (kv + rest + mlp), 2 * (kv + rest), 2 * kv, 2 * mlp, kv + rest, kv, mlp))
    return ModelSizes(tuple(layers), draw(st.integers(0, 300)), 30, 15, draw(st.integers(2, 9)), 4)


def build(full: Schedule, runs: Sequence[tuple[bool, bool]]) -> Schedule:
    actions = [[LayerAction.FULL if layer[phase] else LayerAction.SKIP for layer in runs] for phase in range(2)]
    prefill, decode = satisfy_kv_contract(*actions, single_turn=full.single_turn)
    return replace(full, prefill=prefill, decode=decode)


def every_schedule(full: Schedule, budget: Budget) -> Iterator[Schedule]:
    """Every schedule of whole layers that the budget allows."""
    for runs in itertools.product(CHOICES, repeat=full.num_layers):
        if (
            all(any(layer[phase] for layer in runs) for phase in range(2))
            and all(runs[layer] == (True, True) for layer in budget.protected)
            and all(runs[layer] == (False, False) for layer in budget.dropped)
            and (not budget.shared or all(one == other for one, other in runs))
        ):
            yield build(full, runs)


def total_score(scores: Mapping[Phase, Sequence[float]], schedule: Schedule) -> float:
    """The sum that is maximised: each phase's scores stretched to [0, 1]."""
    total = 0.0
    for phase in Phase:
        low, high = min(scores[phase]), max(scores[phase])
        for score, action in zip(scores[phase], schedule.actions(phase), strict=True):
            total += ((score - low) / ((high - low) or 1.0)) * action.executes
    return total


@st.composite
def problems(draw: st.DrawFn, names: Sequence[str]) -> tuple[dict[Phase, list[float]], Schedule, Budget, ModelSizes]:
    num_layers = draw(st.integers(2, 4))
    single_turn, boundary = draw(st.booleans()), draw(st.sampled_from(Boundary))
    full = replace(full_schedule(identity(num_layers), boundary=boundary), single_turn=single_turn)
    sizes = draw(sizes_of(num_layers))
    # Scores that differ clearly, so that no two choices are equal but for the tie break.
    scores = {phase: [float(score) for score in draw(st.permutations(range(num_layers)))] for phase in Phase}
    whole = spent(full, sizes)
    limits = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        share = draw(st.floats(0.3, 1.0))
        limits[LIMIT_OF[name]] = share if "layers" in name else max(1, int(share * whole[name]))
    special = draw(st.permutations(range(num_layers)))
    shared = draw(st.booleans())
    if shared and {"keep_prefill", "keep_decode"} <= limits.keys():
        del limits["keep_prefill"]
    budget = Budget(
        **limits,
        shared=shared,
        protected=frozenset(special[: draw(st.integers(0, 1))]),
        dropped=frozenset(special[1 : 1 + draw(st.integers(0, 1))]),
    )
    return scores, full, budget, sizes


@settings(max_examples=60)
@given(problem=problems(list(LIMIT_OF)))
def test_no_choice_within_the_budget_scores_more(
    problem: tuple[dict[Phase, list[float]], Schedule, Budget, ModelSizes],
) -> None:
    scores, full, budget, sizes = problem
    allowed = [s for s in every_schedule(full, budget) if budget.overshoot(s, sizes) == 0]
    if not allowed:
        with pytest.raises(BudgetError, match="no schedule is within"):
            allocate_layers(scores, full, budget, sizes)
        return
    found = allocate_layers(scores, full, budget, sizes)
    assert any(found.actions_equal(schedule) for schedule in allowed)
    best = max(total_score(scores, schedule) for schedule in allowed)
    # A layer is worth a thousandth in itself, so that one that scores nothing is kept where that is free.
    assert total_score(scores, found) >= best - 1e-2


@settings(max_examples=60)
@given(problem=problems(list(LIMIT_OF)), name=st.sampled_from(list(LIMIT_OF)[2:]), share=st.floats(0.1, 0.99))
def test_an_impossible_budget_is_refused_with_one_that_is_possible(
    problem: tuple[dict[Phase, list[float]], Schedule, Budget, ModelSizes], name: str, share: float
) -> None:
    scores, full, budget, sizes = problem
    least = min(spent(schedule, sizes)[name] for schedule in every_schedule(full, budget))
    budget = replace(budget, **{LIMIT_OF[name]: max(1, min(least - 1, int(share * least)))})
    with pytest.raises(BudgetError, match="no schedule is within") as caught:
        allocate_layers(scores, full, budget, sizes)
    nearest = budget_of_hint(budget, caught.value.hint, full.num_layers)
    found = allocate_layers(scores, full, nearest, sizes)
    assert nearest.overshoot(found, sizes) == 0


def budget_of_hint(budget: Budget, hint: str | None, num_layers: int) -> Budget:
    """The budget with the limits that the hint names."""
    assert hint is not None
    named = re.findall(r"([\d,]*\d) ([A-Za-z/V ]+?)(?:,|$)", hint.partition(": ")[2])
    limits = {LIMIT_OF[name]: int(amount.replace(",", "")) for amount, name in named}
    assert limits.keys() == {field.name for field in fields(budget)[:6] if getattr(budget, field.name) is not None}
    shares = {name: limit / num_layers if name.startswith("keep") else limit for name, limit in limits.items()}
    if budget.shared and len(keeps := [shares[name] for name in shares if name.startswith("keep")]) > 1:
        shares |= dict.fromkeys(("keep_prefill", "keep_decode"), max(keeps))
    return replace(budget, **shares)


@settings(max_examples=40)
@given(problem=problems(["prefill FLOPs"]))
def test_prefill_arithmetic_whose_savings_do_not_add_up_is_within_its_limit_and_the_best(
    problem: tuple[dict[Phase, list[float]], Schedule, Budget, ModelSizes],
) -> None:
    scores, full, budget, sizes = problem
    allowed = [s for s in every_schedule(full, budget) if budget.overshoot(s, sizes) == 0]
    assume(allowed)
    found = allocate_layers(scores, full, budget, sizes)
    assert budget.overshoot(found, sizes) == 0
    assert total_score(scores, found) >= max(total_score(scores, schedule) for schedule in allowed) - 1e-2


def test_a_byte_less_is_a_layer_less() -> None:
    """Limits are exact, also where a byte is less than the solver's tolerance."""
    full = full_schedule(identity(4))
    layer = LayerSizes(10**9 + 7, 6 * 10**8, 10**8, 4 * 10**8, 15, 5, 10)
    sizes = ModelSizes((layer,) * 4, 50, 30, 7, 16, 4)
    scores = {phase: [3.0, 1.0, 2.0, 4.0] for phase in Phase}
    exact = 50 + 3 * (10**9 + 7)
    assert allocate_layers(scores, full, Budget(max_bytes=exact), sizes).union == (0, 2, 3)
    assert allocate_layers(scores, full, Budget(max_bytes=exact - 1), sizes).union == (0, 3)


def test_a_limit_on_nothing_keeps_everything() -> None:
    full = full_schedule(identity(3))
    sizes = ModelSizes((LayerSizes(100, 60, 20, 40, 15, 5, 10),) * 3, 50, 30, 7, 16, 4)
    scores = {phase: [0.0, 0.0, 0.0] for phase in Phase}
    assert allocate_layers(scores, full, Budget(max_bytes=350), sizes).actions_equal(full)


def test_of_equal_scores_the_earlier_layer_is_kept() -> None:
    full = full_schedule(identity(4))
    sizes = ModelSizes((LayerSizes(100, 60, 20, 40, 15, 5, 10),) * 4, 50, 30, 7, 16, 4)
    scores = {phase: [5.0, 5.0, 5.0, 5.0] for phase in Phase}
    found = allocate_layers(scores, full, Budget(max_bytes=250), sizes)
    assert found.union == (0, 1)
    # A layer that is in the checkpoint for one phase costs the other nothing.
    assert found.prefill[:2] == found.decode[:2] == (LayerAction.FULL, LayerAction.FULL)


def test_a_model_of_one_layer_is_whole_or_refused() -> None:
    full = full_schedule(identity(1))
    sizes = ModelSizes((LayerSizes(100, 60, 20, 40, 15, 5, 10),), 50, 30, 7, 16, 4)
    scores = {phase: [1.0] for phase in Phase}
    assert allocate_layers(scores, full, Budget(max_bytes=150), sizes).is_full
    with pytest.raises(BudgetError, match="no schedule is within 149 bytes") as caught:
        allocate_layers(scores, full, Budget(max_bytes=149), sizes)
    assert caught.value.hint == "the nearest that there is: 150 bytes"


def test_protected_layers_run_whole_whatever_they_score() -> None:
    full = full_schedule(identity(4))
    sizes = ModelSizes((LayerSizes(100, 60, 20, 40, 15, 5, 10),) * 4, 50, 30, 7, 16, 4)
    scores = {phase: [0.0, 1.0, 2.0, 3.0] for phase in Phase}
    found = allocate_layers(scores, full, Budget(max_bytes=250, protected=frozenset({0})), sizes)
    assert found.union == (0, 3)
    with pytest.raises(BudgetError, match="no schedule is within") as caught:
        allocate_layers(scores, full, Budget(max_bytes=250, protected=frozenset({0, 1, 2})), sizes)
    assert caught.value.hint == "the nearest that there is: 350 bytes"


def test_what_the_solver_prints_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """With these sizes and limits HiGHS 1.12, which scipy 1.17 has, prints a line of its own debugging."""
    kinds = {
        "a": LayerSizes(825687637, 918056237, 167205859, 195875028, 191132980, 9762372, 76086250),
        "b": LayerSizes(1042920208, 516363603, 57935037, 761117892, 175970493, 16004440, 189941742),
    }
    layers = tuple(kinds[kind] for kind in "ababbbbabbaaaababbabaaabaabbbbba")
    sizes = ModelSizes(layers, 10**9, 10**9, 10**8, 4096, 8192)
    budget = Budget(max_bytes=13745240532, max_decode_bytes=9026025823, max_kv_bytes_per_token=77970)
    found = plan_schedule(identity(32), None, criterion="last-n", budget=budget, sizes=sizes)
    assert spent(found, sizes)["bytes"] <= 13745240532
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""


def test_only_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    library.puts(b"before")
    with silent_stdout():
        library.puts(b"within")
    library.puts(b"after")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
