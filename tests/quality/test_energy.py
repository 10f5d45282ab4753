"""Counters of energy, as Linux lays them out."""

from __future__ import annotations

from pathlib import Path

from voidprune.quality.energy import find_energy_meter

LIMIT = 1_000_000


def write_counter(folder: Path, name: str, microjoules: int) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "max_energy_range_uj").write_text(f"{LIMIT}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    for name, microjoules in (("intel-rapl:0", 500_000), ("intel-rapl:1", 100_000), ("intel-rapl:0:0", 400_000)):
        write_counter(tmp_path, name, microjoules)
    meter = find_energy_meter("cpu", packages=tmp_path)
    assert meter is not None
    assert meter.source == "processor"
    before = meter.joules()
    write_counter(tmp_path, "intel-rapl:0", 700_000)
    write_counter(tmp_path, "intel-rapl:0:0", 900_000)
    assert round(meter.joules() - before, 9) == 0.2


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 900_000)
    meter = find_energy_meter("cpu", packages=tmp_path)
    assert meter is not None
    before = meter.joules()
    write_counter(tmp_path, "intel-rapl:0", 100_000)
    assert round(meter.joules() - before, 9) == 0.2


def test_no_counter_is_no_meter(tmp_path: Path) -> None:
    assert find_energy_meter("cpu", packages=tmp_path) is None
    assert find_energy_meter("cpu", packages=tmp_path / "absent") is None


def test_a_counter_that_nobody_may_read_is_no_meter(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert find_energy_meter("cpu", packages=tmp_path) is None
