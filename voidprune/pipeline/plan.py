"""What a user asks a schedule to be, and the schedule: by ranking, by search, by a bound on loss, or layer by layer.

What runs a model is imported where it is used: a ranking needs none, and so neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from voidprune.demo.tasks import TASKS
from voidprune.errors import BudgetError
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.sizes import ModelSizes
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.tasks import find_rows
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import find_criterion
from voidprune.planning.planner import explicit_schedule, plan_schedule, probed_schedule
from voidprune.planning.search import SEARCHES
from voidprune.profiling.calibration import Row, default_rows
from voidprune.profiling.profile import Profile
from voidprune.schedule import Boundary, ModelIdentity, Schedule, full_schedule

if TYPE_CHECKING:
    from voidprune.pipeline.planning import FreePart
    from voidprune.pipeline.probe import HarmlessDepths
    from voidprune.pipeline.trials import Trials

NUM_JUDGING = 400
"""Items to judge a goal by, of a file or of each task: enough to exclude a loss of 1 % where one or two are lost."""


@dataclass(frozen=True)
class Calibrated:
    """Items to run the model on, the first `num_samples` of a file or of each task; to judge by, `num_judging`.

    `dataset` and `judging` are files or tasks; None is the prompts that ship with the package, and every second sample of the
    dataset.
    """

    dataset: str | None = None
    judging: str | None = None
    responses: str = "generate"
    num_samples: int | None = None
    num_judging: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    dtype: str | None = None
    device: str | None = None

    def rows(self) -> list[Row]:
        if self.dataset is None:
            return default_rows()[: self.num_samples]
        return find_rows(self.dataset, num_items=self.num_samples, split="calibration")

    def judging_rows(self) -> list[Row] | None:
        """Rows to judge by; generated tasks have a split of their own."""
        num_items = self.num_judging
        if self.judging is None and self.dataset in ("demo", *TASKS):
            return find_rows(self.dataset, split="validation", num_items=num_items)
        return None if self.judging is None else find_rows(self.judging, split="validation", num_items=num_items)


@dataclass(frozen=True)
class PlanRequest:
    """How layers are to be chosen. Exactly one way: layers by name, a probe, a goal, or a criterion within a budget.

    `criterion` None is "lac" where there is a profile, else "auto". Raises BudgetError where ways are mixed.
    """

    budget: Budget = Budget()  # noqa: RUF009  a frozen value
    criterion: str | None = None
    goal: str | None = None
    max_loss: float | None = None
    keep_layers: frozenset[int] | None = None
    drop_layers: frozenset[int] | None = None
    boundary: Boundary = Boundary.DECODE
    single_turn: bool = False
    search_evaluations: int | None = None
    seed: int = 0
    calibrated: Calibrated = Calibrated()
    probe: HarmlessDepths | None = None

    def __post_init__(self) -> None:
        if self.probe is not None and (
            self.is_free or self.budget != Budget() or self.criterion is not None or self.keep_layers is not None
        ):
            raise BudgetError(
                "a probe says by itself what may go, and where",
                hint="leave out --keep, limits, layers, --criterion and --goal, or --from-probe",
            )
        if self.probe is not None and self.boundary is not Boundary.DECODE:
            raise BudgetError("a probe leaves the last prompt token alone", hint="leave out --boundary prefill")
        said = self.budget.is_limited or self.budget.shared or self.criterion is not None
        if self.is_free and (said or self.keep_layers is not None):
            raise BudgetError(
                "a goal finds out by itself how many layers may go, and which",
                hint="leave out --keep, limits, --phases and --criterion, or --goal and --max-loss",
            )
        if self.keep_layers is not None and (said or self.budget.protected):
            raise BudgetError("--keep-layers says all about the layers", hint="leave out the other limits")
        if not self.is_free and not self.is_explicit and not self.budget.is_limited:
            raise BudgetError(
                "nothing says how small the schedule is to be",
                hint="give --keep, --max-bytes or another limit, --drop-layers, or --goal",
            )
        if self.max_loss is not None and not 0 < self.max_loss < 1:
            raise BudgetError(f"a loss of {self.max_loss:g} is outside of (0, 1)", hint="--max-loss 0.01 allows 1 %")

    @property
    def is_free(self) -> bool:
        """Whether the size is to be found, not given."""
        return self.goal is not None or self.max_loss is not None

    @property
    def is_explicit(self) -> bool:
        """Whether the layers are named one by one, so that nothing is left to choose."""
        return (
            self.probe is not None
            or self.keep_layers is not None
            or (self.drop_layers is not None and self.criterion is None and not self._limits_more)
        )

    @property
    def _limits_more(self) -> bool:
        return replace(self.budget, dropped=frozenset()).is_limited

    def runs_model(self, *, has_profile: bool) -> bool:
        """Whether the model itself has to be run to answer."""
        if self.is_free or self.is_explicit:
            return self.is_free
        criterion = self.criterion or ("lac" if has_profile else "auto")
        return criterion in SEARCHES or (find_criterion(criterion).needs_profile and not has_profile)


@dataclass(frozen=True)
class Planned:
    """A schedule, the sizes of its model, and what was found on the way."""

    schedule: Schedule
    sizes: ModelSizes
    profile: Profile | None = None
    free: FreePart | None = None


def plan_from_profile(request: PlanRequest, profile: Profile) -> Planned:
    """Plan without the model. Raises BudgetError, also where the request needs the model."""
    if request.runs_model(has_profile=True):
        raise BudgetError(
            f"{request.criterion or 'a goal'} has to run the model", hint="give the model in place of the profile"
        )
    return Planned(_plan_ranked(request, profile.model, profile, profile.sizes), profile.sizes, profile)


def plan_from_model(
    request: PlanRequest,
    checkpoint: Checkpoint,
    *,
    sizes: ModelSizes,
    profile: Profile | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> Planned:
    """Plan with the model at hand; a profile that is needed and not given is made on the way.

    A search keeps what it has done beside `output`, so that a run that was killed goes on. Raises every VoidpruneError.
    """
    request.budget.check_layers(checkpoint.architecture.num_layers)
    criterion = request.criterion or ("lac" if profile is not None else "auto")
    if not request.is_free and (request.is_explicit or criterion not in SEARCHES):
        if request.runs_model(has_profile=profile is not None):
            profile = make_profile(request.calibrated, checkpoint, track)
        return Planned(_plan_ranked(request, checkpoint.identity, profile, sizes), sizes, profile)
    whole = replace(full_schedule(checkpoint.identity, boundary=request.boundary), single_turn=request.single_turn)
    if not request.is_free and profile is None:
        profile = make_profile(request.calibrated, checkpoint, track)
    calibrated = request.calibrated
    if request.is_free and calibrated.num_judging is None:
        calibrated = replace(calibrated, num_judging=NUM_JUDGING)
    trials = open_trials_for(calibrated, checkpoint, whole, sizes=sizes, judges=request.is_free, track=track)
    key = {**trials.key, "criterion": criterion, "goal": str(request.goal)}
    with Journal(output, key=key, overwrite=overwrite) as journal:
        if request.is_free:
            from voidprune.pipeline.planning import find_free_schedule

            free = find_free_schedule(
                trials,
                goal=request.goal or "balanced",
                max_loss=request.max_loss or 0.01,
                protected=request.budget.protected,
                journal=journal,
                track=track,
            )
            planned = Planned(free.schedule, sizes, profile, free)
        else:
            planned = Planned(_search(request, criterion, trials, profile, journal, track), sizes, profile)
        journal.remove()
    return planned


def open_trials_for(
    calibrated: Calibrated,
    checkpoint: Checkpoint,
    whole: Schedule,
    *,
    sizes: ModelSizes,
    judges: bool = True,
    track: Track = untracked,
) -> Trials:
    from voidprune.pipeline.trials import open_trials

    return open_trials(
        checkpoint,
        calibrated.rows(),
        calibrated.judging_rows(),
        whole=whole,
        sizes=sizes,
        judges=judges,
        responses=calibrated.responses,
        max_new_tokens=calibrated.max_new_tokens,
        batch_size=calibrated.batch_size,
        dtype=calibrated.dtype,
        device=calibrated.device,
        track=track,
    )


def _search(
    request: PlanRequest,
    criterion: str,
    trials: Trials,
    profile: Profile | None,
    journal: Journal,
    track: Track,
) -> Schedule:
    from voidprune.pipeline.planning import propose_schedules, search_budget

    proposals = propose_schedules(trials, profile, request.budget, seed=request.seed)
    found = search_budget(
        trials,
        request.budget,
        objective="task" if criterion == "search-task" else "loss",
        proposals=list(proposals.values()),
        greedy=criterion != "auto",
        max_evaluations=0 if criterion == "auto" and request.search_evaluations is None else request.search_evaluations,
        journal=journal,
        track=track,
    )
    names = [name for name, schedule in proposals.items() if schedule.actions_equal(found.schedule)]
    origin = {**found.schedule.origin, "criterion": criterion}
    return replace(found.schedule, origin={**origin, "equals": ", ".join(names)} if names else origin)


def _plan_ranked(request: PlanRequest, model: ModelIdentity, profile: Profile | None, sizes: ModelSizes) -> Schedule:
    full = replace(full_schedule(model, boundary=request.boundary), single_turn=request.single_turn)
    if request.probe is not None:
        if request.probe.model.fingerprint != model.fingerprint:
            raise BudgetError(
                f"the probe is of {request.probe.model.name}, not of {model.name}", hint="probe the model itself"
            )
        schedule = probed_schedule(full, freeze=request.probe.freeze, skip_attention=request.probe.skip_attention)
        return replace(schedule, origin={**schedule.origin, "margin": request.probe.margin})
    if request.is_explicit:
        return explicit_schedule(full, keep=request.keep_layers, drop=request.drop_layers)
    return plan_schedule(
        model,
        profile,
        criterion=request.criterion or "lac",
        budget=request.budget,
        sizes=sizes,
        boundary=request.boundary,
        single_turn=request.single_turn,
        seed=request.seed,
    )


def make_profile(calibrated: Calibrated, checkpoint: Checkpoint, track: Track) -> Profile:
    from voidprune.pipeline.profile import profile_model

    context = checkpoint.architecture.context_length
    return profile_model(
        checkpoint,
        calibrated.rows(),
        responses=calibrated.responses,
        max_new_tokens=min(calibrated.max_new_tokens, context // 2),
        dtype=calibrated.dtype,
        device=calibrated.device,
        track=track,
    )
