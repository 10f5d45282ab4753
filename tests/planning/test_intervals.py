"""Intervals cover what they say they cover, and a ranking is called a fact only where other samples agree."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.planning.test_criteria import STATISTICS
from tests.profiling.test_profile import make_profile
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.intervals import (
    find_cut,
    order_probabilities,
    resample_statistics,
    schedule_cuts,
    score_intervals,
)
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.profile import NUM_BLOCKS, LayerStatistics, Profile
from voidprune.schedule import Phase, full_schedule

LAC, INFLUENCE, ANGULAR = CRITERIA["lac"], CRITERIA["block-influence"], CRITERIA["angular"]


def draw_block(generator: random.Random, frequencies: tuple[float, float], num_tokens: int = 40) -> LayerStatistics:
    """Tokens for which each layer is active with its own probability; influence and angles scatter around them, too."""
    active = tuple(sum(generator.random() < share for _ in range(num_tokens)) for share in frequencies)
    sums = tuple(num_tokens * generator.gauss(share, 0.05) for share in frequencies)
    return LayerStatistics(num_tokens, active, sums, sums, sums, sums, 1, (sums[0], sums[0] + sums[1], sums[1]))


def draw_profile(seed: int, frequencies: tuple[float, float], *, groups: int = 1) -> Profile:
    generator = random.Random(seed)
    return replace(
        make_profile(),
        groups={
            f"group {number}": {
                phase: tuple(draw_block(generator, frequencies) for _ in range(NUM_BLOCKS)) for phase in Phase
            }
            for number in range(groups)
        },
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % of 200 layers would be 190; three standard deviations of that are 9, and resampling 32 blocks is a little narrow."""
    covered = 0
    for seed in range(100):
        replicates = resample_statistics(draw_profile(seed, (0.3, 0.7)), [Phase.PREFILL], num_replicates=300)
        assert replicates is not None
        intervals = score_intervals(LAC, replicates)
        covered += sum(low <= truth <= high for (low, high), truth in zip(intervals, (0.3, 0.7), strict=True))
    assert 175 <= covered <= 199


def test_replicates_scatter_around_the_profile() -> None:
    profile = draw_profile(0, (0.3, 0.7), groups=3)
    replicates = resample_statistics(profile, [Phase.DECODE])
    assert replicates is not None
    mean = np.mean([one.activation_frequency for one in replicates], axis=0)
    assert mean == pytest.approx(profile.statistics(Phase.DECODE).activation_frequency, abs=2e-3)
    assert {one.num_tokens for one in replicates} == {3 * NUM_BLOCKS * 40}
    assert {one.num_spans for one in replicates} == {3 * NUM_BLOCKS}


def test_resampling_is_seeded() -> None:
    profile = draw_profile(0, (0.3, 0.7))
    one, same, other = (resample_statistics(profile, [Phase.DECODE], seed=seed, num_replicates=5) for seed in (1, 1, 2))
    assert one == same != other


def test_an_order_that_samples_agree_on_is_a_fact_and_another_is_a_coin_toss() -> None:
    apart = resample_statistics(draw_profile(1, (0.3, 0.7)), [Phase.PREFILL])
    assert apart is not None
    probabilities = order_probabilities(LAC, apart)
    assert probabilities[1, 0] == 1.0
    assert probabilities[0, 1] == 0.0
    close = [resample_statistics(draw_profile(seed, (0.5, 0.5)), [Phase.PREFILL]) for seed in range(8)]
    chances = [order_probabilities(LAC, replicates)[0, 1] for replicates in close if replicates is not None]
    assert 0.2 < np.mean(chances) < 0.8
    assert np.allclose(probabilities + probabilities.T, 1.0)


def test_equal_scores_are_a_coin_toss() -> None:
    replicates = resample_statistics(draw_profile(0, (0.0, 0.0)), [Phase.PREFILL])
    assert replicates is not None
    assert (order_probabilities(LAC, replicates) == 0.5).all()


def test_too_few_samples_give_no_interval() -> None:
    profile = make_profile()  # two blocks in prefill, one in decode
    assert resample_statistics(profile, [Phase.PREFILL]) is not None
    assert resample_statistics(profile, [Phase.DECODE]) is None
    cut = find_cut(INFLUENCE, profile.statistics(Phase.DECODE), None, [0])
    assert cut is not None
    assert (cut.last_kept, cut.first_dropped, cut.scores) == (0, 1, (0.25, 0.125))
    assert (cut.intervals, cut.confidence, cut.verdict) == (None, None, "too few samples")


def test_groups_of_one_block_are_resampled_together() -> None:
    profile = make_profile()
    phases = profile.groups["default"]
    several = replace(profile, groups=dict.fromkeys("abc", phases))
    replicates = resample_statistics(several, [Phase.DECODE])
    assert replicates is not None
    assert {one.num_tokens for one in replicates} == {12}


def test_the_cut_is_between_the_weakest_that_stays_and_the_strongest_that_goes() -> None:
    profile = draw_profile(2, (0.3, 0.7))
    statistics, replicates = profile.statistics(Phase.PREFILL), resample_statistics(profile, [Phase.PREFILL])
    cut = find_cut(LAC, statistics, replicates, [1])
    assert cut is not None
    assert (cut.last_kept, cut.first_dropped, cut.confidence, cut.verdict) == (1, 0, 1.0, "a fact")
    against = find_cut(LAC, statistics, replicates, [0])
    assert against is not None
    assert (against.confidence, against.verdict) == (0.0, "a coin toss")
    assert find_cut(LAC, statistics, replicates, [0, 1]) is None


def test_a_chosen_set_is_as_sure_as_it_is_chosen_again() -> None:
    profile = draw_profile(3, (0.3, 0.7))
    statistics, replicates = profile.statistics(Phase.PREFILL), resample_statistics(profile, [Phase.PREFILL])
    cut = find_cut(ANGULAR, statistics, replicates, ANGULAR.choose(statistics, 1))
    assert cut is not None
    assert (cut.last_kept, cut.scores, cut.confidence) == (None, None, 1.0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("criterion", ["lac", "angular", "attention-cosine", "mlp-cosine"])
def test_a_schedule_tells_its_cuts(criterion: str, shared: bool) -> None:
    profile = draw_profile(4, (0.3, 0.7))
    budget = Budget(keep_prefill=0.5, keep_decode=0.5, shared=shared)
    schedule = plan_schedule(profile.model, profile, criterion=criterion, budget=budget)
    cuts = schedule_cuts(profile, schedule)
    assert set(cuts) == set(Phase)
    assert all(cut.confidence == 1.0 for cut in cuts.values())


def test_what_no_profile_decided_has_no_cut() -> None:
    profile = draw_profile(4, (0.3, 0.7))
    last = plan_schedule(profile.model, profile, criterion="last-n", budget=Budget(keep_prefill=0.5, keep_decode=0.5))
    assert schedule_cuts(profile, last) == {}
    assert schedule_cuts(profile, full_schedule(profile.model)) == {}


def test_layers_that_the_user_fixed_are_no_choice_of_the_criterion() -> None:
    """A protected layer with a low score says nothing about how sure the ranking of the others is."""
    cut = find_cut(LAC, STATISTICS, None, {0, 1}, fixed={1})  # from best to worst: 0, 2, 3, 1
    assert cut is not None
    assert (cut.last_kept, cut.first_dropped) == (0, 2)
    assert find_cut(LAC, STATISTICS, None, {0, 1}, fixed={0, 1}) is None
    profile = draw_profile(4, (0.3, 0.7))
    budget = Budget(keep_prefill=0.5, keep_decode=0.5, protected=frozenset({0}))
    assert schedule_cuts(profile, plan_schedule(profile.model, profile, criterion="lac", budget=budget)) == {}
