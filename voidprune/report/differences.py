"""Two schedules or two profiles beside each other: what differs, in which phase, and whether it is more than chance.

An exported folder stands for its schedule. Nothing is drawn here; `voidprune.tables.differences` does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.execution import manifest as manifests
from voidprune.execution.manifest import Manifest
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.sizes import measure_sizes
from voidprune.planning import intervals
from voidprune.planning.costs import ScheduleCosts, schedule_costs
from voidprune.planning.criteria import CRITERIA
from voidprune.profiling import profile as profiles
from voidprune.profiling.profile import Profile
from voidprune.report.findings import schema_kind
from voidprune.schedule import KIND as SCHEDULE_KIND
from voidprune.schedule import ModelIdentity, Phase, Schedule, read_schedule

KIND, VERSION = "diff", 1

MEASURES = {
    "active": "lac",
    "layer": "block-influence",
    "change": "relative-norm",
    "attn": "attention-cosine",
    "mlp": "mlp-cosine",
}
"""What is compared of two profiles, by the name that it has in tables, and the criterion that says it of every layer."""


@dataclass(frozen=True)
class _Side:
    """One of the two. A schedule, with the manifest of the folder that it comes from; or a profile."""

    path: Path
    schedule: Schedule | None = None
    manifest: Manifest | None = None
    profile: Profile | None = None

    @property
    def kind(self) -> str:
        return "profile" if self.profile is not None else "schedule"

    @property
    def model(self) -> ModelIdentity:
        found = self.profile or self.schedule
        assert found is not None
        return found.model


def compare_files(first: Path, second: Path, *, profile: Profile | None = None) -> artifacts.Document:
    """Two files or exported folders as a document of schema voidprune.diff/1. `profile` lends the sizes that costs take.

    Raises ArtifactError where they are not two schedules or two profiles, or speak of models of different shapes.
    """
    one, other = _read_side(first), _read_side(second)
    if one.kind != other.kind:
        raise ArtifactError(
            f"{first} is a {one.kind}, {second} is a {other.kind}",
            hint="give two schedules (or exported folders, which hold one), or two profiles",
        )
    if (one.model.fingerprint, one.model.num_layers) != (other.model.fingerprint, other.model.num_layers):
        raise ArtifactError(
            f"{first} is of {one.model.name} ({one.model.model_type}, {one.model.num_layers} layers), "
            f"{second} of {other.model.name} ({other.model.model_type}, {other.model.num_layers} layers)",
            hint="compare files of one model, or of models of the same shape",
        )
    common = {
        "schema": artifacts.schema_key(KIND, VERSION),
        "kind": one.kind,
        "paths": [str(first), str(second)],
        "num_layers": one.model.num_layers,
        "settings": _compare_settings(_settings(one), _settings(other)),
    }
    if one.profile is not None and other.profile is not None:
        if profile is not None:
            raise ArtifactError("profiles have no costs", hint="leave --profile out")
        return {**common, "measures": _compare_measures(one.profile, other.profile)}
    assert one.schedule is not None
    assert other.schedule is not None
    if profile is not None:
        one.schedule.check_model(profile.model, place=str(first))
    return {
        **common,
        "actions": {
            str(phase): [[str(action) for action in schedule.actions(phase)] for schedule in (one.schedule, other.schedule)]
            for phase in Phase
        },
        "executed": {
            str(phase): [schedule.num_executed(phase) for schedule in (one.schedule, other.schedule)] for phase in Phase
        },
        "in_checkpoint": [len(schedule.union) for schedule in (one.schedule, other.schedule)],
        "different_layers": {
            str(phase): [
                layer
                for layer, pair in enumerate(
                    zip(one.schedule.actions(phase), other.schedule.actions(phase), strict=True)
                )
                if pair[0] is not pair[1]
            ]
            for phase in Phase
        },
        "costs": [_costs(side, profile) for side in (one, other)],
    }  # fmt: skip


def _read_side(path: Path) -> _Side:
    file = path / manifests.FILE if path.is_dir() else path
    if not file.exists():
        raise ArtifactError(f"there is no {file}", hint="give a schedule, a profile or an exported folder")
    kind = schema_kind(file)
    if kind == profiles.KIND:
        return _Side(path, profile=profiles.read_profile(file))
    if kind == SCHEDULE_KIND:
        return _Side(path, schedule=read_schedule(file))
    if kind == manifests.KIND:
        manifest = manifests.read_manifest(file.parent)
        return _Side(file.parent, schedule=manifest.schedule, manifest=manifest)
    raise ArtifactError(
        f"{file} is {'not a file of voidprune' if kind is None else f'of the kind {kind}'}",
        hint="give two schedules, two profiles or two exported folders",
    )


def _settings(side: _Side) -> dict[str, Any]:
    """What was asked for, by names that a person reads."""
    settings: dict[str, Any] = {"model": side.model.name}
    if (profile := side.profile) is not None:
        calibration = profile.calibration
        return settings | {
            "alpha": profile.lac.alpha,
            "LAC in": profile.lac.arithmetic,
            "samples": calibration.num_samples,
            "groups": ", ".join(profile.groups),
            "responses": calibration.responses,
            "longest response": calibration.max_new_tokens,
            **{f"{phase} tokens": profile.statistics(phase).num_tokens for phase in Phase},
            "token ids": ", ".join(one.removeprefix("sha256:")[:12] for one in calibration.fingerprints),
        }
    assert side.schedule is not None
    settings |= {"boundary": str(side.schedule.boundary), "single turn": side.schedule.single_turn}
    settings |= {name.replace("_", " "): value for name, value in side.schedule.origin.items()}
    if (manifest := side.manifest) is not None:
        settings |= {
            "precision": manifest.precision,
            "operators": manifest.operators,
            "graphs": ", ".join(dict.fromkeys(graph.file for graph in manifest.graphs.values())) or "none",
            "keys and values": "as computed" if manifest.kv_cache is None else manifest.kv_cache.dtype,
            "healed by": "nothing" if manifest.healing is None else ", ".join(manifest.healing.methods) or "nothing",
        }
    return settings


def _compare_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[artifacts.Document]:
    return [
        {"name": name, "values": [one.get(name), other.get(name)], "same": one.get(name) == other.get(name)}
        for name in dict.fromkeys((*one, *other))
    ]


def _costs(side: _Side, profile: Profile | None) -> artifacts.Document | None:
    """With a profile those that plan prints; of a folder with plain weights those of what it holds; else not known."""
    assert side.schedule is not None
    costs: ScheduleCosts | None = None
    kv_bytes = None if side.manifest is None else side.manifest.kv_bytes_per_token
    if profile is not None:
        costs = schedule_costs(profile.sizes.with_kv_bytes(kv_bytes), side.schedule)
    elif side.manifest is not None and side.manifest.quantization is None:
        checkpoint = open_checkpoint(side.path)
        sizes = measure_sizes(checkpoint).with_kv_bytes(kv_bytes)
        costs = schedule_costs(sizes, side.schedule.on_slim_model(checkpoint.identity))
    if costs is not None:
        return asdict(costs)
    return None if side.manifest is None else {"weight_bytes": side.manifest.graph_weight_bytes}


def _compare_measures(one: Profile, other: Profile) -> artifacts.Document:
    """Per measure and phase: both values of every layer, which layers stand out, and how alike the rankings are."""
    return {
        name: {str(phase): _compare_phase(one, other, criterion, phase) for phase in Phase}
        for name, criterion in MEASURES.items()
    }


def _compare_phase(one: Profile, other: Profile, name: str, phase: Phase) -> artifacts.Document:
    criterion = CRITERIA[name]
    assert criterion.score is not None
    values = [list(criterion.score(profile.statistics(phase), 0)) for profile in (one, other)]
    spreads = []
    for profile in (one, other):
        replicates = intervals.resample_statistics(profile, [phase])
        spreads.append(None if replicates is None else intervals.score_intervals(criterion, replicates))
    standing_out = None
    if spreads[0] is not None and spreads[1] is not None:
        pairs = enumerate(zip(spreads[0], spreads[1], strict=True))
        standing_out = [layer for layer, (mine, theirs) in pairs if mine[1] < theirs[0] or theirs[1] < mine[0]]
    return {
        "values": values,
        "intervals": [None if spread is None else [list(pair) for pair in spread] for spread in spreads],
        "standing_out": standing_out,
        "rank_correlation": _rank_correlation(*values),
    }


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for equal values. None where one of the two is constant."""
    ranks = [_ranks(values) for values in (one, other)]
    middle = (len(one) - 1) / 2
    spreads = [sum((rank - middle) ** 2 for rank in side) for side in ranks]
    if not all(spreads):
        return None
    shared = sum((mine - middle) * (theirs - middle) for mine, theirs in zip(*ranks, strict=True))
    return float(shared / (spreads[0] * spreads[1]) ** 0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
