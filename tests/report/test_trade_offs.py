"""Points of the charts: what was timed lies where it was timed, everything else at its cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.documents import fill_folder
from tests.test_plots import make_comparison
from voidprune.report.findings import Findings, collect_findings
from voidprune.report.trade_offs import explain_panels, has_accuracy, make_panels, panels_document


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    fill_folder(tmp_path)
    return collect_findings(tmp_path)


def test_measured_times_and_counted_costs_are_kept_apart(findings: Findings) -> None:
    panels = {panel.scope: panel for panel in make_panels(findings)}
    assert list(panels) == ["bytes", "prefill", "decode"]
    prompt = panels["prefill"]
    assert prompt.measured is not None
    assert prompt.predicted is not None
    assert prompt.measured.cost == 0.5
    assert prompt.measured.cost_interval == (0.495, 0.505)
    assert prompt.measured_axis == "measured TTFT"
    assert prompt.predicted.cost == 1.0, (
        "of the whole model, too, the last layer only writes keys and values of a prompt"
    )
    assert panels["bytes"].measured is None, "nothing was exported"
    assert panels["decode"].points == (), "not compared"
    untimed = make_panels(replace(findings, benchmark=None))
    assert [panel.measured for panel in untimed] == [None] * 3
    assert "Nothing here was timed" in explain_panels(findings, untimed)
    assert "Filled stars lie at the measured TTFT and measured TPOT" in explain_panels(findings, list(panels.values()))


def test_quality_is_what_both_have(findings: Findings) -> None:
    assert has_accuracy(findings)
    assert {panel.measured.quality for panel in make_panels(findings) if panel.measured} == {0.25}
    losses = replace(findings, comparison=make_comparison(asked=False))
    assert not has_accuracy(losses)
    panels = make_panels(losses)
    assert {panel.measured.quality for panel in panels if panel.measured} == {0.25}, "the perplexity ratio"
    assert panels_document(panels, accuracy=False)["quality"] == "perplexity_ratio"


def test_without_anything_but_the_whole_model_there_is_no_chart(findings: Findings) -> None:
    assert make_panels(replace(findings, comparison=None, evaluation=None)) == []
    bare = replace(findings, comparison=None, profile=None, benchmark=None, manifest=None)
    assert make_panels(bare) == []


def test_intervals_of_unequal_tasks_are_left_out(findings: Findings) -> None:
    comparison = make_comparison()
    assert make_panels(replace(findings, comparison=comparison))[0].whole.interval is not None
    comparison["whole"]["accuracy"]["sorting"]["num_items"] = 5
    assert make_panels(replace(findings, comparison=comparison))[0].whole.interval is None
