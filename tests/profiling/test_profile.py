"""Profiles: merging by addition, round trips, and files that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.profiling.profile import (
    NUM_BLOCKS,
    Blocks,
    Calibration,
    LacSettings,
    LayerStatistics,
    Profile,
    empty_statistics,
    merge_profiles,
    read_profile,
    span_index,
    sum_statistics,
    write_profile,
)
from voidprune.schedule import ModelIdentity, Phase

GOLDEN = Path(__file__).parent.parent / "golden" / "profile.json"


def fill_blocks(*statistics: LayerStatistics) -> Blocks:
    """The given blocks, and empty ones behind them."""
    return (*statistics, *[empty_statistics(statistics[0].num_layers)] * (NUM_BLOCKS - len(statistics)))


def make_profile(*, group: str = "default", scale: int = 1) -> Profile:
    layer = LayerSizes(100, 60, 20, 40, 15, 5, 10)

    def block(num_tokens: int, active: tuple[int, int], *measures: tuple[float, ...]) -> LayerStatistics:
        cosine, relative, attention, mlp, spans = (tuple(value * scale for value in measure) for measure in measures)
        return LayerStatistics(
            num_tokens * scale, (active[0] * scale, active[1] * scale), cosine, relative, attention, mlp, scale, spans
        )

    prefill = fill_blocks(
        block(6, (6, 3), (0.375, 0.125), (1.5, 0.5), (0.25, 0.125), (0.5, 0.0), (0.125, 0.25, 0.5)),
        block(4, (4, 1), (0.125, 0.125), (0.5, 0.5), (0.25, 0.125), (0.5, 0.0), (0.25, 0.5, 0.25)),
    )
    decode = fill_blocks(
        block(4, (2, 4), (1.0, 0.5), (4.0, 0.5), (0.5, 0.25), (0.75, 0.125), (0.5, 0.5, 0.125)),
    )
    return Profile(
        model=ModelIdentity("tiny", "llama", 2, "sha256:abc"),
        sizes=ModelSizes((layer, layer), 50, 30, 8, 16, 4),
        lac=LacSettings(alpha=0.8),
        calibration=Calibration(2 * scale, "dataset", 0, (f"sha256:{group}{scale}",)),
        groups={group: {Phase.PREFILL: prefill, Phase.DECODE: decode}},
    )


def test_means_are_sums_over_tokens() -> None:
    statistics = make_profile().statistics(Phase.PREFILL)
    assert statistics.activation_frequency == (1.0, 0.4)
    assert statistics.block_influence == (0.05, 0.025)
    assert statistics.relative_norm_change == (0.2, 0.1)
    assert statistics.attention_influence == (0.05, 0.025)
    assert statistics.mlp_influence == (0.1, 0.0)


def test_spans_are_means_over_samples() -> None:
    statistics = make_profile().statistics(Phase.PREFILL)
    assert statistics.angular_distances(1) == (0.375 / 2, 0.75 / 2)
    assert statistics.angular_distances(2) == (0.75 / 2,)


def test_the_triangle_of_spans_is_numbered_without_gaps() -> None:
    numbers = [span_index(5, start, end - start) for start in range(5) for end in range(start + 1, 6)]
    assert numbers == list(range(15))


def test_merging_adds_groups_and_counts_block_by_block() -> None:
    merged = merge_profiles(make_profile(), merge_profiles(make_profile(scale=2), make_profile(group="other")))
    assert merged.statistics(Phase.DECODE).num_tokens == 4 + 8 + 4
    assert [block.active for block in merged.groups["default"][Phase.PREFILL][:3]] == [(18, 9), (12, 3), (0, 0)]
    assert merged.calibration.num_samples == 2 + 4 + 2
    assert merged.calibration.fingerprints == ("sha256:default1", "sha256:default2", "sha256:other1")


def test_merging_does_not_depend_on_the_order() -> None:
    parts = make_profile(), make_profile(scale=3), make_profile(group="other")
    one = merge_profiles(merge_profiles(parts[0], parts[1]), parts[2])
    other = merge_profiles(parts[2], merge_profiles(parts[1], parts[0]))
    assert artifacts.canonical_bytes(one.to_document()) == artifacts.canonical_bytes(other.to_document())


def test_the_sum_of_nothing_is_empty() -> None:
    assert sum_statistics((), num_layers=2) == empty_statistics(2)


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
        (("groups", "default", "prefill", "0", "active"), [1]),
        (("groups", "default", "prefill", "0", "active"), [11, 0]),
        (("groups", "default", "prefill", "0", "span_distance"), [0.5]),
        (("groups", "default", "prefill", "0", "num_spans"), 7),
        (("groups", "default", "prefill", "0", "median"), 0.5),
        (("groups", "default", "prefill", "0"), 3),
        (("groups", "default", "prefill", "32"), "same"),
        (("groups", "default", "prefill", "01"), "same"),
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
    place[path[-1]] = place["0"] if value == "same" else value
    (tmp_path / "profile.json").write_bytes(artifacts.canonical_bytes(document))
    with pytest.raises(ArtifactError, match=r"profile\.json"):
        read_profile(tmp_path / "profile.json")


def test_what_was_asked_for_is_kept_where_profiles_agree(tmp_path: Path) -> None:
    """Of a file without it, nothing is known."""
    first, second = make_profile(), make_profile(group="other", scale=2)
    assert "origin" not in first.to_document()["calibration"]
    asked = replace(first, calibration=replace(first.calibration, origin={"dtype": "fp32", "num_samples": 2}))
    write_profile(tmp_path / "p.json", asked)
    assert read_profile(tmp_path / "p.json") == asked
    other = replace(second, calibration=replace(second.calibration, origin={"dtype": "fp32", "num_samples": 4}))
    assert merge_profiles(asked, other).calibration.origin == {"dtype": "fp32"}
    assert merge_profiles(asked, second).calibration.origin == {}
    with pytest.raises(ValueError, match="plain values"):
        replace(first.calibration, origin={"dtype": ["fp32"]})
