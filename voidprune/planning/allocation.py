"""Scores and a budget in several units at once become the best set of layers: a small integer programme, solved by HiGHS.

For every layer one of four: it runs in both phases, in prefill only, in decode only, or in neither. The sum of scores is
maximised; what each choice saves is read off `planning.costs`, so that no cost is written down twice. No torch here.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voidprune.errors import BudgetError
from voidprune.models.sizes import ModelSizes
from voidprune.planning.budgets import Budget, spent
from voidprune.schedule import LayerAction, Phase, Schedule, satisfy_kv_contract

# (runs in prefill, runs in decode)
CHOICES = ((True, True), (True, False), (False, True), (False, False))
Runs = tuple[bool, bool]

_SOLVED = 0  # scipy.optimize.OptimizeResult.status
_MAX_ROUNDS = 20


def allocate_layers(
    scores: Mapping[Phase, Sequence[float]], full: Schedule, budget: Budget, sizes: ModelSizes
) -> Schedule:
    """The schedule of whole layers with the greatest sum of scores within the budget.

    `full` is the unpruned model, with the boundary and single_turn that the result is to have. Scores are made comparable by
    stretching each phase's to [0, 1]; of equal ones the earlier layer is kept. Raises BudgetError where nothing is within the
    budget, naming the nearest that is.
    """
    assert len(budget.dropped) < full.num_layers, "the planner refuses to drop everything"
    allowed = _allowed(full, budget)
    values = _values(scores, full.num_layers)
    limits = budget.limits(full.num_layers)
    worth = values.reshape(allowed.shape)
    best: tuple[float, list[Runs]] | None = None
    for case in _cases(full, sizes, limits, allowed):
        if best is not None and best[0] >= np.where(case.allowed, worth, 0).max(axis=1).sum():
            break  # cases have fewer and fewer layers: no later one can be worth more
        if (runs := _fit(values, case)) is not None:
            value = float(sum(worth[layer, CHOICES.index(run)] for layer, run in enumerate(runs)))
            if best is None or value > best[0]:
                best = value, runs
    if best is None:
        raise _infeasible(full, budget, sizes, allowed)
    return _build(full, best[1])


@dataclass(frozen=True)
class _Case:
    """A problem in which costs add up: `changes[name]`, [L * choices], is what each choice of a layer changes of `whole[name]`."""

    full: Schedule
    sizes: ModelSizes
    limits: Mapping[str, int]
    allowed: np.ndarray[Any, Any]
    whole: Mapping[str, int]
    changes: Mapping[str, Sequence[int]]

    def spend(self, runs: Sequence[Runs]) -> dict[str, int]:
        return spent(_build(self.full, runs), self.sizes)


def _cases(
    full: Schedule, sizes: ModelSizes, limits: Mapping[str, int], allowed: np.ndarray[Any, Any]
) -> Iterator[_Case]:
    """The problem in parts within which costs add up, those with the most layers first.

    All do but prefill FLOPs: the last layer that writes K/V is cheaper than the others. So where those are limited there is a
    case for each layer that may be the last to stay.
    """
    num_layers = full.num_layers
    final = num_layers - 1
    below = [_changes(full, sizes, limits, layer, last=final) for layer in range(final)]
    stays = [choice != (False, False) for choice in CHOICES]
    for last in range(final, -1, -1) if "prefill FLOPs" in limits else (final,):
        narrowed = allowed.copy()
        if "prefill FLOPs" in limits:
            narrowed[last] &= stays
            narrowed[last + 1 :] &= np.logical_not(stays)
        if not narrowed.any(axis=1).all():
            continue
        nothing = [dict.fromkeys(limits, 0)] * len(CHOICES)
        layers = [*below[:last], _changes(full, sizes, limits, last, last=last), *[nothing] * (final - last)]
        changes = {name: [choice[name] for layer in layers for choice in layer] for name in limits}
        yield _Case(full, sizes, limits, narrowed, spent(_build(full, _most(full, last)), sizes), changes)


def _most(full: Schedule, last: int) -> list[Runs]:
    return [(layer <= last, layer <= last) for layer in range(full.num_layers)]


def _changes(
    full: Schedule, sizes: ModelSizes, limits: Mapping[str, int], layer: int, *, last: int
) -> list[dict[str, int]]:
    """What each choice of a layer changes of what the model costs that has all layers up to `last`."""
    most = _most(full, last)
    whole = spent(_build(full, most), sizes)
    changes = []
    for choice in CHOICES:
        runs = [*most[:layer], choice, *most[layer + 1 :]]
        # A phase without any layer is no schedule; `_solve` excludes it whatever it costs.
        possible = all(any(phase) for phase in zip(*runs, strict=True))
        costs = spent(_build(full, runs), sizes) if possible else whole
        changes.append({name: costs[name] - whole[name] for name in limits})
    return changes


def _fit(values: np.ndarray[Any, Any], case: _Case) -> list[Runs] | None:
    """The best choices of a case, or None. The solver allows for rounding; the budget does not."""
    aims = dict(case.limits)
    for _ in range(_MAX_ROUNDS):
        runs = _solve(values, case, aims)
        if runs is None:
            return None
        costs = case.spend(runs)
        missed = {name: costs[name] - limit for name, limit in case.limits.items()}
        if all(amount <= 0 for amount in missed.values()):
            return runs
        aims = {name: aims[name] - max(0, missed[name]) for name in aims}
    return None


def _infeasible(full: Schedule, budget: Budget, sizes: ModelSizes, allowed: np.ndarray[Any, Any]) -> BudgetError:
    """The error that names the nearest budget that can be met: all limits raised by the same share, as little as possible."""
    limits = budget.limits(full.num_layers)
    zeros = np.zeros(full.num_layers * len(CHOICES))
    nearest: dict[str, int] = {}
    for case in _cases(full, sizes, limits, allowed):
        runs = _solve(zeros, case, limits, slack=True)
        if runs is None:
            continue
        costs = case.spend(runs)
        if not nearest or _excess(costs, limits) < _excess(nearest, limits):
            nearest = costs
    assert nearest, "with enough slack any schedule is within every limit"
    asked = ", ".join(f"{limit:,} {name}" for name, limit in limits.items() if nearest[name] > limit)
    named = ", ".join(f"{nearest[name]:,} {name}" for name in limits)
    return BudgetError(f"no schedule is within {asked}", hint=f"the nearest that there is: {named}")


def _excess(costs: Mapping[str, int], limits: Mapping[str, int]) -> float:
    """The greatest share by which a limit is exceeded."""
    return max(costs[name] / limit for name, limit in limits.items())


def _allowed(full: Schedule, budget: Budget) -> np.ndarray[Any, Any]:
    """Which choice a layer has, bool [L, choices]."""
    allowed = np.ones((full.num_layers, len(CHOICES)), dtype=bool)
    for layer in budget.protected:
        allowed[layer] = [choice == (True, True) for choice in CHOICES]
    for layer in budget.dropped:
        allowed[layer] = [choice == (False, False) for choice in CHOICES]
    if budget.shared:
        allowed &= [one == other for one, other in CHOICES]
    return allowed


def _values(scores: Mapping[Phase, Sequence[float]], num_layers: int) -> np.ndarray[Any, Any]:
    """What each choice is worth, [L * choices]: a phase's best layer 1, its worst a little more than nothing."""
    worth = {}
    for phase in Phase:
        values = np.asarray(scores[phase], dtype=float)
        spread = float(np.ptp(values)) or 1.0
        earlier_first = 1e-6 * (1 - np.arange(num_layers) / num_layers)
        worth[phase] = (values - values.min()) / spread + 1e-3 + earlier_first
    return np.array(
        [
            prefill * worth[Phase.PREFILL][layer] + decode * worth[Phase.DECODE][layer]
            for layer in range(num_layers)
            for prefill, decode in CHOICES
        ]
    )


def _solve(
    values: np.ndarray[Any, Any], case: _Case, limits: Mapping[str, int], *, slack: bool = False
) -> list[Runs] | None:
    """The best choice of every layer, or None where there is none within the limits.

    With `slack`, the choice for which the limits have to be raised least, all by the same share.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_layers, num_choices = case.allowed.shape
    num_variables = num_layers * num_choices + 1  # the last one is the slack, a share of every limit
    one_each = np.zeros((num_layers, num_variables))
    for layer in range(num_layers):
        one_each[layer, layer * num_choices : (layer + 1) * num_choices] = 1
    runs = np.zeros((2, num_variables))
    runs[:, :-1] = np.tile(np.array(CHOICES).T, num_layers)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(runs, 1, np.inf),  # a phase runs at least one layer
    ]
    for name, changes in case.changes.items():
        # In units in which costs are small whole numbers, so that the solver's rounding is no layer.
        unit = math.gcd(*changes) or 1
        left = (limits[name] - case.whole[name]) / unit
        row = [*(change // unit for change in changes), -case.limits[name] / unit]
        constraints.append(LinearConstraint(np.array([row]), -np.inf, left if slack else math.floor(left)))
    with silent_stdout():
        found = milp(
            np.append(-values, 1.0),
            integrality=np.append(np.ones(num_variables - 1), 0),
            bounds=Bounds(0, np.append(case.allowed.ravel().astype(float), np.inf if slack else 0.0)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.status != _SOLVED:
        return None
    best = found.x[:-1].reshape(case.allowed.shape).argmax(axis=1)
    return [CHOICES[choice] for choice in best]


@contextlib.contextmanager
def silent_stdout() -> Iterator[None]:
    """Nothing that C code prints to stdout in the block arrives there.

    HiGHS, as scipy 1.17 has it, prints a line of its own debugging, whatever it is told: github.com/ERGO-Code/HiGHS/issues/2783.
    """
    c_library = ctypes.CDLL(None)
    try:
        stdout = os.dup(1)
    except OSError:  # closed: nothing arrives anyway
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            c_library.fflush(None)  # what was printed before the block
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        c_library.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def _build(full: Schedule, runs: Sequence[Runs]) -> Schedule:
    actions = [
        [LayerAction.FULL if layer[number] else LayerAction.SKIP for layer in runs] for number in range(len(Phase))
    ]
    prefill, decode = satisfy_kv_contract(actions[0], actions[1], single_turn=full.single_turn)
    return replace(full, prefill=prefill, decode=decode)
