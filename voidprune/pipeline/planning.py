"""A budget, or a bound on what may be lost, becomes a schedule by trying schedules on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from voidprune.errors import BudgetError, DatasetError
from voidprune.journal import Journal
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.trials import Trials
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.planner import plan_schedule
from voidprune.planning.search import (
    BOTH,
    Search,
    Step,
    drop_unread,
    estimate_evaluations,
    search_schedule,
)
from voidprune.profiling.profile import Profile
from voidprune.quality.noninferiority import MIN_SAMPLES, Comparison, compare_items, num_items_needed, perplexity_loss
from voidprune.schedule import Phase, Scalar, Schedule

SUSPECT, HOPELESS = 1, 10
"""A schedule that loses this many times the bound on the very samples that it was chosen by is not judged; there a path ends."""


def propose_schedules(trials: Trials, profile: Profile | None, budget: Budget, *, seed: int = 0) -> dict[str, Schedule]:
    """What every ranking criterion makes of a budget; those that cannot meet it are left out."""
    proposals = {}
    for name, criterion in CRITERIA.items():
        if criterion.needs_profile and profile is None:
            continue
        try:
            schedule = plan_schedule(
                trials.checkpoint.identity,
                profile,
                criterion=name,
                budget=budget,
                sizes=trials.sizes,
                boundary=trials.whole.boundary,
                single_turn=trials.whole.single_turn,
                seed=seed,
            )
        except BudgetError:
            continue
        if budget.overshoot(schedule, trials.sizes) == 0:
            proposals[name] = schedule
    return proposals


def search_budget(
    trials: Trials,
    budget: Budget,
    *,
    objective: str = "loss",
    proposals: Sequence[Schedule] = (),
    greedy: bool = True,
    max_evaluations: int | None = None,
    journal: Journal | None = None,
    track: Track = untracked,
) -> Step:
    """The best schedule within a budget that a search finds, and its value on the choosing samples.

    Without `greedy`, the best of the proposals, refined. Raises BudgetError.
    """
    budget.check_layers(trials.whole.num_layers)
    total = estimate_evaluations(budget, trials.whole.num_layers) if greedy else len(proposals)
    with track(f"searching by {objective}", total, "schedules") as advance:
        search = Search(
            trials.objective(objective, journal=journal),
            budget,
            sizes=trials.sizes,
            sublayers=True,
            on_evaluation=lambda: advance(1),
        )
        found = search_schedule(
            search, trials.whole if greedy else None, proposals=proposals, max_evaluations=max_evaluations
        )
    origin: dict[str, Scalar] = {"criterion": f"search-{objective}", **budget.to_origin()}
    return replace(found, schedule=replace(found.schedule, origin=origin))


@dataclass(frozen=True)
class FreePart:
    """The smallest schedule that stays within the bound, and how it compares with the whole model on the judging samples.

    `parts` holds the same for each phase apart where both were cut.
    """

    schedule: Schedule
    comparison: Comparison
    parts: Mapping[str, tuple[Schedule, Comparison]]


def find_free_schedule(
    trials: Trials,
    *,
    goal: str,
    max_loss: float = 0.01,
    protected: frozenset[int] = frozenset(),
    journal: Journal | None = None,
    track: Track = untracked,
) -> FreePart:
    """The smallest schedule that is no worse than the whole model, up to `max_loss` of its perplexity and accuracy.

    Layers, and in a second run also sublayers, are left out one by one, always what raises the loss of the choosing samples
    least for what it saves: arithmetic of the prompt (fast-prompt), bytes (small), or bytes read per output token after the first
    (balanced). The schedules on the way are then judged on the judging samples, the cheapest first, with one-sided 95 % bounds,
    and the first within the bound is returned. Sublayers save no bytes of the checkpoint, so `small` leaves out whole layers.
    Raises DatasetError where the judging samples are too few for the bound.
    """
    _check_items(trials, max_loss)
    run = _FreeRun(trials, max_loss, protected, Journal() if journal is None else journal, track)
    match goal:
        case "fast-prompt":
            schedule, comparison = run.shrink(trials.whole, (Phase.PREFILL,))
            parts: dict[str, tuple[Schedule, Comparison]] = {}
        case "small":
            schedule, comparison = run.shrink(trials.whole, BOTH)
            parts = {}
        case _:
            parts = {str(phase): run.shrink(trials.whole, (phase,)) for phase in BOTH}
            schedule, comparison = run.shrink(parts["prefill"][0], (Phase.DECODE,))
    origin: dict[str, Scalar] = {
        "criterion": "search-loss",
        "goal": goal,
        "max_loss": max_loss,
        "perplexity_loss_upper": round(comparison.perplexity.upper, 6),
    }
    return FreePart(replace(schedule, origin=origin), comparison, parts)


def _check_items(trials: Trials, max_loss: float) -> None:
    """Raise DatasetError where the judging samples could not even show that the whole model is as good as itself."""
    if len(trials.judging) < MIN_SAMPLES:
        raise DatasetError(
            f"{len(trials.judging)} samples are too few to judge a loss by", hint=f"give {MIN_SAMPLES} or more"
        )
    right = trials.judge.grade(trials.whole).right
    for task, items in trials.groups.items() if right is not None else ():
        assert right is not None
        share = float(right[items].mean())
        if not share:
            raise DatasetError(
                f"the whole model gets no item of {task} right, so it has nothing to lose there",
                hint="leave that task out",
            )
        needed = num_items_needed(max_loss * share)
        if len(items) < needed:
            raise DatasetError(
                f"{len(items)} items of {task} cannot show that at most {max_loss:.1%} is lost",
                hint=f"give {needed} or more to judge by, or a larger --max-loss",
            )


@dataclass(frozen=True)
class _FreeRun:
    trials: Trials
    max_loss: float
    protected: frozenset[int]
    journal: Journal
    track: Track

    def shrink(self, start: Schedule, phases: Sequence[Phase]) -> tuple[Schedule, Comparison]:
        """Cut the phases (both alike where there are two) as far as the bound allows: the cheapest that holds."""
        budget = self._wish(phases)
        steps = [step for sublayers in (False, True) for step in self._path(start, phases, budget, sublayers=sublayers)]
        steps.sort(key=lambda step: budget.overshoot(step.schedule, self.trials.sizes))
        with self.track("judging", len(steps), "schedules") as advance:
            for step in steps:
                advance(1)
                if self._loss_is_too_high(step.schedule):
                    continue  # without a look at the answers, which takes longer
                comparison = self.compare(step.schedule)
                if comparison.holds:
                    return drop_unread(step.schedule, protected=self.protected), comparison
        return start, self.compare(start)

    def compare(self, schedule: Schedule) -> Comparison:
        """A schedule beside the whole model, on the judging samples."""
        whole, pruned = (self.trials.judge.grade(one) for one in (self.trials.whole, schedule))
        return compare_items(
            self.max_loss,
            whole=(whole.likelihoods.nll, whole.right),
            pruned=(pruned.likelihoods.nll, pruned.right),
            num_tokens=whole.likelihoods.num_tokens,
            groups=self.trials.groups,
        )

    def _loss_is_too_high(self, schedule: Schedule) -> bool:
        whole, pruned = (self.trials.judge.measure(one) for one in (self.trials.whole, schedule))
        return perplexity_loss(whole.nll, pruned.nll, whole.num_tokens).upper > self.max_loss

    def _wish(self, phases: Sequence[Phase]) -> Budget:
        """A limit that nothing meets, in the unit that leaving out is to save."""
        return Budget(
            max_prefill_flops=1 if tuple(phases) == (Phase.PREFILL,) else None,
            max_decode_bytes=1 if tuple(phases) == (Phase.DECODE,) else None,
            max_bytes=1 if len(phases) > 1 else None,
            protected=self.protected,
            shared=len(phases) > 1,
        )

    def _path(self, start: Schedule, phases: Sequence[Phase], budget: Budget, *, sublayers: bool) -> Iterator[Step]:
        """Greedy steps, until nothing or no hope is left; those that the choosing samples do not rule out."""
        what = "layers and sublayers" if sublayers else "layers"
        total = estimate_evaluations(budget, start.num_layers)
        with self.track(f"leaving out {what} of {' and '.join(phases)}", total, "schedules") as advance:
            search = Search(
                self.trials.objective("loss", journal=self.journal),
                budget,
                sizes=self.trials.sizes,
                sublayers=sublayers,
                phases=phases,
                on_evaluation=lambda: advance(1),
            )
            whole, step = search.measure(self.trials.whole), search.measure(start)
            while step.value - whole.value <= HOPELESS * self.max_loss:
                try:
                    step = search.cut(step)
                except BudgetError:  # nothing is left to leave out
                    return
                if step.value - whole.value <= SUSPECT * self.max_loss:
                    yield step
