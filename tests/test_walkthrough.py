"""The demo leaves a complete folder, and what it exports is what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from voidprune import walkthrough
from voidprune.execution.manifest import read_manifest
from voidprune.planning.criteria import CRITERIA
from voidprune.report import render_report
from voidprune.report.findings import collect_findings
from voidprune.schedule import Phase
from voidprune.walkthrough import DEMO_BUDGETS, run_demo


def test_the_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer items than it takes by itself, and so with a larger loss allowed."""
    for name, count in (("NUM_CHOOSING", 1), ("NUM_COMPARED", 1), ("NUM_JUDGING", 16), ("MAX_NEW_TOKENS", 40)):
        assert getattr(walkthrough, name) > count
        monkeypatch.setattr(walkthrough, name, count)
    outcome = run_demo(tmp_path / "demo", num_items=2, max_loss=0.1)
    findings = collect_findings(tmp_path / "demo")
    schedule = outcome.free.schedule
    assert findings.profile == outcome.profile
    assert findings.schedule == schedule == read_manifest(tmp_path / "demo" / "pruned").schedule
    assert read_manifest(tmp_path / "demo" / "whole").schedule.is_full
    assert outcome.free.comparison.holds
    assert schedule.num_executed(Phase.PREFILL) < schedule.num_executed(Phase.DECODE) == schedule.num_layers
    assert findings.comparison == outcome.comparison
    rows = outcome.comparison["rows"]
    assert {(row["scope"], row["keep"]) for row in rows} == set(DEMO_BUDGETS)
    assert {row["criterion"] for row in rows} == {*CRITERIA, "search-loss"}
    assert sum(row["margin"] is not None for row in rows) == len(DEMO_BUDGETS)
    whole, reference, onnx = outcome.evaluation["runners"]
    assert reference["accuracy"] == onnx["accuracy"]
    assert whole["accuracy"].keys() == onnx["accuracy"].keys()
    assert "search-loss" in render_report(tmp_path / "demo")


def test_as_many_items_as_its_bound_takes() -> None:
    from voidprune.quality.noninferiority import num_items_needed

    assert num_items_needed(0.01) <= walkthrough.NUM_JUDGING
