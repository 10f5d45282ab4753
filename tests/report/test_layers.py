"""Rankings of layers: every criterion, each phase, scores and standing in the right order."""

from __future__ import annotations

import pytest

from tests.profiling.test_profile import make_profile
from tests.report.documents import make_schedule
from voidprune.planning.criteria import CRITERIA
from voidprune.plots.drawing import paint_svg
from voidprune.profiling.profile import empty_statistics
from voidprune.report.layers import Ranking, describe_layers, draw_layers, rank_layers
from voidprune.schedule import Phase


def test_every_criterion_ranks_every_layer() -> None:
    facts = rank_layers(make_profile(), 2)
    assert {ranking.criterion for ranking in facts.rankings} == set(CRITERIA)
    by_name = {(ranking.criterion, ranking.phase): ranking for ranking in facts.rankings}
    lac = by_name["lac", Phase.PREFILL]
    assert lac.scores == facts.frequency[Phase.PREFILL] == (1.0, 0.4)
    assert (lac.standing, lac.ranks) == ((1.0, 0.0), (1, 2))
    assert by_name["lac", Phase.DECODE].ranks == (2, 1)
    assert by_name["last-n", None].scores is None
    assert by_name["evenly-spaced", None].standing == (0.0, 1.0), "a single layer is the last"


@pytest.mark.parametrize("name", CRITERIA)
def test_standing_is_what_the_criterion_would_keep(name: str) -> None:
    """Of two layers, the one that stays alone stands first."""
    profile = make_profile()
    for ranking in rank_layers(profile, 2).rankings:
        if ranking.criterion != name or name == "random":
            continue
        statistics = empty_statistics(2) if ranking.phase is None else profile.statistics(ranking.phase)
        kept = CRITERIA[name].choose(statistics, 1)
        assert [layer for layer, standing in enumerate(ranking.standing) if standing == 1] == list(kept)


def test_equal_standings_share_a_rank() -> None:
    assert Ranking("angular", None, None, (1.0, 0.5, 0.5, 0.0)).ranks == (1, 2, 2, 4)


def test_without_a_profile_there_is_the_schedule_alone() -> None:
    facts = rank_layers(None, 2)
    assert facts.rankings == ()
    assert facts.frequency == {Phase.PREFILL: None, Phase.DECODE: None}
    text = paint_svg(draw_layers(facts, make_schedule(make_profile()), model="m"))
    assert "layer 1, prefill: only keys and values are written" in text
    assert "LAC" not in text
    assert "last-n" not in text


def test_the_picture_is_said_in_words() -> None:
    profile = make_profile()
    told = describe_layers(rank_layers(profile, 2), make_schedule(profile))
    assert "The schedule leaves 1 out of prefill." in told
    assert "The schedule leaves nothing out of decode." in told
