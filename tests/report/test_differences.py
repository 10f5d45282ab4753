"""What differs between two schedules or profiles, and whether it is more than chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from tests.conftest import MakeBundle
from tests.profiling.test_profile import make_profile
from tests.tables import wide_profile
from tests.tiny_models import TinyModel
from voidprune import artifacts
from voidprune.models.sizes import measure_sizes
from voidprune.planning.costs import schedule_costs
from voidprune.profiling.profile import LacSettings, write_profile
from voidprune.report.differences import MEASURES, compare_files
from voidprune.schedule import Phase, dropped_schedule, full_schedule, write_schedule


def test_a_folder_stands_for_its_schedule_and_knows_its_costs(
    llama: TinyModel, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    schedule = dropped_schedule(llama.identity, [1])
    bundle = make_bundle(llama, schedule)
    whole = full_schedule(llama.identity)
    write_schedule(tmp_path / "whole.json", whole)
    document = compare_files(bundle.folder, tmp_path / "whole.json")
    assert document["different_layers"] == {"prefill": [1], "decode": [1]}
    assert document["in_checkpoint"] == [llama.identity.num_layers - 1, llama.identity.num_layers]
    sizes = measure_sizes(llama.checkpoint)
    assert document["costs"] == [vars(schedule_costs(sizes, schedule)), None]
    settings = {one["name"]: one["values"] for one in document["settings"]}
    assert settings["precision"] == ["fp32", None]
    assert settings["operators"] == ["ort", None]


def test_profiles_name_what_was_asked_differently(tmp_path: Path) -> None:
    one = make_profile()
    other = replace(make_profile(group="more", scale=2), lac=LacSettings(alpha=0.5))
    write_profile(tmp_path / "a.json", one)
    write_profile(tmp_path / "b.json", replace(other, model=replace(other.model, name="tuned")))
    document = compare_files(tmp_path / "a.json", tmp_path / "b.json")
    different = {entry["name"]: entry["values"] for entry in document["settings"] if not entry["same"]}
    assert different["alpha"] == [0.8, 0.5]
    assert different["model"] == ["tiny", "tuned"]
    assert different["samples"] == [2, 4]
    assert different["groups"] == ["default", "more"]
    assert "token ids" in different
    prefill = document["measures"]["layer"]["prefill"]
    assert prefill["values"][0] == prefill["values"][1]  # twice the sums over twice the tokens
    assert document["measures"]["layer"]["decode"]["standing_out"] is None  # one block of samples
    artifacts.canonical_bytes(document)


def test_what_stands_out_is_where_the_intervals_part(tmp_path: Path) -> None:
    for seed in range(2):
        write_profile(tmp_path / f"{seed}.json", wide_profile(6, seed=seed))
    found = compare_files(tmp_path / "0.json", tmp_path / "1.json")["measures"]
    assert set(found) == set(MEASURES)
    for name in MEASURES:
        for phase in Phase:
            one = found[name][phase]
            for layer, (mine, theirs) in enumerate(zip(*one["intervals"], strict=True)):
                assert (layer in one["standing_out"]) == (mine[1] < theirs[0] or theirs[1] < mine[0])
            assert one["rank_correlation"] == pytest.approx(spearmanr(*one["values"]).statistic)
    assert any(one["standing_out"] for phases in found.values() for one in phases.values())
    same = compare_files(tmp_path / "0.json", tmp_path / "0.json")["measures"]["layer"]["prefill"]
    assert same["standing_out"] == []
    assert same["rank_correlation"] == pytest.approx(1)
