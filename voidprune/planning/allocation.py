"""Scores and a budget in several units at once become the best set of layers: a small integer programme, solved by HiGHS.

For every layer one of four: it runs in both phases, in prefill only, in decode only, or in neither. The sum of scores is
maximised; what each choice saves is read off `planning.costs`, so that no cost is written down twice. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    allowed = _allowed(full, budget)
    values = _values(scores, full.num_layers)
    limits = budget.limits(full.num_layers)
    # Savings add up but for prefill FLOPs, where the last layer that writes K/V is cheaper than the others: the limit is
    # tightened by what was missed until the schedule itself, not its estimate, is within it.
    aims = dict(limits)
    for _ in range(_MAX_ROUNDS):
        chosen = _solve(values, _costs(full, sizes, aims), aims, allowed, shared=budget.shared)
        if chosen is None:
            break
        schedule = _build(full, chosen)
        missed = {name: spent(schedule, sizes)[name] - limit for name, limit in limits.items()}
        if all(amount <= 0 for amount in missed.values()):
            return schedule
        aims = {name: aims[name] - max(0, missed[name]) for name in aims}
    raise _infeasible(full, budget, sizes, allowed)


def _infeasible(full: Schedule, budget: Budget, sizes: ModelSizes, allowed: np.ndarray[Any, Any]) -> BudgetError:
    """The error that names the nearest budget that can be met: all limits raised by the same share, as little as possible."""
    limits = budget.limits(full.num_layers)
    zeros = np.zeros(full.num_layers * len(CHOICES))
    chosen = _solve(zeros, _costs(full, sizes, limits), limits, allowed, shared=budget.shared, slack=True)
    assert chosen is not None, "with enough slack the whole model is within every limit"
    costs = spent(_build(full, chosen), sizes)
    over = {name: limit for name, limit in limits.items() if costs[name] > limit}
    asked = ", ".join(f"{limit:,} {name}" for name, limit in over.items())
    nearest = ", ".join(f"{costs[name]:,} {name}" for name in limits)
    return BudgetError(f"no schedule is within {asked}", hint=f"the nearest that there is: {nearest}")


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


def _costs(full: Schedule, sizes: ModelSizes, limits: Mapping[str, int]) -> dict[str, tuple[int, list[int]]]:
    """For each limit: what the whole model costs, and what each choice of each layer changes, [L * choices]."""
    whole = spent(full, sizes)
    changes: dict[str, list[int]] = {name: [] for name in limits}
    for layer in range(full.num_layers):
        for choice in CHOICES:
            runs = [(True, True)] * full.num_layers
            runs[layer] = choice
            costs = spent(_build(full, runs), sizes) if full.num_layers > 1 else whole
            for name in limits:
                changes[name].append(costs[name] - whole[name])
    return {name: (whole[name], changes[name]) for name in limits}


def _solve(
    values: np.ndarray[Any, Any],
    costs: Mapping[str, tuple[int, list[int]]],
    limits: Mapping[str, int],
    allowed: np.ndarray[Any, Any],
    *,
    shared: bool,
    slack: bool = False,
) -> list[Runs] | None:
    """The best choice of every layer, or None where there is none within the limits.

    With `slack`, the choice for which the limits have to be raised least, all by the same share.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_layers, num_choices = allowed.shape
    num_variables = num_layers * num_choices + 1  # the last one is the slack, a share of every limit
    one_each = np.zeros((num_layers, num_variables))
    for layer in range(num_layers):
        one_each[layer, layer * num_choices : (layer + 1) * num_choices] = 1
    runs = np.zeros((2, num_variables))
    runs[:, :-1] = np.tile(np.array(CHOICES).T, num_layers)
    rows, bounds = [], []
    for name, (whole, changes) in costs.items():
        scale = max(limits[name], 1)
        rows.append([*(change / scale for change in changes), -1.0])
        bounds.append((limits[name] - whole) / scale)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(runs, 1, np.inf),
    ]  # a phase runs at least one layer
    if rows:
        constraints.append(LinearConstraint(np.array(rows), -np.inf, np.array(bounds) + 1e-12))
    objective = np.append(-values, 1.0)
    found = milp(
        objective,
        integrality=np.append(np.ones(num_variables - 1), 0),
        bounds=Bounds(0, np.append(allowed.ravel().astype(float), np.inf if slack else 0.0)),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.status != _SOLVED:
        return None
    best = found.x[:-1].reshape(allowed.shape).argmax(axis=1)
    return [CHOICES[choice] for choice in best]


def _build(full: Schedule, runs: Sequence[Runs]) -> Schedule:
    actions = [
        [LayerAction.FULL if layer[number] else LayerAction.SKIP for layer in runs] for number in range(len(Phase))
    ]
    prefill, decode = satisfy_kv_contract(actions[0], actions[1], single_turn=full.single_turn)
    return replace(full, prefill=prefill, decode=decode)
