"""A finding: how things stand with one thing, in one line, and what mends it. Pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """A warning is what slows down or limits; a problem is what keeps something from working."""

    OK = "ok"
    NOT_CHECKED = "not checked"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """`area` is what it is about, `fact` how things stand, `mend` a command or what else to do, None where nothing is wrong."""

    area: str
    status: Status
    fact: str
    mend: str | None = None


def worst(findings: Sequence[Finding]) -> Status:
    return max((finding.status for finding in findings), key=list(Status).index, default=Status.OK)
