"""Noise is no regression; what lies beyond it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from voidprune.errors import ArtifactError
from voidprune.quality.regressions import (
    AcceptedRun,
    Change,
    compare_ratios,
    invert_ratio,
    read_accepted,
    write_accepted,
)
from voidprune.quality.spreads import Spread

THEN = Spread(1.10, 1.05, 1.15)


@pytest.mark.parametrize(
    ("now", "worse", "better"),
    [
        (THEN, False, False),
        (Spread(1.20, 1.15, 1.25), False, False),  # the intervals touch
        (Spread(1.20, 1.151, 1.25), True, False),
        (Spread(1.60, 1.00, 2.00), False, False),  # a noisy run proves nothing
        (Spread(1.00, 0.95, 1.049), False, True),
    ],
)
def test_only_what_lies_beyond_both_intervals_counts(now: Spread, worse: bool, better: bool) -> None:
    (change,) = compare_ratios({"decode": THEN}, {"decode": now})
    assert (change.is_worse, change.is_better) == (worse, better)


def test_what_is_no_longer_measured_is_worse_and_what_is_new_is_not() -> None:
    gone, new = compare_ratios({"prefill": THEN}, {"decode": THEN})
    assert (gone.name, new.name) == ("prefill", "decode")
    assert gone.is_worse
    assert not new.is_worse
    assert not new.is_better
    assert str(gone) == "prefill: 1.100 (1.050-1.150) accepted, not measured now"


def test_a_change_speaks_for_itself() -> None:
    change = Change("decode", THEN, Spread(1.0, 0.9, 1.2))
    assert str(change) == "decode: 1.100 (1.050-1.150) accepted, 1.000 (0.900-1.200) now"


def test_a_ratio_the_other_way_round() -> None:
    assert invert_ratio(Spread(2.0, 1.0, 4.0)) == Spread(0.5, 0.25, 1.0)
    assert invert_ratio(invert_ratio(Spread(2.0, 1.0, 4.0))) == Spread(2.0, 1.0, 4.0)


def test_what_was_accepted_is_read_back(tmp_path: Path) -> None:
    run = AcceptedRun({"model": "one", "rounds": 15}, "a machine", {"decode": THEN, "prefill": Spread(2.0, 1.5, 2.5)})
    for _ in range(2):  # the second replaces the first
        write_accepted(run, tmp_path / "accepted.json")
    assert read_accepted(tmp_path / "accepted.json") == run


@pytest.mark.parametrize(
    "ratios", [{"decode": {"median": 1.0}}, {"decode": {"median": 1.0, "low": 2.0, "high": 3.0}}, ["decode"]]
)
def test_broken_files_are_named(tmp_path: Path, ratios: object) -> None:
    write_accepted(AcceptedRun({}, "a machine", {"decode": THEN}), tmp_path / "accepted.json")
    document = json.loads((tmp_path / "accepted.json").read_bytes())
    (tmp_path / "accepted.json").write_text(json.dumps({**document, "ratios": ratios}))
    with pytest.raises(ArtifactError, match=r"accepted\.json is broken"):
        read_accepted(tmp_path / "accepted.json")


def test_what_this_repository_accepts_can_be_read() -> None:
    accepted = read_accepted(Path(__file__).parents[2] / "benchmarks" / "accepted.json")
    assert accepted.ratios
    assert {"model", "rounds", "peers"} <= set(accepted.settings)


def test_the_benchmark_measures_ours_alone(tmp_path: Path) -> None:
    """`make bench` and `make bench-check` run this; a changed signature would only show there."""
    script = Path(__file__).parents[2] / "benchmarks" / "peers.py"
    shape = ["--layers", "2", "--vocabulary", "300", "--prompt", "4", "--context", "4", "--steps", "2", "--rounds", "2"]
    options = [*shape, "--threads", "1", "--peers", "", "--keep", "0.5", "--directory", tmp_path, "-o", tmp_path / "o"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| voidprune int4 |" in done.stdout
    document = json.loads((tmp_path / "o").read_bytes())
    assert [row["same_tokens"] for row in document["rows"]] == ["9/9", "9/9"]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
