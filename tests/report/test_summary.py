"""The first things a reader learns: the right figures, each beside the whole model's, and a paragraph made of the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.documents import benchmark, fill_folder, harness, write_results
from voidprune.report.figures import Figure
from voidprune.report.findings import Findings, collect_findings
from voidprune.report.summary import describe_run, format_layers, make_cards
from voidprune.schedule import LayerAction, ModelIdentity, Schedule

NOTHING = Findings(None, None, None, None, None, None)


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    fill_folder(tmp_path)
    return collect_findings(tmp_path)


def figures(findings: Findings, card: str) -> dict[str, Figure]:
    found = next(one for one in make_cards(findings) if one.key == card)
    return {figure.key: figure for figure in found.figures}


def test_every_figure_stands_beside_the_whole_model(findings: Findings) -> None:
    cards = make_cards(findings)
    assert [card.key for card in cards] == ["dropped", "quality", "bytes", "time"]
    assert all(figure.whole is not None for card in cards for figure in card.figures)
    dropped = figures(findings, "dropped")
    assert [(one.value, one.whole) for one in dropped.values()] == [(1, 2), (2, 2), (2, 2)]
    assert cards[0].note == "prefill leaves out 1 (keys and values stay)"
    accuracy = figures(findings, "quality")["accuracy"]
    assert (accuracy.value, accuracy.whole, accuracy.change, accuracy.interval) == (0.25, 0.5, -0.25, (-0.75, 0.375))
    assert accuracy.shown_change == "-25.0 points [-75.0, +37.5]"
    assert figures(findings, "quality")["perplexity"].shown_change == "x 0.2500 [0.1250, 0.5000]"
    ttft = figures(findings, "time")["ttft"]
    assert (ttft.shown, ttft.shown_whole, ttft.shown_change) == ("20.00 ms", "40.00 ms", "-50.0 % [-50.5, -49.5]")
    assert figures(findings, "bytes")["peak_memory"].shown_change == "50 % less"
    assert figures(findings, "bytes")["kv_per_token"].shown_change == "the same"


def test_what_was_not_measured_is_counted_and_said_to_be(findings: Findings) -> None:
    card = make_cards(replace(findings, benchmark=None))[3]
    assert [figure.key for figure in card.figures] == ["prefill_flops", "decode_bytes"]
    assert card.note.startswith("Not measured")
    assert card.lacks.startswith("voidprune bench DIR/pruned --baseline tiny")


def test_nothing_is_made_up_where_nothing_is_known() -> None:
    cards = make_cards(NOTHING)
    assert all(card.figures == () and card.lacks for card in cards)
    assert "no schedule, profile or export" in describe_run(NOTHING)


def test_without_the_whole_model_no_loss_is_shown(findings: Findings) -> None:
    evaluation = dict(findings.evaluation or {})
    evaluation["runners"] = [{**evaluation["runners"][1], "against_whole": None}]
    alone = replace(findings, evaluation=evaluation)
    accuracy = figures(alone, "quality")["accuracy"]
    assert (accuracy.whole, accuracy.change, accuracy.interval) == (None, None, None)
    assert " eval tiny --schedule " in make_cards(alone)[1].lacks, "which runs the whole model, too"
    assert "--baseline" not in make_cards(alone)[1].lacks, "which eval refuses of a model that is no bundle"


def test_the_interval_of_a_mean_over_unequal_tasks_is_left_out(findings: Findings) -> None:
    """The interval is that of all items together, which is another figure then."""
    evaluation = dict(findings.evaluation or {})
    judged = dict(evaluation["runners"][1])
    difference = judged["against_whole"]["accuracy"]["sorting"]
    judged["against_whole"] = {
        **judged["against_whole"],
        "overall": difference,
        "accuracy": {"sorting": difference, "other": {**difference, "num_items": 3}},
    }
    evaluation["runners"] = [evaluation["runners"][0], judged]
    assert figures(replace(findings, evaluation=evaluation), "quality")["accuracy"].interval is None


def test_tasks_of_the_harness_stand_in_for_an_evaluation(tmp_path: Path) -> None:
    write_results(tmp_path, harness=harness())
    figure = next(iter(figures(collect_findings(tmp_path), "quality").values()))
    assert (figure.value, figure.whole, figure.change, figure.interval) == (0.5, 0.75, -0.25, (-0.5, 0.0))


def test_the_paragraph_says_what_was_done(findings: Findings) -> None:
    told = describe_run(findings)
    for sentence in (
        "Of the 2 decoder layers of tiny, reading a prompt now runs 1 and writing each token of the response runs all 2.",
        "While reading, layer 1 only writes keys and values.",
        "Every layer is still in the checkpoint.",
        "The layers were chosen by lac (activation frequency under LAC).",
        "It was evaluated, timed beside the whole model and probed layer by layer.",
    ):
        assert sentence in told


def test_the_paragraph_names_what_is_gone_and_why() -> None:
    actions = (LayerAction.FULL, LayerAction.SKIP, LayerAction.SKIP, LayerAction.FULL)
    model = ModelIdentity("four", "llama", 4, "f")
    for origin, chosen in (
        ({"criterion": "explicit"}, "The layers were named by hand."),
        ({"criterion": "probe"}, "chosen by a probe"),
        ({"criterion": "search-loss", "goal": "small", "max_loss": 0.01}, "for the goal small, allowed to lose 1.00%."),
        ({}, "Gone from the checkpoint: layers 1, 2."),
    ):
        told = describe_run(replace(NOTHING, schedule=Schedule(model, actions, actions, origin=origin)))
        assert chosen in told


def test_many_layers_are_counted_in_place_of_named() -> None:
    prefill = tuple(LayerAction.KV_ONLY if layer % 2 else LayerAction.FULL for layer in range(80))
    schedule = Schedule(ModelIdentity("m", "llama", 80, "f"), prefill, (LayerAction.FULL,) * 80)
    assert "While reading, 40 layers only write keys and values." in describe_run(replace(NOTHING, schedule=schedule))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "3"),
        ([3, 4], "3, 4"),
        ([1, 3], "1 and 3"),
        ([0, 1, 2, 5, 7, 8], "0 to 2, 5 and 7, 8"),
        (range(9), "0 to 8"),
    ],
)
def test_layers_are_put_together(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text


def test_a_slower_export_is_shown_as_slower(tmp_path: Path) -> None:
    fill_folder(tmp_path)
    write_results(tmp_path, benchmark=benchmark(ratio=1.5))
    assert figures(collect_findings(tmp_path), "time")["tpot"].shown_change == "+50.0 % [+48.5, +51.5]"
