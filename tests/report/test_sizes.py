"""Parts of a model: they add up, and a tied head is not counted twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.execution.test_manifest import MANIFEST
from tests.report.documents import fill_folder
from voidprune.execution.kv_cache import KvCache
from voidprune.report.findings import Findings, collect_findings
from voidprune.report.sizes import measure_parts
from voidprune.schedule import dropped_schedule


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    fill_folder(tmp_path)
    return collect_findings(tmp_path)


def test_parts_add_up_to_the_model(findings: Findings) -> None:
    assert findings.profile is not None
    total = findings.profile.sizes.total_bytes
    dropped = replace(findings, schedule=dropped_schedule(findings.profile.model, [1]))
    facts = measure_parts(dropped)
    assert [sum(part.bytes for part in bar.parts) for bar in facts.bars] == [total, total]
    assert [(part.kind, part.bytes) for part in facts.bars[1].parts] == [
        ("embedding", 20), ("kept", 100), ("dropped", 100), ("head", 30),
    ]  # fmt: skip
    costs = {figure.key: (figure.value, figure.whole) for figure in facts.costs}
    assert costs["weight_bytes"] == (total - 100, total)
    assert measure_parts(findings).bars[1].parts[1].name == "2 layers"


def test_a_cache_in_8_bits_is_counted_as_it_is_held(findings: Findings) -> None:
    assert findings.profile is not None
    assert findings.schedule is not None
    held = replace(MANIFEST, kv_cache=KvCache("int8", 3, ("0123456789abcdef",)))
    plain, rounded = (
        {figure.key: (figure.value, figure.whole) for figure in measure_parts(one).costs}
        for one in (findings, replace(findings, manifest=held))
    )
    slots = len(findings.schedule.kv_layers)
    saved = slots * (findings.profile.sizes.kv_bytes_per_token - 3)
    assert saved
    assert rounded["kv_bytes_per_token"] == (3 * slots, plain["kv_bytes_per_token"][1])
    assert rounded["decode_bytes"][1] == plain["decode_bytes"][1]
    assert rounded["decode_bytes"][0] == plain["decode_bytes"][0] - 512 * saved


def test_a_tied_head_is_the_embedding(findings: Findings) -> None:
    assert findings.profile is not None
    sizes = replace(findings.profile.sizes, other_bytes=31, head_bytes=30)
    facts = measure_parts(replace(findings, profile=replace(findings.profile, sizes=sizes)))
    assert [(part.kind, part.bytes) for part in facts.bars[0].parts] == [("embedding", 31), ("kept", 200)]


def test_without_a_profile_nothing_is_known(findings: Findings) -> None:
    facts = measure_parts(replace(findings, profile=None))
    assert (facts.bars, facts.costs, facts.files) == ((), (), ())
