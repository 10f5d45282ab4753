"""What our runner saves: the same bundle as it is exported and as our runner opens it, in turns, in one process.

    python benchmarks/runner.py [--model qwen2.5-0.5b] [--precision int4] [--lengths 64,512,2048] [--rows 1] [--rounds 9]
    python benchmarks/runner.py --kv-cache int8 ...

Random weights of the real shape are made on the spot, and removed again. Every round prefills a prompt of each length and takes
some steps of decode behind it: by the graphs as exported, by ours for all logits, and by ours for the likeliest token alone. With
`--kv-cache int8`: by ours with keys and values as they are computed, and in 8 bits as ours and as exported, all logits.
Ratios are of the same round, over the first: below 1, it is faster. See `voidprune/execution/buffer_attention.py` and
`voidprune/execution/heads.py`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from peer_models import MODELS, model_config, write_checkpoint

from voidprune.execution.kv_cache import KV_CACHES, KvSteps
from voidprune.execution.providers import size_thread_pool
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import RoundedKv, export_bundle
from voidprune.export.quantize import UNIFORM_BITS, uniform_packing
from voidprune.models.checkpoint import open_checkpoint
from voidprune.quality.machine import describe_machine
from voidprune.quality.spreads import Spread, interval_confidence, median_spread, ratio_spread
from voidprune.schedule import full_schedule

GREEDY = "ours, greedy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--precision", choices=["fp32", *UNIFORM_BITS], default="int4")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="keep")
    parser.add_argument("--lengths", default="64,512,2048", help="Of prompts, and of the context of decode.")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="Of decode, in every round.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    size_thread_pool(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="voidprune-bench-") as folder:
        bundle = export(Path(folder), arguments.model, arguments.precision)
        ours = BundleSession(bundle)
        sessions = {"as exported": BundleSession(bundle, as_exported=True), "ours": ours, GREEDY: ours}
        if arguments.kv_cache == "int8":
            rounded = export(Path(folder), arguments.model, arguments.precision, rounds_kv=True)
            sessions = {
                "ours": ours,
                "K/V int8": BundleSession(rounded),
                "K/V int8, as exported": BundleSession(rounded, as_exported=True),
            }
        print(
            f"{arguments.model} {arguments.precision}, rows: {arguments.rows}, threads: {arguments.threads}; median of "
            f"{arguments.rounds} rounds, {interval_confidence(arguments.rounds):.0%} interval; {describe_machine()}\n"
        )
        first, *others = sessions
        print(f"| | {first} ms | {' | '.join(f'{name} ms | ratio' for name in others)} |\n|---|---|---|---|---|---|")
        for length in map(int, arguments.lengths.split(",")):
            measure(sessions, length, arguments)


def export(folder: Path, model: str, precision: str, *, rounds_kv: bool = False) -> Path:
    if not (folder / "source").exists():
        write_checkpoint(folder / "source", model_config(model, num_layers=None, vocab_size=None))
    checkpoint = open_checkpoint(folder / "source")
    schedule, bundle = full_schedule(checkpoint.identity), folder / ("bundle, K/V int8" if rounds_kv else "bundle")
    shape = checkpoint.architecture
    steps = np.full((shape.num_kv_heads, shape.head_dim), 0.02, np.float32)  # what it is does not matter to the time
    export_bundle(
        checkpoint,
        schedule,
        bundle,
        verify=lambda _stage: None,
        formats=("hf", "onnx") if precision == "fp32" else ("onnx",),
        packing=None if precision == "fp32" else uniform_packing(precision, len(schedule.union)),
        kv=RoundedKv([KvSteps(steps, steps)] * len(schedule.kv_layers), ("none",)) if rounds_kv else None,
    )
    return bundle


def measure(sessions: dict[str, BundleSession], length: int, arguments: argparse.Namespace) -> None:
    random = np.random.default_rng(0)
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in sessions} for kind in ("TTFT", "TPOT")}
    for number in range(arguments.rounds + 1):
        prompts = random.integers(3, 30000, (arguments.rows, length)).tolist()
        tokens = random.integers(3, 30000, (arguments.steps, arguments.rows, 1))
        for name in list(sessions) if number % 2 else reversed(sessions):
            conversation = sessions[name].start(arguments.rows, max_positions=2 * length)
            prefill = conversation.prefill_greedily if name == GREEDY else conversation.prefill
            decode = conversation.decode_greedily if name == GREEDY else conversation.decode
            started = time.perf_counter()
            prefill(prompts)
            seconds["TTFT"][name].append(time.perf_counter() - started)
            decode(tokens[0])
            conversation.rewind(length)
            started = time.perf_counter()
            for step in tokens:
                decode(step)
            seconds["TPOT"][name].append((time.perf_counter() - started) / arguments.steps)
    for kind, found in seconds.items():
        timed = {name: values[1:] for name, values in found.items()}  # the first round warms up
        first, *others = sessions
        cells = [f"{1e3 * median_spread(timed[first]).median:.1f}"]
        for name in others:
            ratio = ratio_spread(timed[name], timed[first])
            cells += [f"{1e3 * median_spread(timed[name]).median:.1f}", describe(ratio)]
        print(f"| {kind}, {length} | {' | '.join(cells)} |", flush=True)


def describe(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


if __name__ == "__main__":
    main()
