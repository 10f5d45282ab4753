"""Rankings and a budget become a schedule. The K/V writes that the contract needs are added here, by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from voidprune.errors import BudgetError
from voidprune.models.sizes import ModelSizes
from voidprune.planning.allocation import allocate_layers
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import Criterion, Part, find_criterion
from voidprune.profiling.profile import LayerStatistics, Profile, empty_statistics
from voidprune.schedule import (
    Boundary,
    LayerAction,
    ModelIdentity,
    Phase,
    Scalar,
    Schedule,
    full_schedule,
    satisfy_kv_contract,
)


def plan_schedule(
    model: ModelIdentity,
    profile: Profile | None,
    *,
    criterion: str,
    budget: Budget,
    sizes: ModelSizes | None = None,
    boundary: Boundary = Boundary.DECODE,
    single_turn: bool = False,
    seed: int = 0,
) -> Schedule:
    """The best layers of each phase within the budget, or with a shared budget of both phases together.

    Layers that stay run whole; of the others, what the criterion leaves out is left out. `sizes` are needed for limits other
    than layers; by default those of the profile. Raises BudgetError: an unknown criterion, one that needs a profile without
    one, a profile of another model, layers that the model does not have, a budget that nothing is within.
    """
    chosen = find_criterion(criterion)
    budget.check_layers(model.num_layers)
    if len(budget.dropped) == model.num_layers:
        raise BudgetError("no layer is left", hint="drop fewer")
    full = replace(full_schedule(model, boundary=boundary), single_turn=single_turn)
    statistics = phase_statistics(model, profile, chosen, shared=budget.shared)
    # A random choice is another one in each phase, unless the phases are one.
    seeds = {phase: seed if budget.shared else 2 * seed + number for number, phase in enumerate(Phase)}
    sizes = sizes or (profile.sizes if profile is not None else None)
    if budget.counts_only:
        limits = budget.limits(model.num_layers)
        counts = {phase: limits.get(f"layers in {phase}", model.num_layers) for phase in Phase}
        if budget.shared:
            counts = dict.fromkeys(Phase, min(counts.values()))
        schedule = _keep_layers(full, chosen, statistics, counts, seeds, budget)
    elif sizes is None:
        raise BudgetError("limits in bytes or FLOPs need the sizes of the model", hint="give a profile, or the model")
    elif chosen.score is not None and chosen.part is Part.LAYER:
        scores = {phase: chosen.score(statistics[phase], seeds[phase]) for phase in Phase}
        schedule = allocate_layers(scores, full, budget, sizes)
    else:
        schedule = _fewest_changes(full, chosen, statistics, seeds, budget, sizes)
    return replace(schedule, origin=_describe_origin(chosen, budget, profile, seed=seed))


def explicit_schedule(
    full: Schedule, *, keep: Iterable[int] | None = None, drop: Iterable[int] | None = None
) -> Schedule:
    """The layers that the user names, in both phases: those in `keep` run, those in `drop` do not. Raises BudgetError."""
    num_layers = full.num_layers
    dropped = set(drop or ()) | (set(range(num_layers)) - set(keep) if keep is not None else set())
    Budget(dropped=frozenset(set(drop or ()) | set(keep or ()))).check_layers(num_layers)
    if keep is not None and drop is not None and (both := set(keep) & set(drop)):
        raise BudgetError(f"layer {min(both)} is both kept and dropped", hint="name it in one of the two")
    if len(dropped) == num_layers:
        raise BudgetError("no layer is left", hint="keep at least one")
    actions = tuple(LayerAction.SKIP if layer in dropped else LayerAction.FULL for layer in range(num_layers))
    return replace(full, prefill=actions, decode=actions, origin={"criterion": "explicit"})


def probed_schedule(full: Schedule, *, freeze: int | None, skip_attention: int | None) -> Schedule:
    """The schedule of two interventions at once: from layer `freeze` up prompt tokens get K/V of the frozen stream only, from layer
    `skip_attention` up nothing attends in either phase. Above both a prompt needs nothing at all: no one attends to its K/V.

    Layer 0 stays whole in prefill: a schedule executes one layer. Raises BudgetError where both are None.
    """
    if freeze is None and skip_attention is None:
        raise BudgetError(
            "the probe shows neither intervention to be harmless at any depth",
            hint="probe more items, or with a larger --margin; freeze in the scope prompt, skip-attention in any",
        )
    num_layers = full.num_layers
    frozen = num_layers if freeze is None else max(1, freeze)
    silent = num_layers if skip_attention is None else skip_attention
    prefill, decode = list(full.prefill), list(full.decode)
    for layer in range(num_layers):
        if layer >= silent:
            decode[layer] = LayerAction.SKIP_ATTENTION
            prefill[layer] = LayerAction.SKIP if layer >= frozen else LayerAction.SKIP_ATTENTION
        elif layer >= frozen:
            prefill[layer] = LayerAction.KV_ONLY
    origin: dict[str, Scalar] = {"criterion": "probe", "freeze": freeze, "skip_attention": skip_attention}
    return replace(full, prefill=tuple(prefill), decode=tuple(decode), origin=origin)


def phase_statistics(
    model: ModelIdentity, profile: Profile | None, criterion: Criterion, *, shared: bool
) -> dict[Phase, LayerStatistics]:
    """What a criterion gets to see of each phase; of both together where they are shared. Raises BudgetError."""
    if profile is not None and profile.model.fingerprint != model.fingerprint:
        raise BudgetError(
            f"the profile is of {profile.model.name}, not of {model.name}", hint="profile the model itself"
        )
    if criterion.needs_profile and profile is None:
        raise BudgetError(f"criterion {criterion.name} needs a profile", hint="make one with voidprune profile")
    statistics = {
        phase: empty_statistics(model.num_layers) if profile is None else profile.statistics(phase) for phase in Phase
    }
    if shared:
        both = statistics[Phase.PREFILL] + statistics[Phase.DECODE]
        statistics = dict.fromkeys(Phase, both)
    for phase in Phase:
        if criterion.needs_profile and not statistics[phase].num_tokens:
            raise BudgetError(f"the profile has seen no token of {phase}", hint="profile with longer responses")
    return statistics


def _keep_layers(
    full: Schedule,
    criterion: Criterion,
    statistics: Mapping[Phase, LayerStatistics],
    counts: Mapping[Phase, int],
    seeds: Mapping[Phase, int],
    budget: Budget,
) -> Schedule:
    """As many layers of each phase as `counts` says; protected ones first, dropped ones never."""
    rest = {Part.LAYER: LayerAction.SKIP, Part.ATTENTION: LayerAction.SKIP_ATTENTION, Part.MLP: LayerAction.SKIP_MLP}
    actions = {}
    for phase in Phase:
        kept = _choose(criterion, statistics[phase], counts[phase], seeds[phase], budget)
        actions[phase] = [
            LayerAction.SKIP if layer in budget.dropped else LayerAction.FULL if layer in kept else rest[criterion.part]
            for layer in range(full.num_layers)
        ]
    prefill, decode = satisfy_kv_contract(actions[Phase.PREFILL], actions[Phase.DECODE], single_turn=full.single_turn)
    return replace(full, prefill=prefill, decode=decode)


def _choose(
    criterion: Criterion, statistics: LayerStatistics, count: int, seed: int, budget: Budget
) -> tuple[int, ...]:
    num_layers = statistics.num_layers
    if not budget.protected and not budget.dropped:
        return criterion.choose(statistics, count, seed=seed)
    if len(budget.protected) > count:
        raise BudgetError(
            f"{len(budget.protected)} layers are protected, but only {count} may run",
            hint="keep more, or protect fewer",
        )
    if criterion.score is None:
        raise BudgetError(
            f"criterion {criterion.name} chooses layers as a whole; it cannot protect or drop single ones",
            hint="choose another criterion",
        )
    scores = criterion.score(statistics, seed)
    free = [layer for layer in range(num_layers) if layer not in budget.protected | budget.dropped]
    ranked = sorted(free, key=lambda layer: (-scores[layer], layer))
    return tuple(sorted({*budget.protected, *ranked[: count - len(budget.protected)]}))


def _fewest_changes(
    full: Schedule,
    criterion: Criterion,
    statistics: Mapping[Phase, LayerStatistics],
    seeds: Mapping[Phase, int],
    budget: Budget,
    sizes: ModelSizes,
) -> Schedule:
    """For criteria that choose sets or sublayers: the most layers, alike in the phases that matter, that are within the budget."""
    num_layers = full.num_layers
    phases = _phases_that_matter(budget)
    for count in range(num_layers, 0, -1):
        counts = {phase: count if phase in phases else num_layers for phase in Phase}
        schedule = _keep_layers(full, criterion, statistics, counts, seeds, budget)
        if budget.overshoot(schedule, sizes) == 0:
            return schedule
    raise BudgetError(
        f"criterion {criterion.name} finds nothing within the budget", hint="allow more, or choose another criterion"
    )


def _phases_that_matter(budget: Budget) -> Sequence[Phase]:
    """Phases in which leaving something out brings a schedule nearer to its limits."""
    if budget.max_bytes is not None or budget.max_kv_bytes_per_token is not None or budget.shared:
        return tuple(Phase)
    in_prefill = budget.max_prefill_flops is not None or (budget.keep_prefill or 1) < 1
    in_decode = budget.max_decode_bytes is not None or (budget.keep_decode or 1) < 1
    return [phase for phase, matters in ((Phase.PREFILL, in_prefill), (Phase.DECODE, in_decode)) if matters]


def _describe_origin(criterion: Criterion, budget: Budget, profile: Profile | None, *, seed: int) -> dict[str, Scalar]:
    origin: dict[str, Scalar] = {"criterion": criterion.name, **budget.to_origin()}
    if criterion.name == "random":
        origin["seed"] = seed
    if profile is not None and criterion.needs_profile:
        origin["alpha"] = profile.lac.alpha
        origin["calibration"] = ", ".join(profile.calibration.fingerprints)
    return origin
