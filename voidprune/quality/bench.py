"""How fast and how large: bundles side by side under onnxruntime, interleaved in one run.

Every round times each bundle once, so that a machine that slows down slows all of them; ratios are taken round by round. TTFT is
one prefill of a prompt (its logits and the first touch of its K/V buffers included); TPOT is the mean over the decode steps that
follow. Memory is measured in a process
of its own: the largest resident set while it loads the bundle and generates, mapped weights included.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from voidprune.errors import RuntimeProviderError
from voidprune.execution.manifest import read_manifest
from voidprune.execution.session import BundleSession


@dataclass(frozen=True)
class Spread:
    """A timing over the rounds, in seconds: median, and first and third quartile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One bundle. Ratios are to the baseline of the same round; `weight_bytes` and `graph_bytes` are on disk."""

    name: str
    ttft: Spread
    tpot: Spread
    ttft_ratio: Spread
    tpot_ratio: Spread
    load_seconds: float
    weight_bytes: int
    graph_bytes: int
    peak_resident_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """A run: what was measured, and on what."""

    timings: tuple[Timing, ...]
    prompt_length: int
    num_new_tokens: int
    num_rounds: int
    provider: str
    threads: int | None
    machine: str
    runtime: str

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


def run_benchmark(
    bundles: Mapping[str, Path],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    prompt_length: int = 128,
    num_new_tokens: int = 32,
    num_rounds: int = 15,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Benchmark:
    """Time bundles against the first of them. `threads` is recorded only: see `providers.size_thread_pool`.

    Raises what `BundleSession` raises, and ContextLengthError.
    """
    sessions, load_seconds = {}, {}
    for name, folder in bundles.items():
        started = time.perf_counter()
        sessions[name] = BundleSession(folder, provider=provider)
        load_seconds[name] = time.perf_counter() - started
    prompt = _random_prompt(next(iter(sessions.values())), prompt_length, seed)
    for session in sessions.values():
        session.start(max_positions=prompt_length + num_new_tokens)
    memory = {name: _peak_memory(folder, provider, prompt_length, num_new_tokens) for name, folder in bundles.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in bundles}
    for round_number in range(num_rounds + 1):
        order = list(sessions) if round_number % 2 else list(reversed(sessions))
        for name in order:
            session = sessions[name]
            measured = _time_once(session, prompt, num_new_tokens)
            if round_number:  # the first round warms up
                samples[name].append(measured)
        if on_progress is not None:
            on_progress(1)
    baseline = samples[next(iter(bundles))]
    return Benchmark(
        timings=tuple(
            Timing(
                name=name,
                ttft=_spread([ttft for ttft, _ in samples[name]]),
                tpot=_spread([tpot for _, tpot in samples[name]]),
                ttft_ratio=_spread([one[0] / whole[0] for one, whole in zip(samples[name], baseline, strict=True)]),
                tpot_ratio=_spread([one[1] / whole[1] for one, whole in zip(samples[name], baseline, strict=True)]),
                load_seconds=load_seconds[name],
                weight_bytes=read_manifest(folder).graph_weight_bytes,
                graph_bytes=sum(path.stat().st_size for path in folder.glob("*.onnx")),
                peak_resident_bytes=memory[name],
            )
            for name, folder in bundles.items()
        ),
        prompt_length=prompt_length,
        num_new_tokens=num_new_tokens,
        num_rounds=num_rounds,
        provider=provider,
        threads=threads,
        machine=f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        runtime=f"onnxruntime {ort.__version__}",
    )


def _time_once(session: BundleSession, prompt: Sequence[int], num_new_tokens: int) -> tuple[float, float]:
    """TTFT and TPOT in seconds of one request. Token choice is timed; loading and buffers are not."""
    conversation = session.start(max_positions=len(prompt) + num_new_tokens)
    started = time.perf_counter()
    token = conversation.prefill([prompt]).argmax(-1)
    first = time.perf_counter()
    for _ in range(num_new_tokens - 1):
        token = conversation.decode(token[:, np.newaxis])[:, -1].argmax(-1)
    return first - started, (time.perf_counter() - first) / max(1, num_new_tokens - 1)


def _random_prompt(session: BundleSession, length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, session.vocab_size, length)]


def _spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _peak_memory(folder: Path, provider: str, prompt_length: int, num_new_tokens: int) -> int:
    """Largest resident set, in bytes, of a process that loads the bundle and answers one request."""
    arguments = [str(folder), provider, str(prompt_length), str(num_new_tokens)]
    command = [sys.executable, "-m", "voidprune.quality.bench", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeProviderError(f"the process that measures the memory of {folder.name} failed: {reason}")
    return int(json.loads(finished.stdout)["peak_resident_bytes"])


def _report_memory(folder: str, provider: str, prompt_length: str, num_new_tokens: str) -> None:
    session = BundleSession(Path(folder), provider=provider)
    _time_once(session, _random_prompt(session, int(prompt_length), 0), int(num_new_tokens))
    print(json.dumps({"peak_resident_bytes": _largest_resident_set()}))


def _largest_resident_set() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before this process was started
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert kilobytes is not None
        return int(kilobytes[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _report_memory(*sys.argv[1:])
