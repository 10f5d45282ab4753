"""A benchmark as a picture: a line for each bundle and batch size, the same bytes from the same figures."""

from __future__ import annotations

from xml.etree import ElementTree

from voidprune import artifacts
from voidprune.plots.benchmarks import plot_benchmark


def make_benchmark() -> artifacts.Document:
    """What a picture of a benchmark is made of: two bundles, two lengths, one and four rows."""

    def case(length: int, rows: int, milliseconds: float) -> artifacts.Document:
        median = milliseconds / 1e3
        return {
            "length": length,
            "num_rows": rows,
            "seconds": {"median": median, "low": 0.9 * median, "high": 1.2 * median},
            "floor_seconds": {"median": 0.8 * median, "low": 0.7 * median, "high": 0.9 * median},
        }

    timings = [
        {
            "name": name,
            **{
                phase: [case(length, rows, slow * length) for rows in (1, 4) for length in (64, 8)]
                for phase in ("prefill", "decode")
            },
        }
        for name, slow in (("whole model", 2.0), ("pruned", 1.0))
    ]
    return {"provider": "cpu", "timings": timings}


def test_a_benchmark_is_a_line_for_each_bundle_and_batch_size() -> None:
    picture = plot_benchmark(make_benchmark(), format="svg")
    assert picture == plot_benchmark(make_benchmark(), format="svg")
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(picture).iter()]
    for expected in ("whole model", "pruned, 4 rows", "TTFT, ms", "TPOT, ms"):
        assert expected in texts
    assert plot_benchmark(make_benchmark(), format="png").startswith(b"\x89PNG")
