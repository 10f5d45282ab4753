"""A benchmark of two bundles has every figure; how fast they are is not tested."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from voidprune.cli import main
from voidprune.errors import ContextLengthError, NoiseError
from voidprune.execution import detached_head
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.quality.bench import run_benchmark
from voidprune.quality.process_memory import PHASES
from voidprune.quality.work import measure_work
from voidprune.schedule import dropped_schedule
from voidprune.tables import benchmark_table


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "pruned"
    checkpoint = open_model("demo")
    export_model(checkpoint, dropped_schedule(checkpoint.identity, [2, 5]), folder, provider="cpu")
    return folder


def test_two_bundles_side_by_side(pruned_folder: Path) -> None:
    sizes = {"num_new_tokens": 3, "num_rounds": 2}
    document = benchmark_bundle(
        pruned_folder,
        baseline="demo",
        provider="cpu",
        prompt_lengths=(8, 5),
        context_lengths=(4, 9, 6),
        batch_sizes=(1, 3),
        **sizes,
    )
    whole, pruned = document["timings"]
    assert (whole["name"], pruned["name"]) == ("whole model", "pruned")
    assert whole["ttft_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for name in ("weight_bytes", "disk_bytes"):
        assert pruned[name] < whole[name]
    for timing in (whole, pruned):
        assert timing["precision"] == "fp32"
        assert timing["peak_resident_bytes"] > timing["weight_bytes"]
        assert set(timing["resident_bytes"]) == set(PHASES)
        assert timing["disk_bytes"] > timing["weight_bytes"] + timing["graph_bytes"]
        assert [(case["length"], case["num_rows"]) for case in timing["prefill"]] == [(8, 1), (5, 1), (8, 3), (5, 3)]
        assert [(case["length"], case["num_rows"]) for case in timing["decode"]] == [
            (length, rows) for rows in (1, 3) for length in (4, 9, 6)
        ]
        for name in ("ttft", "tpot", "load_seconds"):
            assert 0 < timing[name]["low"] <= timing[name]["median"] <= timing[name]["high"]
        assert timing["ttft"] == timing["prefill"][0]["seconds"]
        assert timing["tpot_ratio"] == timing["decode"][0]["ratio"]
        assert set(timing["nodes"]) == {"prefill", "decode"}
        assert set(timing["nodes"]["decode"]) == {"CPUExecutionProvider"}
    for one, other in zip(whole["decode"], pruned["decode"], strict=True):
        assert other["bytes"] < one["bytes"]
        assert other["flops"] < one["flops"]
    assert {name: document[name] for name in sizes} == sizes
    assert (document["prompt_length"], document["context_length"], document["batch_size"]) == (8, 4, 1)
    assert document["clocks"] is None
    identity = open_model("demo").identity
    assert (document["model"], document["model_fingerprint"]) == (identity.name, identity.fingerprint)


def test_the_floor_of_greedy_decoding_is_that_of_the_head_in_8_bits(
    pruned_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detached_head, "LEAST_BYTES", 0)
    found = run_benchmark(
        {"one": pruned_folder}, prompt_lengths=(4,), context_lengths=(4,), num_new_tokens=1, num_rounds=1
    )
    work = measure_work(pruned_folder)
    for case, whole, screened in (
        (found.timings[0].prefill[0], work.prefill(4, num_rows=1), work.greedily().prefill(4, num_rows=1)),
        (found.timings[0].decode[0], work.decode(5, num_rows=1), work.greedily().decode(5, num_rows=1)),
    ):
        assert case.bytes == screened.bytes < whole.bytes


def test_a_run_that_says_nothing_is_refused(pruned_folder: Path) -> None:
    """No two rounds take the same time, so no interval is as narrow as nothing."""
    with pytest.raises(NoiseError, match="0% is allowed") as refused:
        benchmark_bundle(
            pruned_folder,
            baseline="demo",
            provider="cpu",
            prompt_lengths=(4,),
            context_lengths=(4,),
            num_new_tokens=2,
            num_rounds=2,
            max_spread=0.0,
        )
    assert refused.value.exit_code == 1
    assert "--rounds" in str(refused.value.hint)


@pytest.mark.parametrize("lengths", [{"prompt_lengths": (513,)}, {"context_lengths": (500,)}])
def test_what_is_too_long_for_the_model_is_refused(pruned_folder: Path, lengths: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ContextLengthError, match="context is 512"):
        run_benchmark({"one": pruned_folder}, num_new_tokens=16, num_rounds=1, **lengths)  # type: ignore[arg-type]


def test_one_bundle_alone_has_ratios_of_one(pruned_folder: Path) -> None:
    found = run_benchmark(
        {"one": pruned_folder}, prompt_lengths=(4,), context_lengths=(4,), num_new_tokens=2, num_rounds=3
    )
    (timing,) = found.timings
    assert timing.tpot_ratio.median == 1.0
    assert math.isclose(found.confidence, 0.75)


def test_one_round_has_no_intervals(pruned_folder: Path) -> None:
    """Neither a confidence nor a width, and none is printed or asked for."""
    small = {"prompt_lengths": (4,), "context_lengths": (4,), "num_new_tokens": 2}
    document = benchmark_bundle(
        pruned_folder, baseline="demo", provider="cpu", num_rounds=1, max_spread=0.0, **small
    )  # fmt: skip
    assert (document["confidence"], document["widest"]) == (None, None)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(benchmark_table(document))
    text = " ".join(console.export_text().split())
    assert "one round, so there are no intervals" in text
    assert "interval of a ratio" not in text
    assert not re.search(r"\d \(\d", text)
    refused = CliRunner().invoke(
        main, ["bench", str(pruned_folder), "--baseline", "demo", "--rounds", "1", "--max-spread", "0.5"]
    )
    assert refused.exit_code == 2
    assert "one round has no intervals" in refused.stderr
