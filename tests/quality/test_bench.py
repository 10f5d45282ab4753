"""A benchmark of two bundles has every figure; how fast they are is not tested."""

from __future__ import annotations

from pathlib import Path

from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.schedule import dropped_schedule


def test_two_bundles_side_by_side(tmp_path: Path) -> None:
    checkpoint = open_model("demo")
    export_model(checkpoint, dropped_schedule(checkpoint.identity, [2, 5]), tmp_path / "pruned", provider="cpu")
    sizes = {"prompt_length": 8, "num_new_tokens": 3, "num_rounds": 2}
    document = benchmark_bundle(tmp_path / "pruned", baseline="demo", provider="cpu", **sizes)
    whole, pruned = document["timings"]
    assert (whole["name"], pruned["name"]) == ("whole model", "pruned")
    assert whole["ttft_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert pruned["weight_bytes"] < whole["weight_bytes"]
    for timing in (whole, pruned):
        assert timing["peak_resident_bytes"] > timing["weight_bytes"]
        for name in ("ttft", "tpot"):
            assert 0 < timing[name]["low"] <= timing[name]["median"] <= timing[name]["high"]
    assert {name: document[name] for name in sizes} == sizes
