"""How fast and how large: bundles side by side under onnxruntime, interleaved in one run, each beside the machine at its best.

Every round times each bundle once in each case, next to each other and in changing order, so that a machine that slows down
slows all of them; ratios are taken round by round. A prefill is one prompt a row, into buffers that nothing has touched yet,
its logits included; a step of decode is the mean over `num_new_tokens` of them behind a context. Token choice is timed, loading
is not. The first round warms up. In every round the rates of the machine are measured as well (`floors.py`), and what the
bundle has to do (`work.py`) over those rates is the floor of that round.

Memory and loading are measured in processes of their own (`process_memory.py`), with a prompt as long as the first context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from voidprune.execution.manifest import Manifest
from voidprune.execution.session import BundleSession, Conversation
from voidprune.quality.energy import EnergyMeter, find_energy_meter
from voidprune.quality.floors import RateMeter, Rates
from voidprune.quality.machine import describe_card, describe_machine, load_average
from voidprune.quality.process_memory import PHASES, ProcessMemory, measure_process
from voidprune.quality.spreads import Spread, interval_confidence, median_spread, ratio_spread
from voidprune.quality.work import BundleWork, Work, measure_work
from voidprune.schedule import Phase

NUM_LOADS = 3


@dataclass(frozen=True)
class Case:
    """What is timed: prefill of `num_rows` prompts of `length` tokens, or decode of as many rows behind `length` tokens."""

    phase: Phase
    length: int
    num_rows: int


@dataclass(frozen=True)
class CaseTiming:
    """A case of one bundle. `seconds`: of a prefill, or of a step of decode of all rows.

    `ratio` is to the first bundle in the same round, `floor_ratio` to `floor_seconds`, the least that `bytes` to read and
    `flops` to multiply take on this machine; `bound` says which of the two takes longer. `joules`: of all that ran on the device
    meanwhile.
    """

    length: int
    num_rows: int
    seconds: Spread
    ratio: Spread
    floor_seconds: Spread
    floor_ratio: Spread
    bytes: int
    flops: int
    bound: str
    joules: float | None


@dataclass(frozen=True)
class Timing:
    """One bundle. What has the name of one figure is that of the first length and batch size.

    `weight_bytes` and `graph_bytes` are on disk, of what the graphs read; `disk_bytes` is the folder. `resident_bytes` and
    `device_bytes` are by phase: see `process_memory.PHASES`. `nodes` counts, phase by phase, the operators on each provider.
    `bytes_per_second` and `flops_per_second`: the rates behind the floors, by every way that was tried.
    """

    name: str
    precision: str
    ttft: Spread
    tpot: Spread
    ttft_ratio: Spread
    tpot_ratio: Spread
    ttft_floor_ratio: Spread
    tpot_floor_ratio: Spread
    prefill: tuple[CaseTiming, ...]
    decode: tuple[CaseTiming, ...]
    load_seconds: Spread
    weight_bytes: int
    graph_bytes: int
    disk_bytes: int
    resident_bytes: dict[str, int]
    peak_resident_bytes: int
    device_bytes: dict[str, int] | None
    nodes: dict[str, dict[str, int]]
    bytes_per_second: dict[str, Spread]
    flops_per_second: dict[str, Spread]


@dataclass(frozen=True)
class Benchmark:
    """A run: what was measured, and on what. `confidence` is that of every interval; `widest` of them, as a share of its median;
    both None of one round, which has no intervals.

    `clocks` is what the card said before and after, None without one; `energy` whose energy was counted, None where there is no
    counter; `load_average` how busy the machine was before anything was timed.
    """

    timings: tuple[Timing, ...]
    prompt_length: int
    context_length: int
    batch_size: int
    num_new_tokens: int
    num_rounds: int
    confidence: float | None
    widest: float | None
    provider: str
    threads: int | None
    machine: str
    load_average: float | None
    runtime: str
    clocks: list[dict[str, Any] | None] | None
    energy: str | None
    seed: int

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Runner:
    """A bundle that is being timed, and what was found so far."""

    name: str
    session: BundleSession
    work: BundleWork
    meter: RateMeter
    conversations: dict[Case, Conversation]
    seconds: dict[Case, list[float]]
    joules: dict[Case, float]
    rates: list[Rates] = field(default_factory=list)


def run_benchmark(
    bundles: Mapping[str, Path],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    prompt_lengths: Sequence[int] = (128,),
    context_lengths: Sequence[int] = (128,),
    batch_sizes: Sequence[int] = (1,),
    num_new_tokens: int = 32,
    num_rounds: int = 15,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Benchmark:
    """Time bundles against the first of them. The sessions of this process must have `threads` already, by `size_thread_pool`.

    Raises what `BundleSession` raises, and ContextLengthError.
    """
    cases = [Case(Phase.PREFILL, length, rows) for rows in batch_sizes for length in prompt_lengths]
    cases += [Case(Phase.DECODE, length, rows) for rows in batch_sizes for length in context_lengths]
    busy, energy = load_average(), find_energy_meter(provider)
    random = np.random.default_rng(seed)
    runners = [
        _prepare(name, folder, cases, random, provider=provider, threads=threads, num_new_tokens=num_new_tokens)
        for name, folder in bundles.items()
    ]
    memory: dict[str, list[ProcessMemory]] = {name: [] for name in bundles}
    for _ in range(min(NUM_LOADS, num_rounds)):
        for name, folder in bundles.items():
            found = measure_process(
                folder,
                provider=provider,
                threads=threads,
                prompt_length=context_lengths[0],
                num_new_tokens=num_new_tokens,
            )
            memory[name].append(found)
    clocks = [describe_card()] if provider == "cuda" else None
    for round_number in range(num_rounds + 1):
        order = runners if round_number % 2 else runners[::-1]
        _run_round(order, cases, random, energy, num_new_tokens=num_new_tokens, counts=round_number > 0)
        if on_progress is not None:
            on_progress(1)
    if clocks is not None:
        clocks.append(describe_card())
    timings = tuple(
        _summarize(
            runner, runners[0], memory[runner.name], num_new_tokens=num_new_tokens, has_energy=energy is not None
        )
        for runner in runners
    )
    return Benchmark(
        timings=timings,
        prompt_length=prompt_lengths[0],
        context_length=context_lengths[0],
        batch_size=batch_sizes[0],
        num_new_tokens=num_new_tokens,
        num_rounds=num_rounds,
        confidence=interval_confidence(num_rounds) if num_rounds > 1 else None,
        widest=max(
            spread.width
            for timing in timings
            for case in (*timing.prefill, *timing.decode)
            for spread in (case.ratio, case.floor_ratio)
        )
        if num_rounds > 1
        else None,
        provider=provider,
        threads=threads,
        machine=describe_machine(),
        load_average=busy,
        runtime=f"onnxruntime {ort.__version__}",
        clocks=clocks,
        energy=None if energy is None else energy.source,
        seed=seed,
    )


def _prepare(
    name: str,
    folder: Path,
    cases: Sequence[Case],
    random: np.random.Generator,
    *,
    provider: str,
    threads: int | None,
    num_new_tokens: int,
) -> _Runner:
    """Load a bundle, with the contexts of its cases of decode in buffers."""
    session, work = BundleSession(folder, provider=provider), measure_work(folder)
    if session.head.is_screened:
        work = work.greedily()
    for case in cases:  # what is too long fails now, not after minutes
        new_tokens = num_new_tokens if case.phase is Phase.DECODE else 0
        session.start(case.num_rows, max_positions=case.length + new_tokens)
    conversations = {}
    for case in cases:
        if case.phase is Phase.DECODE:
            room = _room(session, case.length + num_new_tokens)
            conversations[case] = session.start(case.num_rows, max_positions=room)
            conversations[case].prefill_greedily(_prompts(session, case, random))
    step = max((_work(work, case, num_new_tokens).bytes for case in cases), default=0)
    return _Runner(
        name,
        session,
        work,
        RateMeter(work.manifest, provider=provider, threads=threads, step_bytes=step),
        conversations,
        seconds={case: [] for case in cases},
        joules=dict.fromkeys(cases, 0.0),
    )


def _run_round(
    runners: Sequence[_Runner],
    cases: Sequence[Case],
    random: np.random.Generator,
    energy: EnergyMeter | None,
    *,
    num_new_tokens: int,
    counts: bool,
) -> None:
    for runner in runners:
        rates = runner.meter.measure()
        if counts:
            runner.rates.append(rates)
    for case in cases:
        for runner in runners:
            before = 0.0 if energy is None else energy.joules()
            if case.phase is Phase.PREFILL:
                seconds = time_prefill(runner.session, _prompts(runner.session, case, random))
            else:
                seconds = time_decode(runner.conversations[case], case.length, num_new_tokens=num_new_tokens)
            if counts:
                runner.seconds[case].append(seconds)
                runner.joules[case] += 0.0 if energy is None else energy.joules() - before


def _room(session: BundleSession, num_positions: int) -> int:
    """For a conversation of so many positions: as much as buffers on a CPU would take if it went on."""
    return min(2 * num_positions, session.manifest.context_length) if session.provider == "cpu" else num_positions


def time_prefill(session: BundleSession, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until the first token of every row is chosen. On a CPU buffers are made on the way, and making them is
    timed."""
    conversation = session.start(len(prompts), max_positions=_room(session, len(prompts[0])))
    started = time.perf_counter()
    conversation.prefill_greedily(prompts)
    return time.perf_counter() - started


def time_decode(conversation: Conversation, context: int, *, num_new_tokens: int) -> float:
    """Seconds of a step behind the first `context` tokens of a conversation, on average."""
    conversation.rewind(context)
    token = np.zeros((len(conversation.tokens), 1), np.int64)
    started = time.perf_counter()
    for _ in range(num_new_tokens):
        token = conversation.decode_greedily(token)
    return (time.perf_counter() - started) / num_new_tokens


def _prompts(session: BundleSession, case: Case, random: np.random.Generator) -> list[list[int]]:
    tokens: list[list[int]] = random.integers(0, session.vocab_size, (case.num_rows, case.length)).tolist()
    return tokens


def _work(work: BundleWork, case: Case, num_new_tokens: int) -> Work:
    """Of decode, that of the step in the middle."""
    if case.phase is Phase.PREFILL:
        return work.prefill(case.length, num_rows=case.num_rows)
    return work.decode(case.length + (num_new_tokens + 1) // 2, num_rows=case.num_rows)


def _summarize(
    runner: _Runner, baseline: _Runner, memory: Sequence[ProcessMemory], *, num_new_tokens: int, has_energy: bool
) -> Timing:
    timed = {
        case: _summarize_case(
            case, runner, baseline, _work(runner.work, case, num_new_tokens), num_new_tokens, has_energy=has_energy
        )
        for case in runner.seconds
    }
    prefill = tuple(timing for case, timing in timed.items() if case.phase is Phase.PREFILL)
    decode = tuple(timing for case, timing in timed.items() if case.phase is Phase.DECODE)
    manifest, folder = runner.session.manifest, runner.session.folder
    return Timing(
        name=runner.name,
        precision=manifest.precision,
        ttft=prefill[0].seconds,
        tpot=decode[0].seconds,
        ttft_ratio=prefill[0].ratio,
        tpot_ratio=decode[0].ratio,
        ttft_floor_ratio=prefill[0].floor_ratio,
        tpot_floor_ratio=decode[0].floor_ratio,
        prefill=prefill,
        decode=decode,
        load_seconds=median_spread([found.load_seconds for found in memory]),
        weight_bytes=manifest.graph_weight_bytes,
        graph_bytes=_graph_bytes(manifest, folder),
        disk_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        resident_bytes={phase: _middle(found.resident_bytes[phase] for found in memory) for phase in PHASES},
        peak_resident_bytes=_middle(found.peak_resident_bytes for found in memory),
        device_bytes=None
        if memory[0].device_bytes is None
        else {phase: _middle((found.device_bytes or {})[phase] for found in memory) for phase in PHASES},
        nodes=_count_nodes(runner.session),
        bytes_per_second=_rate_spreads([rates.bytes_per_second for rates in runner.rates]),
        flops_per_second=_rate_spreads([rates.flops_per_second for rates in runner.rates]),
    )


def _summarize_case(
    case: Case, runner: _Runner, baseline: _Runner, work: Work, num_new_tokens: int, *, has_energy: bool
) -> CaseTiming:
    seconds = runner.seconds[case]
    floors = [rates.seconds(work) for rates in runner.rates]
    reading = [rates.reading_seconds(work) >= rates.multiplying_seconds(work) for rates in runner.rates]
    runs = len(seconds) * (num_new_tokens if case.phase is Phase.DECODE else 1)
    return CaseTiming(
        length=case.length,
        num_rows=case.num_rows,
        seconds=median_spread(seconds),
        ratio=ratio_spread(seconds, baseline.seconds[case]),
        floor_seconds=median_spread(floors),
        floor_ratio=ratio_spread(seconds, floors),
        bytes=work.bytes,
        flops=work.flops,
        bound="reading" if 2 * sum(reading) >= len(reading) else "arithmetic",
        joules=runner.joules[case] / runs if has_energy else None,
    )


def _middle(values: Any) -> int:
    return int(median_spread(list(values)).median)


def _rate_spreads(rates: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {name: median_spread([found[name] for found in rates]) for name in rates[0]}


def _graph_bytes(manifest: Manifest, folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in {graph.file for graph in manifest.graphs.values()})


def _count_nodes(session: BundleSession) -> dict[str, dict[str, int]]:
    """Operators by the provider that runs them, as onnxruntime assigned them."""
    counts: dict[str, dict[str, int]] = {}
    for phase, running in session.sessions.items():
        counts[str(phase)] = {}
        for part in running.get_provider_graph_assignment_info():
            found = counts[str(phase)]
            found[part.ep_name] = found.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
