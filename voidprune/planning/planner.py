"""Scores and a budget become a schedule. The K/V writes that the contract needs are added here, by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal

from voidprune.errors import BudgetError
from voidprune.planning.criteria import find_criterion
from voidprune.profiling.profile import Profile, empty_statistics
from voidprune.schedule import (
    Actions,
    Boundary,
    LayerAction,
    ModelIdentity,
    Phase,
    Scalar,
    Schedule,
    satisfy_kv_contract,
)


def num_kept(keep: float, num_layers: int) -> int:
    """`max(1, round(keep * num_layers))`, half rounds up. Raises BudgetError outside of (0, 1]."""
    if not 0 < keep <= 1:  # NaN is outside, too
        raise BudgetError(
            f"a keep ratio of {keep:g} is outside of (0, 1]", hint="--keep 0.5 keeps half of the layers in each phase"
        )
    exact = Decimal(str(keep)) * num_layers  # 0.29 of 50 layers is 14.5, not the 14.4999... of binary fractions
    return max(1, int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP)))


def top_layers(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` best layers, ascending. Of equal scores the earlier layer is kept."""
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))


def plan_schedule(
    model: ModelIdentity,
    profile: Profile | None,
    *,
    criterion: str,
    keep: Mapping[Phase, float],
    shared: bool = False,
    boundary: Boundary = Boundary.DECODE,
    single_turn: bool = False,
    seed: int = 0,
) -> Schedule:
    """The best layers of each phase, or with `shared` of both phases together, each run whole.

    Raises BudgetError: a keep ratio outside of (0, 1], different ratios for shared phases, an unknown criterion, one that needs a
    profile without one, or a profile of another model.
    """
    if profile is not None and profile.model.fingerprint != model.fingerprint:
        raise BudgetError(
            f"the profile is of {profile.model.name}, not of {model.name}", hint="profile the model itself"
        )
    chosen = find_criterion(criterion)
    if chosen.needs_profile and profile is None:
        raise BudgetError(f"criterion {criterion} needs a profile", hint="make one with voidprune profile")
    if shared and len(set(keep.values())) > 1:
        raise BudgetError("shared phases cannot have different keep ratios", hint="use --keep, or --phases split")
    statistics = {
        phase: empty_statistics(model.num_layers) if profile is None else profile.statistics(phase) for phase in Phase
    }
    if shared:
        both = statistics[Phase.PREFILL] + statistics[Phase.DECODE]
        statistics = dict.fromkeys(Phase, both)
    for phase in Phase:
        if chosen.needs_profile and not statistics[phase].num_tokens:
            raise BudgetError(f"the profile has seen no token of {phase}", hint="profile with longer responses")
    # A random choice is another one in each phase, unless the phases are one.
    seeds = {phase: seed if shared else 2 * seed + number for number, phase in enumerate(Phase)}
    chosen_actions = {
        phase: _run_layers(
            top_layers(chosen.score(statistics[phase], seeds[phase]), num_kept(keep[phase], model.num_layers)),
            model.num_layers,
        )
        for phase in Phase
    }
    prefill, decode = satisfy_kv_contract(
        chosen_actions[Phase.PREFILL], chosen_actions[Phase.DECODE], single_turn=single_turn
    )
    origin: dict[str, Scalar] = {
        "criterion": criterion,
        "keep_prefill": keep[Phase.PREFILL],
        "keep_decode": keep[Phase.DECODE],
        "phases": "shared" if shared else "split",
    }
    if criterion == "random":
        origin["seed"] = seed
    if profile is not None and chosen.needs_profile:
        origin["alpha"] = profile.lac.alpha
        origin["calibration"] = ", ".join(profile.calibration.fingerprints)
    return Schedule(
        model=model, prefill=prefill, decode=decode, boundary=boundary, single_turn=single_turn, origin=origin
    )


def _run_layers(layers: Sequence[int], num_layers: int) -> Actions:
    return tuple(LayerAction.FULL if layer in layers else LayerAction.SKIP for layer in range(num_layers))
