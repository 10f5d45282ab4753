"""Facts and what they mean, put together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from voidprune import artifacts
from voidprune.doctor.facts import Facts
from voidprune.doctor.hardware import judge_hub, judge_machine, judge_model
from voidprune.doctor.judgements import Finding, Status, worst
from voidprune.doctor.software import judge_cuda, judge_extras, judge_packages, judge_providers, judge_runtime

KIND, VERSION = "doctor", 1


@dataclass(frozen=True)
class Diagnosis:
    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """That of the worst finding."""
        return worst(self.findings)

    def to_document(self) -> dict[str, Any]:
        return {
            "schema": artifacts.schema_key(KIND, VERSION),
            "status": self.status,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": self.facts.to_document(),
        }


def diagnose(facts: Facts) -> Diagnosis:
    judges = (
        judge_packages, judge_runtime, judge_cuda, judge_providers, judge_extras, judge_machine, judge_hub, judge_model,
    )  # fmt: skip
    return Diagnosis(facts, tuple(finding for judge in judges for finding in judge(facts)))
