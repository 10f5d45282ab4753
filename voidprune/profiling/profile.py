"""What was measured, per phase and layer. Pure values; profiles of the same model and settings merge by addition.

Everything is a count or a sum over tokens, so that a mean over any union of samples is one division. Sums are kept in
NUM_BLOCKS blocks a group: sample i of a group belongs to block i mod NUM_BLOCKS. A profile therefore has one size however many
samples it saw, and the differences between its blocks say how sure its means are. Sums are whole multiples of GRID: below two
million they add without rounding, so the order of samples and of merges leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.models.sizes import ModelSizes
from voidprune.schedule import ModelIdentity, Phase, Scalar

KIND, VERSION = "profile", 2
NUM_BLOCKS = 32
GRID = 2.0**-32
MEASURES = ("active", "cosine_distance", "relative_change", "attention_distance", "mlp_distance")
"""The sums of LayerStatistics that have one entry a layer."""


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the tokens of one phase, one entry a layer, and sums over its samples, one entry a span of layers.

    `active`: tokens for which LAC calls the layer active. `cosine_distance`: sum of 1 - cos(state before, state after the
    layer). `relative_change`: sum of |after - before| / |before|, L2 norms. With a and m what the two sublayers add to the
    residual stream: `attention_distance`: sum of 1 - cos(before, before + a). `mlp_distance`: sum of 1 - cos(after - m, after).

    `span_distance`: sum over samples of arccos(cos(state before layer s, state before layer e)) / pi at the phase's last token,
    where "before layer L" is after the last; for s = 0 .. L-1 and for each s for e = s+1 .. L. `num_spans`: how many samples.
    """

    num_tokens: int
    active: tuple[int, ...]
    cosine_distance: tuple[float, ...]
    relative_change: tuple[float, ...]
    attention_distance: tuple[float, ...]
    mlp_distance: tuple[float, ...]
    num_spans: int
    span_distance: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(len(getattr(self, name)) != self.num_layers for name in MEASURES):
            raise ValueError("statistics of several numbers of layers")
        if len(self.span_distance) != self.num_layers * (self.num_layers + 1) // 2:
            raise ValueError("the spans are not those of the layers")
        if not 0 <= self.num_spans <= self.num_tokens or any(
            not 0 <= count <= self.num_tokens for count in self.active
        ):
            raise ValueError("a layer is active for more tokens than there are")

    @property
    def num_layers(self) -> int:
        return len(self.active)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return sum_statistics((self, other), num_layers=self.num_layers)

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

    @property
    def attention_influence(self) -> tuple[float, ...]:
        """1 - mean cosine of the states before and after attention was added (LLM-Drop, arXiv 2406.15786)."""
        return self.mean(self.attention_distance)

    @property
    def mlp_influence(self) -> tuple[float, ...]:
        """1 - mean cosine of the states before and after the MLP was added (LLM-Drop, arXiv 2406.15786)."""
        return self.mean(self.mlp_distance)

    def angular_distances(self, length: int) -> tuple[float, ...]:
        """Mean angular distance over `length` layers for each first layer 0 .. L - length, in half turns (arXiv 2403.17887)."""
        return tuple(
            self.span_distance[span_index(self.num_layers, start, length)] / max(1, self.num_spans)
            for start in range(self.num_layers - length + 1)
        )


def span_index(num_layers: int, start: int, length: int) -> int:
    """Where `span_distance` holds the span of `length` layers from `start` on."""
    assert 0 <= start < start + length <= num_layers
    return start * num_layers - start * (start - 1) // 2 + length - 1


def empty_statistics(num_layers: int) -> LayerStatistics:
    zeros = (0.0,) * num_layers
    return LayerStatistics(
        0, (0,) * num_layers, zeros, zeros, zeros, zeros, 0, (0.0,) * (num_layers * (num_layers + 1) // 2)
    )


def sum_statistics(statistics: Iterable[LayerStatistics], *, num_layers: int) -> LayerStatistics:
    """All of them together."""
    parts = tuple(statistics) or (empty_statistics(num_layers),)

    def total(name: str) -> tuple[Any, ...]:
        return tuple(map(sum, zip(*(getattr(part, name) for part in parts), strict=True)))

    return LayerStatistics(
        num_tokens=sum(part.num_tokens for part in parts),
        **{name: total(name) for name in MEASURES},
        num_spans=sum(part.num_spans for part in parts),
        span_distance=total("span_distance"),
    )


Blocks = tuple[LayerStatistics, ...]
"""The NUM_BLOCKS blocks of one group and phase; a block without samples is empty."""


@dataclass(frozen=True)
class Calibration:
    """What was run: how many samples, where responses came from ("generate" or "dataset"), hashes of the token ids.

    `origin` is what else `voidprune profile` was asked for, by the names of its options. It has no influence on what is measured;
    files that older versions wrote have none.
    """

    num_samples: int
    responses: str
    max_new_tokens: int
    fingerprints: tuple[str, ...]
    origin: Mapping[str, Scalar] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.origin, Mapping) or not all(isinstance(one, Scalar) for one in self.origin.values()):
            raise ValueError("the origin of the calibration holds more than plain values")
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
    """Statistics of one model, by group (a dataset or task tag), phase and block; `sizes` lets a planner cost what it plans."""

    model: ModelIdentity
    sizes: ModelSizes
    lac: LacSettings
    calibration: Calibration
    groups: Mapping[str, Mapping[Phase, Blocks]]

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(phases)) for name, phases in sorted(self.groups.items())}
        object.__setattr__(self, "groups", MappingProxyType(frozen))
        if len(self.sizes.layers) != self.model.num_layers:
            raise ValueError(f"sizes of {len(self.sizes.layers)} layers, not {self.model.num_layers}")
        for blocks in (blocks for phases in frozen.values() for blocks in phases.values()):
            if len(blocks) != NUM_BLOCKS:
                raise ValueError(f"{len(blocks)} blocks, not {NUM_BLOCKS}")
            for statistics in blocks:
                if statistics.num_layers != self.model.num_layers:
                    raise ValueError(f"statistics of {statistics.num_layers} layers, not {self.model.num_layers}")

    def statistics(self, phase: Phase) -> LayerStatistics:
        """All groups of a phase together."""
        return sum_statistics(
            (block for phases in self.groups.values() for block in phases[phase]), num_layers=self.model.num_layers
        )

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
                **({"origin": dict(self.calibration.origin)} if self.calibration.origin else {}),
            },
            "groups": {
                name: {str(phase): _write_blocks(blocks) for phase, blocks in phases.items()}
                for name, phases in self.groups.items()
            },
        }

    @classmethod
    def from_document(cls, document: artifacts.Document, *, place: str) -> Profile:
        artifacts.check_keys(document, required={"schema", *cls.__dataclass_fields__}, place=place)
        try:
            calibration = dict(document["calibration"])
            sizes = ModelSizes.from_document(document["sizes"], place=place)
            return cls(
                model=ModelIdentity.from_document(document["model"], place=place),
                sizes=sizes,
                lac=LacSettings(**document["lac"]),
                calibration=Calibration(**{**calibration, "fingerprints": tuple(calibration["fingerprints"])}),
                groups={
                    name: {
                        phase: _parse_blocks(phases[str(phase)], num_layers=len(sizes.layers), place=place)
                        for phase in Phase
                    }
                    for name, phases in document["groups"].items()
                },
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{place} is broken: {error}", hint="run voidprune profile again") from error


def _write_blocks(blocks: Blocks) -> artifacts.Document:
    """Blocks by number; empty ones are left out."""
    return {
        str(number): {
            field.name: list(value) if isinstance(value := getattr(block, field.name), tuple) else value
            for field in fields(LayerStatistics)
        }
        for number, block in enumerate(blocks)
        if block.num_tokens
    }


def _parse_blocks(document: Any, *, num_layers: int, place: str) -> Blocks:
    blocks = [empty_statistics(num_layers)] * NUM_BLOCKS
    for number, block in document.items():
        artifacts.check_keys(block, required=LayerStatistics.__dataclass_fields__, place=f"{place}, block {number}")
        if number not in map(str, range(NUM_BLOCKS)):
            raise ValueError(f"there is no block {number}")
        blocks[int(number)] = LayerStatistics(
            num_tokens=int(block["num_tokens"]),
            active=tuple(int(count) for count in block["active"]),
            **{name: tuple(float(value) for value in block[name]) for name in (*MEASURES[1:], "span_distance")},
            num_spans=int(block["num_spans"]),
        )
    return tuple(blocks)


def merge_profiles(first: Profile, second: Profile) -> Profile:
    """Both calibration runs as one, block by block. Raises ArtifactError where models or settings differ."""
    for attribute in ("model", "sizes", "lac"):
        if getattr(first, attribute) != getattr(second, attribute):
            raise ArtifactError(f"profiles of different {attribute} cannot be merged")
    one, other = first.calibration, second.calibration
    if (one.responses, one.max_new_tokens) != (other.responses, other.max_new_tokens):
        raise ArtifactError("profiles with different responses cannot be merged")
    groups: dict[str, Mapping[Phase, Blocks]] = dict(first.groups)
    for name, phases in second.groups.items():
        mine = groups.get(name)
        groups[name] = phases if mine is None else {phase: _add(mine[phase], phases[phase]) for phase in Phase}
    return Profile(
        model=first.model,
        sizes=first.sizes,
        lac=first.lac,
        calibration=Calibration(
            num_samples=one.num_samples + other.num_samples,
            responses=one.responses,
            max_new_tokens=one.max_new_tokens,
            fingerprints=tuple(sorted(one.fingerprints + other.fingerprints)),
            origin=dict(one.origin.items() & other.origin.items()),
        ),
        groups=groups,
    )


def read_profile(path: Path) -> Profile:
    document = artifacts.read_document(path, kind=KIND, version=VERSION)
    return Profile.from_document(document, place=str(path))


def write_profile(path: Path, profile: Profile, *, overwrite: bool = False) -> None:
    artifacts.write_file(path, artifacts.canonical_bytes(profile.to_document()), overwrite=overwrite)


def _add(first: Blocks, second: Blocks) -> Blocks:
    return tuple(one + other for one, other in zip(first, second, strict=True))
