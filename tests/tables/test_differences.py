"""A and B beside each other, within 80 columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tables import cells, numbers_broken_off, render, wide_profile, wide_schedule
from voidprune.profiling.profile import write_profile
from voidprune.report.differences import compare_files
from voidprune.schedule import write_schedule
from voidprune.tables import diff_tables


@pytest.mark.parametrize("num_layers", [4, 32, 80])
def test_schedules(tmp_path: Path, num_layers: int) -> None:
    files = [tmp_path / f"{'a-long-name-' * 8}{seed}.json" for seed in range(2)]
    for seed, file in enumerate(files):
        write_schedule(file, wide_schedule(num_layers, seed=seed))
    document = compare_files(*files, profile=wide_profile(num_layers))
    text = render(*diff_tables(document))
    assert not numbers_broken_off(text)
    different = {layer for layers in document["different_layers"].values() for layer in layers}
    assert [int(number) for number in re.findall(r"^│ +(\d+) │", text, re.MULTILINE)] == sorted(different)
    assert f"{len(different)} of {num_layers} layers differ" in text
    assert text.count("^^") == len(different)
    assert "prefill arithmetic" in text


def test_the_same_schedule_twice_says_so(tmp_path: Path) -> None:
    write_schedule(tmp_path / "s.json", wide_schedule(32))
    text = render(*diff_tables(compare_files(tmp_path / "s.json", tmp_path / "s.json")))
    assert "No layer differs in either phase." in text
    assert "They were made in the same way." in text
    assert "add --profile" in text


def test_profiles(tmp_path: Path) -> None:
    for seed in range(2):
        write_profile(tmp_path / f"{seed}.json", wide_profile(80, seed=seed))
    document = compare_files(tmp_path / "0.json", tmp_path / "1.json")
    text = render(*diff_tables(document))
    assert not numbers_broken_off(text)
    starred = sum(cell.endswith("*") for cell in cells(text))
    assert starred == sum(
        len(one["standing_out"]) for phases in document["measures"].values() for one in phases.values()
    )
    assert starred > 0
    assert "-0.000" not in text
