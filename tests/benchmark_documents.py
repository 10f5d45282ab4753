"""Documents of benchmarks that nobody ran: for what reads them."""

from __future__ import annotations

from voidprune import artifacts
from voidprune.quality.bench import Benchmark, CaseTiming, Timing
from voidprune.quality.spreads import Spread


def benchmark_document(
    *,
    ratio: float = 0.5,
    spread: float = 0.02,
    ttft: float = 0.04,
    tpot: float = 0.002,
    num_bytes: int = 1_000_000,
    name: str = "pruned",
    machine: str = "a machine",
    provider: str = "cpu",
    length: int = 128,
) -> artifacts.Document:
    """The whole model, and one that takes `ratio` of its seconds and bytes; intervals are `spread` of their median wide."""

    def around(value: float) -> Spread:
        return Spread(value, value * (1 - spread / 2), value * (1 + spread / 2))

    def case(seconds: float, scale: float, bound: str) -> CaseTiming:
        return CaseTiming(
            length=length,
            num_rows=1,
            seconds=around(seconds * scale),
            ratio=around(scale),
            floor_seconds=around(seconds * scale / 1.25),
            floor_ratio=around(1.25),
            bytes=int(num_bytes * scale),
            flops=int(2 * num_bytes * scale),
            bound=bound,
            joules=None,
        )

    def timing(name: str, scale: float) -> Timing:
        size = int(num_bytes * scale)
        return Timing(
            name=name,
            precision="fp32",
            ttft=around(ttft * scale),
            tpot=around(tpot * scale),
            ttft_ratio=around(scale),
            tpot_ratio=around(scale),
            ttft_floor_ratio=around(1.25),
            tpot_floor_ratio=around(1.25),
            prefill=(case(ttft, scale, "arithmetic"),),
            decode=(case(tpot, scale, "reading"),),
            load_seconds=around(0.5),
            weight_bytes=size,
            graph_bytes=10,
            disk_bytes=size + 10,
            resident_bytes=dict.fromkeys(("loaded", "prefilled", "decoded"), 50 * size),
            peak_resident_bytes=50 * size,
            device_bytes=None,
            nodes={phase: {"CPUExecutionProvider": 9} for phase in ("prefill", "decode")},
            bytes_per_second={"a sum": around(5e10)},
            flops_per_second={"a product": around(4e11)},
        )

    return {
        "schema": artifacts.schema_key("benchmark", 2),
        "model": "tiny",
        "model_fingerprint": "sha256:abc",
        **Benchmark(
            timings=(timing("whole model", 1.0), timing(name, ratio)),
            prompt_length=length,
            context_length=length,
            batch_size=1,
            num_new_tokens=32,
            num_rounds=15,
            confidence=0.96,
            widest=spread,
            provider=provider,
            threads=None,
            machine=machine,
            load_average=0.1,
            runtime="onnxruntime 1",
            clocks=None,
            energy=None,
            seed=0,
        ).to_document(),
    }
