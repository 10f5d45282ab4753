"""Rates are measured in every way that is asked for; how high they are is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from voidprune.execution.manifest import read_manifest
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.precision import PackingRequest
from voidprune.quality.floors import RateMeter, Rates
from voidprune.quality.work import Work
from voidprune.schedule import full_schedule


@pytest.mark.parametrize(
    ("packing", "ways"),
    [
        (None, {"float32"}),
        (PackingRequest("int8"), {"float32", "8 bits in blocks of 32", "8 by 8 bits"}),
        (PackingRequest("int8", activations="fp32"), {"float32", "8 bits in blocks of 32"}),
        pytest.param(PackingRequest("w8a8"), {"float32", "8 by 8 bits"}, marks=pytest.mark.integer_products),
    ],
)
def test_every_way_that_a_bundle_could_be_multiplied(
    tmp_path: Path, packing: PackingRequest | None, ways: set[str]
) -> None:
    checkpoint = open_model("demo")
    schedule = full_schedule(checkpoint.identity)
    export_model(checkpoint, schedule, tmp_path / "bundle", formats=("onnx",), packing=packing, provider="cpu")
    meter = RateMeter(read_manifest(tmp_path / "bundle"), provider="cpu", threads=2, step_bytes=1_000_003)
    rates = meter.measure()
    assert set(rates.flops_per_second) == ways
    assert len(rates.bytes_per_second) == 3
    assert min(*rates.flops_per_second.values(), *rates.bytes_per_second.values()) > 0


def test_the_floor_is_what_takes_longer_at_the_best_rate() -> None:
    rates = Rates({"one": 10.0, "other": 20.0}, {"one": 100.0, "other": 50.0})
    assert rates.seconds(Work(bytes=40, flops=100)) == rates.reading_seconds(Work(40, 0)) == 2.0
    assert rates.seconds(Work(bytes=40, flops=500)) == rates.multiplying_seconds(Work(0, 500)) == 5.0
