"""What healing gave back, from the record in a bundle, and what is said of the data that it learned from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.execution.test_manifest import HEALING, MANIFEST, PACKED
from tests.report.documents import fill_folder
from voidprune.execution.kv_cache import KvCache
from voidprune.report.caveats import find_caveats
from voidprune.report.findings import collect_findings
from voidprune.report.healing import describe_healing

HEALED = replace(MANIFEST, healing=HEALING)


def test_perplexities_and_what_was_regained() -> None:
    facts = describe_healing(HEALED)
    assert facts is not None
    held_out = HEALING.held_out
    assert (facts.whole, facts.before, facts.after) == pytest.approx(
        tuple(map(math.exp, (held_out.whole, held_out.before, held_out.after)))
    )
    assert facts.regained == pytest.approx((held_out.before - held_out.after) / (held_out.before - held_out.whole))
    assert facts.num_prompts == len(HEALING.prompts)
    unharmed = replace(HEALING, held_out=replace(held_out, before=held_out.whole))
    found = describe_healing(replace(MANIFEST, healing=unharmed))
    assert found is not None
    assert found.regained is None, "nothing was lost"
    assert describe_healing(MANIFEST) is None
    assert describe_healing(None) is None


def test_what_a_method_records_is_told() -> None:
    outcomes = {"linear": {"branches": [{}, {}]}, "distill": {"loss_before": 2.0, "loss_after": 1.5, "best_step": 40}}
    healing = replace(HEALING, methods=("linear", "distill"), settings={}, outcomes=outcomes)
    facts = describe_healing(replace(MANIFEST, healing=healing))
    assert facts is not None
    assert facts.outcomes == (
        "linear: 2 branches fitted in closed form",
        "distill: loss on held-out samples 2.0000 to 1.5000, best at step 40",
    )


def test_overlap_with_the_data_of_healing_is_said_to_be_checked_or_not(tmp_path: Path) -> None:
    fill_folder(tmp_path)
    found = collect_findings(tmp_path)
    findings = replace(found, manifest=HEALED, evaluation={**(found.evaluation or {}), "model": "healed"})
    told = "\n".join(find_caveats(findings))
    assert "Overlap was checked" in told
    assert "Overlap was not checked for the tasks of lm_eval" in told
    for compared, sentence in (
        (8, "none of their 8 prompts is, token for token, among the 1 that"),
        (0, "not checked"),
    ):
        harness = {**(findings.harness or {}), "num_compared_prompts": compared}
        told = "\n".join(find_caveats(replace(findings, harness=harness)))
        assert sentence in told
        assert ("Overlap was not checked" in told) is (compared == 0)
    assert "Overlap" not in "\n".join(find_caveats(replace(findings, manifest=MANIFEST)))
    source = {**(findings.evaluation or {}), "model": MANIFEST.source}
    told = "\n".join(find_caveats(replace(findings, evaluation=source, harness=None)))
    assert "without the weights that healing changed" in told
    assert "Overlap" not in told
    told = "\n".join(find_caveats(replace(findings, manifest=PACKED, harness=None)))
    assert "none of the evaluated prompts is among the 2 that the bundle was fitted to" in told
    judged = findings.evaluation or {}
    unrounded = {**judged, "runners": [one for one in judged["runners"] if one["name"] != "onnx"]}
    assert len(unrounded["runners"]) < len(judged["runners"])
    told = "\n".join(find_caveats(replace(findings, manifest=PACKED, evaluation=unrounded, harness=None)))
    assert "The evaluation is of weights before anything was rounded on samples." in told
    told = "\n".join(find_caveats(replace(findings, manifest=PACKED, evaluation=source, harness=None)))
    assert "without the weights that rounding changed" in told
    held = replace(MANIFEST, kv_cache=KvCache("int8", 64, ("0123456789abcdef",)))
    told = "\n".join(find_caveats(replace(findings, manifest=held, evaluation=source, harness=None)))
    assert "without keys and values in 8 bits" in told
    unmeasured = "\n".join(find_caveats(replace(findings, evaluation=None, harness=None)))
    assert "Overlap" not in unmeasured
