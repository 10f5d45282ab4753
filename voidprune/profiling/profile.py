"""What was measured, per phase and layer. Pure values; profiles of the same model and settings merge by addition.

Everything is a count or a sum over tokens, so that a mean over any union of samples is one division. Floats are summed in the
order of the samples, whatever batches they were run in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.models.sizes import ModelSizes
from voidprune.schedule import ModelIdentity, Phase

KIND, VERSION = "profile", 1


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the tokens of one phase, one entry a layer.

    `active`: tokens for which LAC calls the layer active. `cosine_distance`: sum of 1 - cos(state before, state after the
    layer). `relative_change`: sum of |after - before| / |before|, L2 norms.
    """

    num_tokens: int
    active: tuple[int, ...]
    cosine_distance: tuple[float, ...]
    relative_change: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.active), len(self.cosine_distance), len(self.relative_change)}
        if len(lengths) != 1:
            raise ValueError("statistics of several numbers of layers")
        if self.num_tokens < 0 or any(not 0 <= count <= self.num_tokens for count in self.active):
            raise ValueError("a layer is active for more tokens than there are")

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(
            num_tokens=self.num_tokens + other.num_tokens,
            active=_add(self.active, other.active),
            cosine_distance=_add(self.cosine_distance, other.cosine_distance),
            relative_change=_add(self.relative_change, other.relative_change),
        )

    def mean(self, sums: Sequence[float]) -> tuple[float, ...]:
        """A sum over tokens as a mean; zeros where no token was seen."""
        return tuple(value / max(1, self.num_tokens) for value in sums)

    @property
    def activation_frequency(self) -> tuple[float, ...]:
        """Share of the phase's tokens for which LAC calls the layer active (arXiv 2505.14467)."""
        return self.mean(self.active)

    @property
    def block_influence(self) -> tuple[float, ...]:
        """1 - mean cosine of the states before and after the layer (ShortGPT, arXiv 2403.03853)."""
        return self.mean(self.cosine_distance)

    @property
    def relative_norm_change(self) -> tuple[float, ...]:
        """Mean of |after - before| / |before|."""
        return self.mean(self.relative_change)


def empty_statistics(num_layers: int) -> LayerStatistics:
    zeros = (0.0,) * num_layers
    return LayerStatistics(0, (0,) * num_layers, zeros, zeros)


@dataclass(frozen=True)
class Calibration:
    """What was run: how many samples, where responses came from ("generate" or "dataset"), hashes of the token ids."""

    num_samples: int
    responses: str
    max_new_tokens: int
    fingerprints: tuple[str, ...]

    def __post_init__(self) -> None:
        if type(self.num_samples) is not int or type(self.max_new_tokens) is not int or self.num_samples < 0:
            raise ValueError("the counts of the calibration are not whole numbers")
        if self.responses not in ("generate", "dataset") or not all(isinstance(one, str) for one in self.fingerprints):
            raise ValueError("the calibration is not described as it should be")


@dataclass(frozen=True)
class LacSettings:
    """LAC's threshold factor, and the arithmetic of norms, deltas and thresholds: "float32", or "model" as published."""

    alpha: float = 0.8
    arithmetic: str = "float32"

    def __post_init__(self) -> None:
        if type(self.alpha) not in (int, float) or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha!r}, not a number from 0 up")
        if self.arithmetic not in ("float32", "model"):
            raise ValueError(f"arithmetic is {self.arithmetic!r}")


@dataclass(frozen=True)
class Profile:
    """Statistics of one model, by group (a dataset or task tag) and phase; `sizes` lets a planner cost what it plans."""

    model: ModelIdentity
    sizes: ModelSizes
    lac: LacSettings
    calibration: Calibration
    groups: Mapping[str, Mapping[Phase, LayerStatistics]]

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(phases)) for name, phases in sorted(self.groups.items())}
        object.__setattr__(self, "groups", MappingProxyType(frozen))
        if len(self.sizes.layers) != self.model.num_layers:
            raise ValueError(f"sizes of {len(self.sizes.layers)} layers, not {self.model.num_layers}")
        for phases in frozen.values():
            for statistics in phases.values():
                if len(statistics.active) != self.model.num_layers:
                    raise ValueError(f"statistics of {len(statistics.active)} layers, not {self.model.num_layers}")

    def statistics(self, phase: Phase) -> LayerStatistics:
        """All groups of a phase together."""
        total = empty_statistics(self.model.num_layers)
        for phases in self.groups.values():
            total += phases[phase]
        return total

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key(KIND, VERSION),
            "model": self.model.to_document(),
            "sizes": self.sizes.to_document(),
            "lac": {"alpha": self.lac.alpha, "arithmetic": self.lac.arithmetic},
            "calibration": {
                "num_samples": self.calibration.num_samples,
                "responses": self.calibration.responses,
                "max_new_tokens": self.calibration.max_new_tokens,
                "fingerprints": list(self.calibration.fingerprints),
            },
            "groups": {
                name: {
                    str(phase): {
                        "num_tokens": statistics.num_tokens,
                        "active": list(statistics.active),
                        "cosine_distance": list(statistics.cosine_distance),
                        "relative_change": list(statistics.relative_change),
                    }
                    for phase, statistics in phases.items()
                }
                for name, phases in self.groups.items()
            },
        }

    @classmethod
    def from_document(cls, document: artifacts.Document, *, place: str) -> Profile:
        artifacts.check_keys(document, required={"schema", *cls.__dataclass_fields__}, place=place)
        try:
            calibration = dict(document["calibration"])
            return cls(
                model=ModelIdentity.from_document(document["model"], place=place),
                sizes=ModelSizes.from_document(document["sizes"], place=place),
                lac=LacSettings(**document["lac"]),
                calibration=Calibration(**{**calibration, "fingerprints": tuple(calibration["fingerprints"])}),
                groups={
                    name: {phase: _parse_statistics(phases[str(phase)]) for phase in Phase}
                    for name, phases in document["groups"].items()
                },
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{place} is broken: {error}", hint="run voidprune profile again") from error


def _parse_statistics(document: Any) -> LayerStatistics:
    return LayerStatistics(
        num_tokens=int(document["num_tokens"]),
        active=tuple(int(count) for count in document["active"]),
        cosine_distance=tuple(float(value) for value in document["cosine_distance"]),
        relative_change=tuple(float(value) for value in document["relative_change"]),
    )


def merge_profiles(first: Profile, second: Profile) -> Profile:
    """Both calibration runs as one. Raises ArtifactError where models or settings differ."""
    for attribute in ("model", "sizes", "lac"):
        if getattr(first, attribute) != getattr(second, attribute):
            raise ArtifactError(f"profiles of different {attribute} cannot be merged")
    one, other = first.calibration, second.calibration
    if (one.responses, one.max_new_tokens) != (other.responses, other.max_new_tokens):
        raise ArtifactError("profiles with different responses cannot be merged")
    groups: dict[str, Mapping[Phase, LayerStatistics]] = dict(first.groups)
    for name, phases in second.groups.items():
        mine = groups.get(name)
        groups[name] = phases if mine is None else {phase: mine[phase] + phases[phase] for phase in Phase}
    return Profile(
        model=first.model,
        sizes=first.sizes,
        lac=first.lac,
        calibration=Calibration(
            num_samples=one.num_samples + other.num_samples,
            responses=one.responses,
            max_new_tokens=one.max_new_tokens,
            fingerprints=one.fingerprints + other.fingerprints,
        ),
        groups=groups,
    )


def read_profile(path: Path) -> Profile:
    document = artifacts.read_document(path, kind=KIND, version=VERSION)
    return Profile.from_document(document, place=str(path))


def write_profile(path: Path, profile: Profile, *, overwrite: bool = False) -> None:
    artifacts.write_file(path, artifacts.canonical_bytes(profile.to_document()), overwrite=overwrite)


def _add(first: Sequence[Any], second: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(one + other for one, other in zip(first, second, strict=True))
