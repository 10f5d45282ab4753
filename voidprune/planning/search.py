"""Schedules found by running the model: what is left out next is what hurts the objective least.

`search_schedule` grows the sets of both phases apart, one change at a time (SLEB, arXiv 2402.09025, with the loss as objective;
TALE, arXiv 2510.22767, with task accuracy), also from the schedules that rankings propose, and then refines the best: it puts
one change back and takes the best other in its place for as long as that helps (floating selection, Pudil et al. 1994,
doi 10.1016/0167-8655(94)90127-9). What the objective is, is not known here: `planning.objectives` has two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from voidprune.errors import BudgetError
from voidprune.models.sizes import ModelSizes
from voidprune.planning.budgets import Budget
from voidprune.schedule import Actions, Boundary, LayerAction, Phase, Schedule, full_schedule, satisfy_kv_contract

BOTH = (Phase.PREFILL, Phase.DECODE)
NUM_MEASURED = 6
"""How many changes are measured in each step at least."""
NUM_RETURNS = 3
"""How many of the best changes to take back are tried in each round of refinement."""


SEARCHES = {
    "auto": "every ranking tried on the model, the best taken and refined",
    "search-loss": "greedy by calibration loss",
    "search-task": "greedy by accuracy on the tasks of --dataset",
}
"""What `--criterion` takes beside the rankings of `criteria.CRITERIA`."""


@dataclass(frozen=True)
class Goal:
    """A way to find out how much can go at no loss: which layers may go, and what to expect of it."""

    name: str
    summary: str
    expect: str


GOALS: dict[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal(
            "fast-prompt",
            "fewer layers in prefill, all in decode",
            "time to first token falls with the layers, bytes do not; the one to use where nothing was healed",
        ),
        Goal(
            "small",
            "the same layers leave both phases",
            "bytes, K/V and time per output token fall; few layers go without healing",
        ),
        Goal(
            "balanced",
            "prefill first, then decode",
            "time to first token falls most, time per output token a little",
        ),
    )
}


class Objective(Protocol):
    """What a search minimises. `rebase` says from which schedule the next ones will differ by little."""

    def value(self, schedule: Schedule) -> float: ...

    def rebase(self, schedule: Schedule) -> None: ...


@dataclass(frozen=True)
class Step:
    """A schedule that a search went through, and its value."""

    schedule: Schedule
    value: float


@dataclass(frozen=True)
class Move:
    """One change: from now on `layer` does `action` in each of `phases`, K/V writes aside."""

    layer: int
    phases: tuple[Phase, ...]
    action: LayerAction


OnEvaluation = Callable[[], None]


class Search:
    """Greedy steps and their refinement under one budget.

    `sublayers` also allows to leave out attention or the MLP alone; that saves bytes and arithmetic, never layers.
    `num_evaluations` counts how often the objective was asked.
    """

    def __init__(
        self,
        objective: Objective,
        budget: Budget,
        *,
        sizes: ModelSizes | None = None,
        sublayers: bool = False,
        phases: Sequence[Phase] = BOTH,
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        if sizes is None and not budget.counts_only:
            raise BudgetError(
                "a budget in bytes or FLOPs needs the sizes of the model", hint="give a profile, or the model"
            )
        self.objective = objective
        self.budget = budget
        self.sizes = sizes
        self.phases = tuple(phases)
        self.parts = (
            (LayerAction.SKIP, LayerAction.SKIP_ATTENTION, LayerAction.SKIP_MLP)
            if sublayers and not budget.counts_only
            else (LayerAction.SKIP,)
        )
        self.num_evaluations = 0
        self._last_cost: dict[Move, float] = {}
        self._on_evaluation = on_evaluation

    def grow(self, start: Step) -> Iterator[Step]:
        """Change after change from `start`, until the budget is met. Raises BudgetError where no change leads there."""
        step = start
        while self._overshoot(step.schedule) > 0:
            step = self.cut(step)
            yield step

    def refine(self, best: Step, *, max_evaluations: int) -> Step:
        """Take one change back, make the best other, while that helps and `max_evaluations` are not used up.

        Meets the budget if `best` does. Never worse than `best`.
        """
        last = self.num_evaluations + max_evaluations
        while (better := self._improve(best, last)) is not None:
            best = better
        return best

    def measure(self, schedule: Schedule) -> Step:
        self.num_evaluations += 1
        if self._on_evaluation is not None:
            self._on_evaluation()
        return Step(schedule, self.objective.value(schedule))

    def _improve(self, best: Step, last: int) -> Step | None:
        """A schedule within the budget that is better than `best`; None where none was found in time."""
        self.objective.rebase(best.schedule)
        richer = []
        for move in self._returns(best.schedule):
            if self.num_evaluations >= last:
                return None
            richer.append(self.measure(apply_move(best.schedule, move)))
        for step in sorted(richer, key=lambda step: step.value)[:NUM_RETURNS]:
            while self._overshoot(step.schedule) > 0:
                if self.num_evaluations >= last:
                    return None
                step = self.cut(step)
            if step.value < best.value:
                return step
        return None

    def cut(self, step: Step) -> Step:
        """The change that costs the objective least for what it saves.

        What a change costs mostly rises as more is left out, so what it cost when it was last measured says which ones need not
        be measured again: once the best is below all old costs that are left, it is taken (Minoux 1978, "Accelerated greedy
        algorithms"). At least NUM_MEASURED are measured all the same.
        """
        before = self._overshoot(step.schedule)
        self.objective.rebase(step.schedule)
        savings: dict[Move, tuple[float, Schedule]] = {}
        for move in self._cuts(step.schedule):
            schedule = apply_move(step.schedule, move)
            if (saved := before - self._overshoot(schedule)) > 0:
                savings[move] = saved, schedule

        def price(move: Move) -> tuple[bool, float]:
            """Where a change costs nothing, the one that gains most; else the one that costs least for what it saves."""
            lost = self._last_cost[move]
            return lost > 0, lost / savings[move][0] if lost > 0 else lost

        unknown = [move for move in savings if move not in self._last_cost]
        known = sorted((move for move in savings if move in self._last_cost), key=price)
        best: tuple[tuple[bool, float], Step] | None = None
        for number, move in enumerate([*unknown, *known]):
            stale = self._last_cost.get(move)
            if best is not None and stale is not None and number >= NUM_MEASURED and best[0] <= price(move):
                break
            candidate = self.measure(savings[move][1])
            self._last_cost[move] = candidate.value - step.value
            if best is None or price(move) < best[0]:
                best = price(move), candidate
        if best is None:
            raise BudgetError(
                "the search found no layer to leave out that brings the schedule closer to its budget",
                hint="allow more, or protect fewer layers",
            )
        return best[1]

    def _cuts(self, schedule: Schedule) -> Iterator[Move]:
        """Every change that leaves out more than the schedule does, and leaves each phase a layer to run."""
        for layer in range(schedule.num_layers):
            if layer in self.budget.protected:
                continue
            for phases in self._phase_sets():
                for part in self.parts:
                    move = Move(layer, phases, part)
                    if _is_cut(schedule, move) and _runs_somewhere(schedule, move):
                        yield move

    def _returns(self, schedule: Schedule) -> Iterator[Move]:
        """Every change that makes a layer whole again."""
        for layer in range(schedule.num_layers):
            if layer in self.budget.dropped:
                continue
            for phases in self._phase_sets():
                if all(wanted(schedule.actions(phase)[layer]) is not LayerAction.FULL for phase in phases):
                    yield Move(layer, phases, LayerAction.FULL)

    def _phase_sets(self) -> tuple[tuple[Phase, ...], ...]:
        """Which phases change together. Bytes of the checkpoint and of the cache go only with both."""
        if self.budget.shared:
            return (BOTH,)
        apart = tuple((phase,) for phase in self.phases)
        together = self.budget.max_bytes is not None or self.budget.max_kv_bytes_per_token is not None
        return (*apart, BOTH) if together and len(self.phases) == len(BOTH) else apart

    def _overshoot(self, schedule: Schedule) -> float:
        return self.budget.overshoot(schedule, self.sizes)


def search_schedule(
    search: Search,
    start: Schedule | None,
    *,
    proposals: Sequence[Schedule] = (),
    max_evaluations: int | None = None,
) -> Step:
    """The best schedule within the budget that greedy steps from `start`, the proposals, and refinement lead to.

    `max_evaluations` bounds the refinement; by default it is eight for each layer. Raises BudgetError where nothing leads into
    the budget.
    """
    within = [proposal for proposal in proposals if search.budget.overshoot(proposal, search.sizes) == 0]
    found = [search.measure(proposal) for proposal in within]
    if start is not None:
        first = search.measure(_without(start, search.budget.dropped))
        found.append([first, *search.grow(first)][-1])
    if not found:
        raise BudgetError("no proposal is within the budget", hint="allow more, or search from the whole model")
    best = min(found, key=lambda step: step.value)
    bound = 8 * best.schedule.num_layers if max_evaluations is None else max_evaluations
    return search.refine(best, max_evaluations=bound)


def estimate_evaluations(budget: Budget, num_layers: int) -> int:
    """About how many schedules the greedy steps will measure, if the phases shrink alike and few changes are measured again."""
    if not budget.counts_only:  # every change once, and a few in each of as many steps as there are sublayers
        return (3 + 2 * NUM_MEASURED) * num_layers
    limits = list(budget.limits(num_layers).values())
    left = [num_layers - len(budget.dropped)] * (1 if budget.shared else len(limits))
    total = 0
    while over := [number for number, count in enumerate(left) if count > limits[number]]:
        total += sum(left[number] - len(budget.protected) for number in over)
        left[max(over, key=lambda number: left[number] - limits[number])] -= 1
    return total


def wanted(action: LayerAction) -> LayerAction:
    """An action without the K/V writes that only the other phase needs."""
    plain = {LayerAction.KV_ONLY: LayerAction.SKIP, LayerAction.KV_MLP: LayerAction.SKIP_ATTENTION}
    return plain.get(action, action)


def apply_move(schedule: Schedule, move: Move) -> Schedule:
    """The schedule after a change, with the K/V writes that it needs."""
    actions = {phase: [wanted(action) for action in schedule.actions(phase)] for phase in Phase}
    for phase in move.phases:
        actions[phase][move.layer] = move.action
    return _contracted(schedule, actions[Phase.PREFILL], actions[Phase.DECODE])


def drop_unread(schedule: Schedule, *, protected: frozenset[int] = frozenset()) -> Schedule:
    """The schedule without what nothing reads: with the boundary "decode", what prefill computes behind its last K/V.

    Every logit stays as it is. At least one layer is left to run.
    """
    if schedule.boundary is not Boundary.DECODE:
        return schedule
    final = max((layer for layer, action in enumerate(schedule.prefill) if action.writes_kv), default=-1)
    for layer in range(max(final, 0), schedule.num_layers):
        move = Move(layer, (Phase.PREFILL,), LayerAction.SKIP)
        if layer not in protected and _is_cut(schedule, move) and _runs_somewhere(schedule, move):
            schedule = apply_move(schedule, move)
    return schedule


def whole_schedule(like: Schedule) -> Schedule:
    """The unpruned model with the boundary and the turns of another schedule."""
    return replace(full_schedule(like.model, boundary=like.boundary), single_turn=like.single_turn)


def _without(schedule: Schedule, dropped: frozenset[int]) -> Schedule:
    for layer in sorted(dropped):
        schedule = apply_move(schedule, Move(layer, BOTH, LayerAction.SKIP))
    return schedule


def _contracted(schedule: Schedule, prefill: Sequence[LayerAction], decode: Sequence[LayerAction]) -> Schedule:
    actions: tuple[Actions, Actions] = satisfy_kv_contract(prefill, decode, single_turn=schedule.single_turn)
    return replace(schedule, prefill=actions[0], decode=actions[1])


def _is_cut(schedule: Schedule, move: Move) -> bool:
    """Whether a change leaves out something in each of its phases, and puts nothing back."""

    def runs(action: LayerAction) -> set[str]:
        return {name for name, on in (("attention", action.attends), ("mlp", action.runs_mlp)) if on}

    return all(runs(move.action) < runs(schedule.actions(phase)[move.layer]) for phase in move.phases)


def _runs_somewhere(schedule: Schedule, move: Move) -> bool:
    """Whether every phase still runs a layer after a change."""
    return all(
        move.action.executes
        or any(action.executes for layer, action in enumerate(schedule.actions(phase)) if layer != move.layer)
        for phase in move.phases
    )
