"""Has a ratio become worse since it was accepted? Ratios of times within one run, each with the interval of its median.

A ratio is worse where its whole interval lies above the whole interval that was accepted: then neither run's noise explains it.
Ratios are written so that less is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.quality.spreads import Spread

KIND, VERSION = "accepted-ratios", 1


@dataclass(frozen=True)
class AcceptedRun:
    """A run whose ratios count from then on. `settings` is what it takes to repeat it, `machine` what it ran on."""

    settings: Mapping[str, Any]
    machine: str
    ratios: Mapping[str, Spread]

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key(KIND, VERSION),
            "settings": dict(self.settings),
            "machine": self.machine,
            "ratios": {name: asdict(spread) for name, spread in self.ratios.items()},
        }


@dataclass(frozen=True)
class Change:
    """A ratio then and now; None where it was not measured."""

    name: str
    accepted: Spread | None
    measured: Spread | None

    @property
    def is_worse(self) -> bool:
        """Beyond the noise of both runs. What is no longer measured is worse, what is new is not."""
        if self.accepted is None:
            return False
        return self.measured is None or self.measured.low > self.accepted.high

    @property
    def is_better(self) -> bool:
        return self.accepted is not None and self.measured is not None and self.measured.high < self.accepted.low

    def __str__(self) -> str:
        then, now = (
            "not measured" if spread is None else f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"
            for spread in (self.accepted, self.measured)
        )
        return f"{self.name}: {then} accepted, {now} now"


def compare_ratios(accepted: Mapping[str, Spread], measured: Mapping[str, Spread]) -> list[Change]:
    """Every ratio of either run, in the order of the accepted one, then what is new."""
    names = [*accepted, *(name for name in measured if name not in accepted)]
    return [Change(name, accepted.get(name), measured.get(name)) for name in names]


def invert_ratio(ratio: Spread) -> Spread:
    """The ratio the other way round."""
    return Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def write_accepted(run: AcceptedRun, path: Path) -> None:
    """Replaces what was accepted before. Raises OutputError."""
    artifacts.write_file(path, artifacts.canonical_bytes(run.to_document()), overwrite=True)


def read_accepted(path: Path) -> AcceptedRun:
    """Raises ArtifactError."""
    document = artifacts.read_document(path, kind=KIND, version=VERSION)
    artifacts.check_keys(document, required={"schema", "settings", "machine", "ratios"}, place=str(path))
    try:
        ratios = {name: Spread(**spread) for name, spread in document["ratios"].items()}
        if not all(0 < ratio.low <= ratio.median <= ratio.high for ratio in ratios.values()):
            raise ValueError("a ratio is not within its interval")
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is broken: {error}", hint="accept a run again") from error
    return AcceptedRun(document["settings"], document["machine"], ratios)
