"""Caveats are decided from the data: each appears where it applies, and not where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.documents import benchmark, fill_folder, write_results
from tests.test_plots import make_comparison
from voidprune.report.caveats import find_caveats
from voidprune.report.findings import Findings, collect_findings
from voidprune.schedule import full_schedule


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    fill_folder(tmp_path)
    return collect_findings(tmp_path)


def told(findings: Findings) -> str:
    return "\n".join(find_caveats(findings))


def with_difference(findings: Findings, low: float, high: float) -> Findings:
    evaluation = dict(findings.evaluation or {})
    judged = dict(evaluation["runners"][1])
    difference = {**judged["against_whole"]["accuracy"]["sorting"], "interval": [low, high]}
    judged["against_whole"] = {**judged["against_whole"], "accuracy": {"sorting": difference}}
    evaluation["runners"] = [evaluation["runners"][0], judged]
    return replace(findings, evaluation=evaluation)


def test_what_runs_in_decode_only_is_named(findings: Findings) -> None:
    assert "Layer 1 attends in decode only" in told(findings)
    assert findings.schedule is not None
    assert "attends in decode only" not in told(replace(findings, schedule=full_schedule(findings.schedule.model)))


def test_losses_are_told_from_chance(findings: Findings) -> None:
    assert "up to 75.0 points are not excluded: sorting" in told(with_difference(findings, -0.75, 0.375))
    assert "larger than chance explains (95 %): sorting (-25.0 points)" in told(with_difference(findings, -0.4, -0.1))
    gained = told(with_difference(findings, 0.1, 0.4))
    assert "sorting" not in gained
    assert "perplexity does not differ" not in gained


def test_results_of_another_schedule_are_named(findings: Findings) -> None:
    assert "another schedule" not in told(findings)
    evaluation = {**(findings.evaluation or {}), "schedule_hash": "sha256:other"}
    assert "The evaluation is of another schedule" in told(replace(findings, evaluation=evaluation))


@pytest.mark.parametrize(
    ("ratio", "spread", "sentences"),
    [
        (0.5, 0.02, []),
        (0.5, 0.3, ["Time to first token: the spread of the benchmark is large, 30%"]),
        (0.99, 0.05, ["Time per output token: no gain is shown"]),
        (0.95, 0.3, ["30% of the median, and its interval holds 1, so no gain is shown"]),
    ],
)
def test_timings_that_prove_little_are_named(
    findings: Findings, ratio: float, spread: float, sentences: list[str]
) -> None:
    text = told(replace(findings, benchmark=benchmark(ratio=ratio, spread=spread)))
    for sentence in sentences:
        assert sentence in text
    assert ("Time to first token" in text) is bool(sentences)


def test_a_lead_that_may_be_chance_and_a_control_that_wins(findings: Findings) -> None:
    assert "lead of lac" not in told(findings)
    comparison = make_comparison()
    for row in comparison["rows"]:
        if row["margin"]:
            row["margin"] = [0.01, -0.1, 0.1]
    assert "the lead of lac over the next best may be chance" in told(replace(findings, comparison=comparison))
    comparison["rows"] = [row for row in comparison["rows"] if row["criterion"] in ("last-n", "random")]
    assert "a control wins: last-n looks at nothing" in told(replace(findings, comparison=comparison))


def test_too_few_items_or_samples_are_named(findings: Findings) -> None:
    text = told(findings)
    assert "too few items to show that no more than 1.00% is lost: capitals (20 of at least 300)" in text
    assert "The profile is of 2 samples" in text
    assert "too few items" not in told(replace(findings, probe=None))


def test_an_evaluation_without_the_whole_model(tmp_path: Path, findings: Findings) -> None:
    evaluation = dict(findings.evaluation or {})
    evaluation["runners"] = [{**evaluation["runners"][1], "against_whole": None}]
    write_results(tmp_path, evaluation=evaluation)
    assert "without the whole model beside it" in told(collect_findings(tmp_path))


def test_one_round_shows_no_gain(findings: Findings) -> None:
    assert "of one round" not in told(findings)
    once = {**benchmark(spread=0.0), "num_rounds": 1, "confidence": None, "widest": None}
    text = told(replace(findings, benchmark=once))
    assert "The benchmark is of one round, so nothing says how far its times may be off" in text
    assert "Time to first token" not in text
