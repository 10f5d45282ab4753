"""`voidprune diff` as a user meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.profiling.test_profile import make_profile
from tests.test_cli import expect_error, invoke
from voidprune.profiling.profile import write_profile
from voidprune.schedule import LayerAction, full_schedule, write_schedule


@pytest.fixture
def files(tmp_path: Path) -> Path:
    profile = make_profile()
    whole = full_schedule(profile.model)
    write_profile(tmp_path / "p.json", profile)
    write_schedule(tmp_path / "a.json", whole)
    pruned = replace(whole, prefill=(LayerAction.FULL, LayerAction.KV_ONLY), origin={"criterion": "lac"})
    write_schedule(tmp_path / "b.json", pruned)
    other = replace(profile.model, num_layers=3, name="other")
    write_schedule(tmp_path / "other.json", full_schedule(other))
    return tmp_path


def test_two_schedules(files: Path) -> None:
    result = invoke("diff", files / "a.json", files / "b.json", "--profile", files / "p.json")
    assert result.exit_code == 0
    assert "1 of 2 layers differ" in result.stdout
    document = json.loads(invoke("diff", files / "a.json", files / "b.json", "--json").stdout)
    assert document["schema"] == "voidprune.diff/1"
    assert document["different_layers"] == {"prefill": [1], "decode": []}
    assert document["actions"]["prefill"] == [["full", "full"], ["full", "kv_only"]]
    assert document["executed"] == {"prefill": [2, 1], "decode": [2, 2]}
    assert document["costs"] == [None, None]


def test_the_exit_code_does_not_tell(files: Path) -> None:
    assert invoke("diff", files / "a.json", files / "a.json").exit_code == 0


def test_what_cannot_be_compared(files: Path) -> None:
    expect_error("diff", files / "a.json", files / "p.json", message="is a schedule, ")
    expect_error("diff", files / "a.json", files / "other.json", message="of other (llama, 3 layers)")
    expect_error("diff", files / "a.json", files / "absent.json", message="there is no")
    expect_error("diff", files / "p.json", files / "p.json", "--profile", files / "p.json", message="have no costs")
    (files / "c.json").write_text('{"schema": "voidprune.comparison/2"}')
    expect_error("diff", files / "a.json", files / "c.json", message="is of the kind comparison")
    (files / "d.json").write_text("[]")
    expect_error("diff", files / "d.json", files / "a.json", message="not a file of voidprune")
