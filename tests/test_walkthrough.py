"""The demo leaves a complete folder, and its choice is the best of what it tried."""

from __future__ import annotations

from pathlib import Path

from voidprune.execution.manifest import read_manifest
from voidprune.report import collect_findings
from voidprune.walkthrough import DEMO_BUDGETS, DEMO_CRITERIA, run_demo


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    outcome = run_demo(tmp_path / "demo", num_items=4)
    findings = collect_findings(tmp_path / "demo")
    assert findings.profile == outcome.profile
    assert findings.schedule == outcome.schedule == read_manifest(tmp_path / "demo" / "pruned").schedule
    assert read_manifest(tmp_path / "demo" / "whole").schedule.is_full
    rows = outcome.comparison["rows"]
    assert len(rows) == len(DEMO_BUDGETS) * len(DEMO_CRITERIA)
    for keep_prefill, keep_decode in DEMO_BUDGETS:
        rivals = [row for row in rows if (row["keep_prefill"], row["keep_decode"]) == (keep_prefill, keep_decode)]
        (chosen,) = (row for row in rivals if row["chosen"])
        assert sum(chosen["accuracy"].values()) == max(sum(row["accuracy"].values()) for row in rivals)
    assert outcome.schedule.origin["criterion"] == next(row["criterion"] for row in rows if row["chosen"])
    whole, reference, onnx = outcome.evaluation["runners"]
    assert reference["accuracy"] == onnx["accuracy"]
    assert whole["accuracy"].keys() == onnx["accuracy"].keys()
