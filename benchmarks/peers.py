"""The same work in the runtimes that a user would pick instead, in turns with ours: `make bench`.

Makes a checkpoint of a real shape with random weights, converts it for every runtime, and starts a process for each, in an
environment of its own (`peer_environments.py`; made once, under .venv-peers). The processes work in turns: while one does, the
others are stopped, so that no thread of theirs waits for work on the same cores. Every round asks each for a prefill and for
some steps of decode behind a context, and measures what the machine does at best. Where not all fit into memory at once they
run in groups, ours in each.

`--accept` writes the ratios of a run to benchmarks/accepted.json. `--check` repeats that run, with its settings, and fails
where a ratio is worse by more than the noise of both (`voidprune.quality.regressions`): `make bench-check`.

A ratio is the time of the runtime over ours of the same round: above 1, ours is faster. Runtimes in 4 bits are put beside our
int4, or beside what `--packed` says ("128": in blocks of 128, which take less time, and GPTQ to be as good); those in 8 bits
beside our w8a8, which runs where it is asked for. With float32, the greedy tokens must be ours, or the work was not the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_environments import ROOT, prepare_environment, say, worker_variables
from peer_models import MODELS, checkpoint_bytes, model_config, write_checkpoint
from peer_results import Row, ratios_of, table

from voidprune.quality.machine import describe_machine, load_average
from voidprune.quality.regressions import AcceptedRun, compare_ratios, read_accepted, write_accepted
from voidprune.quality.spreads import interval_confidence, median_spread, ratio_spread

WORKER = Path(__file__).with_name("peer_worker.py")
ACCEPTED = ROOT / "benchmarks" / "accepted.json"
PLAIN, PACKED, INTEGER, HYBRID = "voidprune fp32", "voidprune int4", "voidprune w8a8", "voidprune w8a8-int4"
PACKED_128, HYBRID_128 = f"{PACKED} 128", f"{HYBRID} 128"
LOGITS = "voidprune fp32 logits"
PACKINGS = {
    PACKED: ("int4", 32),
    PACKED_128: ("int4", 128),
    INTEGER: ("w8a8", 32),
    HYBRID: ("w8a8-int4", 32),
    HYBRID_128: ("w8a8-int4", 128),
}
"""Precision and block size of ours."""
SETTINGS = (
    "model",
    "layers",
    "vocabulary",
    "keep",
    "peers",
    "packed",
    "prompt",
    "context",
    "steps",
    "rounds",
    "threads",
)
"""Options that say what is measured."""


@dataclass(frozen=True)
class Peer:
    """A runtime: its environment (None: ours), beside which of ours it is put, and its memory as a multiple of the weights."""

    environment: str | None
    beside: str
    memory: float


PEERS = {
    PLAIN: Peer(None, PLAIN, 1.2),
    LOGITS: Peer(None, PLAIN, 1.4),
    PACKED: Peer(None, PACKED, 0.5),
    INTEGER: Peer(None, PACKED, 0.8),
    HYBRID: Peer(None, PACKED, 0.9),
    PACKED_128: Peer(None, PACKED, 0.5),
    HYBRID_128: Peer(None, PACKED, 0.9),
    "transformers eager": Peer(None, PLAIN, 1.5),
    "transformers compiled": Peer(None, PLAIN, 1.7),
    "genai fp32": Peer("genai", PLAIN, 2.3),
    "genai int4": Peer("genai", PACKED, 0.6),
    "genai int4 128": Peer("genai", PACKED, 0.6),
    "transformers.exporters": Peer("exporters", PLAIN, 4.3),
    "optimum-onnx": Peer("optimum", PLAIN, 2.3),
    "llama.cpp F32": Peer("llama-cpp", PLAIN, 1.3),
    "llama.cpp F16": Peer("llama-cpp", PLAIN, 0.8),
    "llama.cpp Q4_0": Peer("llama-cpp", PACKED, 0.5),
    "llama.cpp Q8_0": Peer("llama-cpp", INTEGER, 0.6),
}


class Worker:
    """A process of `peer_worker.py`, stopped but for the time between a question and its answer."""

    def __init__(self, name: str, python: Path, folder: Path, *, threads: int, positions: int) -> None:
        self.name = name
        environment = worker_variables(PEERS[name].environment if name in PEERS else None, python)
        command = [str(python), str(WORKER), "serve", name, str(folder), str(threads), str(positions)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # it lives as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
        self.load_seconds = self._read()["seconds"]

    def ask(self, do: str, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            sys.exit(f"{self.log.read()[-4000:]}\n{self.name} ended with code {code}")
        os.kill(self.process.pid, signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        if self.process.poll() is not None:
            return
        os.kill(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="Fewer layers than the model has.")
    parser.add_argument("--vocabulary", type=int, help="A smaller vocabulary.")
    parser.add_argument(
        "--keep", type=float, help="Slim the checkpoint to this share of its layers; all get the slim one."
    )
    parser.add_argument(
        "--peers", help=f"A list, of: {', '.join(name for name in PEERS if name not in (PLAIN, PACKED))}"
    )
    parser.add_argument(
        "--packed", choices=list(PACKINGS), default=PACKED, help="Which of ours runtimes in 4 bits are put beside."
    )
    parser.add_argument("--prompt", type=int, default=512, help="Tokens of a prefill.")
    parser.add_argument("--context", type=int, default=512, help="Tokens in the cache when decode starts.")
    parser.add_argument("--steps", type=int, default=16, help="Of decode, in every round.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="Where models are made; default: the temporary directory.")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="Use this one instead.")
    parser.add_argument("-o", "--output", type=Path, help="Write the result as JSON.")
    parser.add_argument("--accept", action="store_true", help="Write the ratios to benchmarks/accepted.json.")
    parser.add_argument("--check", action="store_true", help="Repeat the accepted run, and fail where it was better.")
    arguments = parser.parse_args()
    accepted = read_accepted(ACCEPTED) if arguments.check else None
    if accepted is not None:
        vars(arguments).update(accepted.settings)
    peers = list(PEERS) if arguments.peers is None else [name.strip() for name in arguments.peers.split(",")]
    if unknown := set(peers) - {""} - set(PEERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="voidprune-bench-", dir=arguments.directory) as folder:
        chosen = [name for name in dict.fromkeys([arguments.packed, *peers]) if name not in ("", PLAIN, PACKED)]
        result = compare(Path(folder), chosen, arguments)
    print(table(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.accept:
        settings = {name: getattr(arguments, name) for name in SETTINGS}
        write_accepted(AcceptedRun(settings, result["machine"], ratios_of(result)), ACCEPTED)
    if accepted is not None:
        check(accepted, result)


def check(accepted: AcceptedRun, result: dict[str, Any]) -> None:
    if accepted.machine != result["machine"]:
        print(f"accepted on another machine: {accepted.machine}")
    changes = compare_ratios(accepted.ratios, ratios_of(result))
    for change in changes:
        print(f"{'WORSE ' if change.is_worse else 'better' if change.is_better else '      '} {change}")
    if any(change.is_worse for change in changes):
        sys.exit("a ratio is worse than the noise of both runs explains")


def compare(folder: Path, peers: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    given = dict(entry.split("=", 1) for entry in arguments.python)
    pythons = {}
    for name in dict.fromkeys([*ours_beside(peers), *peers]):
        environment = PEERS[name].environment
        if environment is None:
            pythons[name] = Path(sys.executable)
        elif environment in given:
            pythons[name] = Path(given[environment])
        else:
            pythons[name] = prepare_environment(environment, arguments.environments)
    config = model_config(arguments.model, num_layers=arguments.layers, vocab_size=arguments.vocabulary)
    say(f"making {checkpoint_bytes(config) / 1e9:.2f} GB of {arguments.model} in {folder}")
    source = folder / "source"
    write_checkpoint(source, config)
    bundle, folders = export_ours(source, folder, keep=arguments.keep, names=ours_beside(peers))
    busy = load_average()
    rows: list[Row] = []
    for group in groups(peers, (bundle / "model.safetensors").stat().st_size):
        for name in group:
            if name not in folders:
                folders[name] = prepare(name, pythons[name], bundle, folder / name.replace(" ", "-"))
        found = run_group(group, pythons, folders, config["vocab_size"], arguments)
        rows += [row for row in found if row.name not in {earlier.name for earlier in rows}]
    return {
        "model": arguments.model,
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "keep": arguments.keep,
        "prompt": arguments.prompt,
        "context": arguments.context,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "confidence": interval_confidence(arguments.rounds),
        "threads": arguments.threads,
        "machine": describe_machine(),
        "load_average": busy,
        "rows": [asdict(row) for row in rows],
    }


def export_ours(
    source: Path, folder: Path, *, keep: float | None, names: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """Our bundles of these `names`. That in float32 is also the checkpoint that all others convert."""
    from voidprune.export.bundle import export_bundle
    from voidprune.export.quantize import uniform_packing
    from voidprune.models.checkpoint import open_checkpoint
    from voidprune.schedule import dropped_schedule, full_schedule

    checkpoint = open_checkpoint(source)
    num_layers = checkpoint.identity.num_layers
    schedule = full_schedule(checkpoint.identity)
    if keep is not None:
        kept = {round(place) for place in np.linspace(0, num_layers - 1, max(1, round(keep * num_layers)))}
        schedule = dropped_schedule(checkpoint.identity, set(range(num_layers)) - kept)
    folders = {name: folder / name.replace(" ", "-") for name in names}
    export_bundle(
        checkpoint, schedule, folders[PLAIN], verify=lambda _stage: None, formats=("hf", "onnx"), max_shard_bytes=10**12
    )
    for name in PACKINGS.keys() & folders.keys():
        precision, block_size = PACKINGS[name]
        packing = uniform_packing(precision, len(schedule.union), block_size=block_size)
        export_bundle(
            checkpoint, schedule, folders[name], verify=lambda _stage: None, formats=("onnx",), packing=packing
        )
    folders |= dict.fromkeys((LOGITS, "transformers eager", "transformers compiled"), folders[PLAIN])
    return folders[PLAIN], folders


def prepare(name: str, python: Path, source: Path, target: Path) -> Path:
    say(f"converting for {name}")
    environment = worker_variables(PEERS[name].environment, python)
    done = subprocess.run(
        [str(python), str(WORKER), "prepare", name, str(source), str(target)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-4000:]}")
    return target


def ours_beside(peers: Sequence[str]) -> list[str]:
    """Those of ours that run with these: beyond float32 and int4 what is asked for, or another is put beside."""
    asked = {*peers, *(PEERS[name].beside for name in peers)}
    return [PLAIN, PACKED, *(name for name in PACKINGS if name in asked and name != PACKED)]


def groups(peers: Sequence[str], weight_bytes: int) -> list[list[str]]:
    """Runtimes that fit into memory together, with ours in every group."""
    from voidprune.quality.parity import free_memory

    ours = ours_beside(peers)
    memory = 0.8 * free_memory("cpu")
    found: list[list[str]] = []
    for name in peers:
        if name in ours:
            continue
        needed = PEERS[name].memory * weight_bytes
        if found and sum(PEERS[one].memory for one in found[-1]) * weight_bytes + needed <= memory:
            found[-1].append(name)
        else:
            found.append([*ours, name])
    return found or [ours]


def run_group(
    names: Sequence[str],
    pythons: dict[str, Path],
    folders: dict[str, Path],
    vocab_size: int,
    arguments: argparse.Namespace,
) -> list[Row]:
    say(f"in turns: {', '.join(names)}")
    random = np.random.default_rng(0)
    context = random.integers(3, vocab_size, arguments.context).tolist()
    positions = max(arguments.prompt, arguments.context + arguments.steps)
    workers: dict[str, Worker] = {}
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in names}
    floors: dict[str, list[dict[str, float]]] = {name: [] for name in names if name in (PLAIN, *PACKINGS)}
    meters: dict[str, Worker] = {}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    size = {"threads": arguments.threads, "positions": positions}
    try:
        for name in names:
            workers[name] = Worker(name, pythons[name], folders[name], **size)
            workers[name].ask("context", tokens=context)
        for ours in floors:
            meters[ours] = Worker("machine", Path(sys.executable), folders[ours], **size)
        for number in range(arguments.rounds + 1):
            order = list(names) if number % 2 else list(reversed(names))
            prompt = random.integers(3, vocab_size, arguments.prompt).tolist()
            for ours, found in floors.items():
                found.append(
                    meters[ours].ask("floors", prompt=arguments.prompt, context=len(context) + arguments.steps // 2)
                )
            for name in order:
                answer = workers[name].ask("prefill", tokens=prompt)
                seconds[name]["prefill"].append(answer["seconds"])
                tokens[name].append(answer["token"])
            for name in order:
                answer = workers[name].ask("decode", steps=arguments.steps)
                seconds[name]["decode"].append(answer["seconds"])
                tokens[name] += answer["tokens"]
            say(f"round {number} of {arguments.rounds}")
        resident = {name: worker.ask("memory")["resident_bytes"] for name, worker in workers.items()}
        loads = {name: worker.load_seconds for name, worker in workers.items()}
    finally:
        for worker in (*workers.values(), *meters.values()):
            worker.close()
    rows = []
    for name in names:
        beside = PEERS[name].beside
        if beside == PACKED and name not in PACKINGS:
            beside = arguments.packed
        timed = {phase: values[1:] for phase, values in seconds[name].items()}  # the first round warms up
        ours = {phase: values[1:] for phase, values in seconds[beside].items()}
        # Of a float32 head ours reads 8 bits where it decodes greedily, everyone else all of it.
        least = {phase: [found[phase] for found in floors[beside][1:]] for phase in timed}
        if name in floors:
            least = {phase: [found[f"greedy {phase}"] for found in floors[name][1:]] for phase in timed}
        equal = sum(one == other for one, other in zip(tokens[name], tokens[beside], strict=True))
        rows.append(
            Row(
                name=name,
                beside=beside,
                prefill=median_spread(timed["prefill"]),
                decode=median_spread(timed["decode"]),
                prefill_ratio=ratio_spread(timed["prefill"], ours["prefill"]),
                decode_ratio=ratio_spread(timed["decode"], ours["decode"]),
                prefill_floor_ratio=ratio_spread(timed["prefill"], least["prefill"]),
                decode_floor_ratio=ratio_spread(timed["decode"], least["decode"]),
                load_seconds=loads[name],
                disk_bytes=sum(file.stat().st_size for file in folders[name].rglob("*") if file.is_file()),
                resident_bytes=resident[name],
                same_tokens=f"{equal}/{len(tokens[name])}",
            )
        )
    return rows


if __name__ == "__main__":
    main()
