"""Profiles: merging by addition, round trips, and files that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.profiling.profile import (
    Calibration,
    LacSettings,
    LayerStatistics,
    Profile,
    merge_profiles,
    read_profile,
    write_profile,
)
from voidprune.schedule import ModelIdentity, Phase

GOLDEN = Path(__file__).parent.parent / "golden" / "profile.json"


def make_profile(*, group: str = "default", scale: int = 1) -> Profile:
    layer = LayerSizes(100, 60, 20, 40, 15, 5, 10)
    prefill = LayerStatistics(
        10 * scale, (10 * scale, 4 * scale), (0.5 * scale, 0.25 * scale), (2.0 * scale, 1.0 * scale)
    )
    decode = LayerStatistics(4 * scale, (2 * scale, 4 * scale), (1.0 * scale, 0.5 * scale), (4.0 * scale, 0.5 * scale))
    return Profile(
        model=ModelIdentity("tiny", "llama", 2, "sha256:abc"),
        sizes=ModelSizes((layer, layer), 50, 30, 8, 16, 4),
        lac=LacSettings(alpha=0.8),
        calibration=Calibration(3 * scale, "dataset", 0, (f"sha256:{group}{scale}",)),
        groups={group: {Phase.PREFILL: prefill, Phase.DECODE: decode}},
    )


def test_means_are_sums_over_tokens() -> None:
    statistics = make_profile().statistics(Phase.PREFILL)
    assert statistics.activation_frequency == (1.0, 0.4)
    assert statistics.block_influence == (0.05, 0.025)
    assert statistics.relative_norm_change == (0.2, 0.1)


def test_merging_adds_groups_and_counts() -> None:
    merged = merge_profiles(make_profile(), merge_profiles(make_profile(scale=2), make_profile(group="other")))
    assert merged.statistics(Phase.DECODE).num_tokens == 4 + 8 + 4
    assert merged.groups["default"][Phase.PREFILL].active == (30, 12)
    assert merged.calibration.num_samples == 3 + 6 + 3
    assert merged.calibration.fingerprints == ("sha256:default1", "sha256:default2", "sha256:other1")


@pytest.mark.parametrize(
    "other",
    [
        replace(make_profile(), lac=LacSettings(alpha=0.5)),
        replace(make_profile(), model=ModelIdentity("other", "llama", 2, "sha256:def")),
        replace(make_profile(), calibration=Calibration(3, "generate", 64, ())),
    ],
)
def test_profiles_of_different_settings_do_not_merge(other: Profile) -> None:
    with pytest.raises(ArtifactError, match="cannot be merged"):
        merge_profiles(make_profile(), other)


def test_round_trip_and_golden_bytes(tmp_path: Path) -> None:
    write_profile(tmp_path / "profile.json", make_profile())
    assert (tmp_path / "profile.json").read_bytes() == GOLDEN.read_bytes()
    assert read_profile(GOLDEN) == make_profile()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("groups", "default", "prefill", "active"), [1]),
        (("groups", "default", "prefill", "active"), [11, 0]),
        (("groups", "default", "decode"), None),
        (("lac",), {"alpha": 0.8, "beta": 1}),
        (("sizes", "layers"), [{}]),
        (("calibration", "fingerprints"), 3),
        (("model", "num_layers"), 3),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, path: tuple[str, ...], value: object) -> None:
    document = make_profile().to_document()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "profile.json").write_bytes(artifacts.canonical_bytes(document))
    with pytest.raises(ArtifactError, match=r"profile\.json"):
        read_profile(tmp_path / "profile.json")
