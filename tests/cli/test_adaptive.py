"""`voidprune eval --adaptive` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import expect_error, invoke

SMALL = ("--tasks", "yes-no", "--num-samples", 1, "--max-new-tokens", 4, "-q")


def test_both_modes_beside_the_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = invoke("eval", "demo", "--adaptive", "readout", "--adaptive", "mask", "--static", *SMALL, "-o", file)
    assert result.exit_code == 0, result.output
    for name in ("whole model", "readout", "fixed readout", "static, as readout", "mask", "random layers", "last"):
        assert name in result.stdout
    shown = invoke("show", file)
    assert shown.exit_code == 0
    assert shown.stdout == result.stdout
    assert json.loads(invoke("show", file, "--json").stdout) == json.loads(file.read_bytes())
    expect_error("eval", "demo", "--adaptive", "mask", *SMALL, "-o", file, message="exists")


def test_settings_reach_the_result() -> None:
    options = (
        "--alpha",
        0.3,
        "--alpha",
        0,
        "--lac-arithmetic",
        "model",
        "--temperature",
        0.6,
        "--top-p",
        0.9,
        "--seed",
        7,
    )
    result = invoke("eval", "demo", "--adaptive", "readout", *options, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["dataset"] == "yes-no"
    assert document["settings"] == {
        "modes": ["readout"],
        "alphas": [0.3, 0.0],
        "arithmetic": "model",
        "static": False,
        "sampling": {"temperature": 0.6, "top_p": 0.9, "top_k": None, "seed": 7},
        "max_new_tokens": 4,
        "batch_size": 32,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", 0.5), "--alpha goes with --adaptive"),
        (("--lac-arithmetic", "model"), "--lac-arithmetic goes with --adaptive"),
        (("--static",), "--static goes with --adaptive"),
        (("--temperature", 0.6), "--temperature goes with --adaptive"),
        (("--top-p", 0.9), "--top-p goes with --adaptive"),
        (("--adaptive", "mask", "--schedule", "s.json"), "--schedule does not go with --adaptive"),
        (("--adaptive", "mask", "--baseline", "demo"), "--baseline does not go with --adaptive"),
        (("--adaptive", "mask", "--provider", "cpu"), "--provider does not go with --adaptive"),
        (("--adaptive", "mask", "--top-p", 0.9), "--top-p goes with --temperature"),
        (("--adaptive", "mask", "--static", "--temperature", 1), "--static answers greedily"),
        (("--adaptive", "mask", "--temperature", 0), "a temperature of 0 is no number above 0"),
        (("--adaptive", "mask", "--temperature", 1, "--top-p", 3), "a top-p of 3 is outside of (0, 1]"),
        (("--adaptive", "mask", "--alpha", "nan"), "--alpha is not a number"),
        (("--adaptive", "mask", "--alpha", -1), "Invalid value for '--alpha'"),
        (("--adaptive", "static"), "Invalid value for '--adaptive'"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[object, ...], message: str) -> None:
    result = invoke("eval", "demo", *SMALL, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_result_with_holes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": "voidprune.adaptive-evaluation/1", "runs": []}')
    expect_error("show", tmp_path / "a.json", message="is not a whole adaptive-evaluation")
