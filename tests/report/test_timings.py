"""A benchmark is read by the few keys that every version of it has."""

from __future__ import annotations

import pytest

from tests.report.documents import benchmark
from voidprune.report.timings import read_timings


def test_times_ratios_and_conditions_are_read() -> None:
    timings = read_timings({**benchmark(ratio=0.5, spread=0.2), "more": [1, 2, 3]})
    assert (timings.whole.name, timings.pruned.name) == ("whole model", "pruned")
    assert timings.pruned.ttft_ratio.median == 0.5
    assert timings.pruned.ttft_ratio.width == pytest.approx(0.2)
    assert dict(timings.conditions)["prompt, tokens"] == "128"
    assert timings.interval_name == "96% interval"
    assert "threads" not in dict(timings.conditions), "as many as the runtime takes"


def test_what_is_not_known_of_the_conditions_is_left_out() -> None:
    document = benchmark()
    del document["machine"]
    assert "machine" not in dict(read_timings(document).conditions)


@pytest.mark.parametrize("confidence", [0.0, None])
def test_one_round_has_no_interval_to_name(confidence: float | None) -> None:
    """Older versions wrote a confidence of 0."""
    assert read_timings({**benchmark(), "num_rounds": 1, "confidence": confidence}).interval_name == ""
