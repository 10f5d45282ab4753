"""Findings in their order, and the document for scripts."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.doctor.healthy import CPU_MACHINE, GB
from voidprune.doctor.diagnosis import diagnose
from voidprune.doctor.facts import Folder
from voidprune.doctor.judgements import Status


def test_the_worst_finding_is_the_status() -> None:
    roomy = replace(CPU_MACHINE, machine=replace(CPU_MACHINE.machine, free_memory_bytes=90 * GB))
    assert diagnose(roomy).status is Status.NOT_CHECKED
    assert diagnose(CPU_MACHINE).status is Status.WARNING
    assert diagnose(replace(CPU_MACHINE, output=Folder("/o", False, 0))).status is Status.PROBLEM


def test_findings_go_from_the_ground_up() -> None:
    areas = [finding.area for finding in diagnose(CPU_MACHINE).findings]
    assert list(dict.fromkeys(areas)) == [
        "python", "packages", "onnxruntime", "cuda", "providers", "extras", "machine", "hub", "model",
    ]  # fmt: skip


def test_every_warning_and_problem_has_a_mend_in_one_line() -> None:
    for finding in diagnose(replace(CPU_MACHINE, output=Folder("/o", False, 0))).findings:
        assert "\n" not in finding.fact + (finding.mend or "")
        assert finding.mend or finding.status in (Status.OK, Status.NOT_CHECKED)


def test_the_document() -> None:
    document = json.loads(json.dumps(diagnose(CPU_MACHINE).to_document(), allow_nan=False))
    assert document.keys() == {"schema", "status", "findings", "facts"}
    assert document["schema"] == "voidprune.doctor/1"
    assert all(finding.keys() == {"area", "status", "fact", "mend"} for finding in document["findings"])
    assert document["facts"]["flavours"] == {"onnxruntime-gpu": "1.31.1"}
