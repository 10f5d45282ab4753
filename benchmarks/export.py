"""How fast is slimming, beside `cp` of as many bytes, and how much memory does it take? `make bench-export`.

Generates a checkpoint of the shape of Qwen2.5-7B with random bf16 weights (15 GB in shards; --layers for fewer), then alternates
between slimming it and copying the result with `cp -r`. Both sides read from a disk whose pages were dropped from memory, and
both times include fsync of every file written. The time of slimming is that of everything between the start of planning and the
folder standing under its name: reading headers, config, copying, SHA-256 of the weights, fsync, rename; not the start of Python,
which is printed apart, and not the verification, which runs the model.

Then: does a repeat give the same bytes, and is there no folder under the final name, and a rerun that succeeds, when the
process is killed at random points.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
}
SHARD_BYTES = 4_000_000_000
TARGETS = {"speed": 0.9, "peak_resident_bytes": 300_000_000, "plan_seconds": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="Where to work; default: the temporary directory.")
    parser.add_argument("--layers", type=int, default=28, help="Layers of the generated model (28: 15 GB).")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slim", nargs=3, metavar=("SOURCE", "TARGET", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.slim:
        slim(Path(arguments.slim[0]), Path(arguments.slim[1]), float(arguments.slim[2]))
        return
    with tempfile.TemporaryDirectory(prefix="voidprune-bench-", dir=arguments.directory) as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    source, target, copy = folder / "source", folder / "slim", folder / "copy"
    needed = 3 * model_bytes(arguments.layers)
    if shutil.disk_usage(folder).free < needed:
        sys.exit(f"{folder} has no room for {needed:,} bytes; choose another --directory or fewer --layers")
    say(f"generating {model_bytes(arguments.layers) / 1e9:.1f} GB in {source}")
    generate(source, num_layers=arguments.layers, seed=arguments.seed)
    say(f"load before: {os.getloadavg()[0]:.1f}; cores: {os.cpu_count()}")

    slims: list[dict[str, float]] = []
    copies: list[float] = []
    digests = set()
    identical = False
    kept_folder = folder / "kept"
    for round_number in range(arguments.rounds + 1):

        def slim_once() -> None:
            drop_pages(source)
            slims.append(run_slim(source, target, arguments.keep))
            digests.add(json.dumps(slims[-1].pop("hashes"), sort_keys=True))

        def copy_once() -> None:
            drop_pages(kept_folder)
            copies.append(run_copy(kept_folder, copy))
            shutil.rmtree(copy)

        if round_number == 0:  # makes what cp copies, and the machine warm; not counted
            slim_once()
            os.replace(target, kept_folder)
            copy_once()
            slims.clear()
            copies.clear()
            continue
        for once in (slim_once, copy_once) if round_number % 2 else (copy_once, slim_once):
            once()
        say(f"round {round_number}: slim {slims[-1]['seconds']:.2f} s, cp {copies[-1]:.2f} s")
        if round_number == arguments.rounds:  # before, it would warm up caches below this system for one side only
            identical = same_files(target, kept_folder)
        shutil.rmtree(target)
    written = sum(file.stat().st_size for file in kept_folder.iterdir())
    ratios = [copied / slimmed["seconds"] for slimmed, copied in zip(slims, copies, strict=True)]
    say(f"killing {arguments.kills} times")
    survived = kill_often(source, target, kept_folder, arguments, seconds=slims[-1]["seconds"])
    result = {
        "bytes_written": written,
        "slim_seconds": [round(run["seconds"], 3) for run in slims],
        "cp_seconds": [round(seconds, 3) for seconds in copies],
        "slim_bytes_per_second": round(written / statistics.median(run["seconds"] for run in slims)),
        "cp_bytes_per_second": round(written / statistics.median(copies)),
        "speed_relative_to_cp": round(statistics.median(ratios), 3),
        "peak_resident_bytes": int(max(run["peak_resident_bytes"] for run in slims)),
        "plan_seconds": round(max(run["plan_seconds"] for run in slims), 3),
        "import_seconds": round(statistics.median(run["import_seconds"] for run in slims), 3),
        "byte_identical": identical and len(digests) == 1,
        "kills": arguments.kills,
        "kills_survived": survived,
        "fsync": "on both sides",
        "machine": f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB memory",
        "layers": arguments.layers,
    }
    print(json.dumps(result, indent=2))
    missed = [
        *(["speed"] if result["speed_relative_to_cp"] < TARGETS["speed"] else []),
        *(["memory"] if result["peak_resident_bytes"] >= TARGETS["peak_resident_bytes"] else []),
        *(["plan"] if result["plan_seconds"] >= TARGETS["plan_seconds"] else []),
        *(["identity"] if not result["byte_identical"] else []),
        *(["kills"] if survived != arguments.kills else []),
    ]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


def slim(source: Path, target: Path, keep: float) -> None:
    """What is measured, in a process of its own. Prints its figures as JSON."""
    started = time.perf_counter()
    from voidprune import artifacts
    from voidprune.export.hf_checkpoint import slim_config, write_slim_checkpoint
    from voidprune.models.checkpoint import open_checkpoint
    from voidprune.planning.budgets import Budget
    from voidprune.planning.planner import plan_schedule

    imported = time.perf_counter()
    checkpoint = open_checkpoint(source)
    budget = Budget(keep_prefill=keep, keep_decode=keep, shared=True)
    schedule = plan_schedule(checkpoint.identity, None, criterion="random", budget=budget, seed=1)
    slim_config(checkpoint, schedule.union)
    planned = time.perf_counter()
    with artifacts.staged_folder(target, marker="config.json") as stage:
        hashes = write_slim_checkpoint(checkpoint, schedule.union, stage)
    finished = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    figures = {
        "import_seconds": imported - started,
        "plan_seconds": planned - imported,
        "seconds": finished - imported,
        "peak_resident_bytes": int(peak[1]) * 1024,
        "hashes": hashes,
    }
    print(json.dumps(figures))


def run_slim(source: Path, target: Path, keep: float) -> dict[str, Any]:
    done = subprocess.run(slim_command(source, target, keep), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def slim_command(source: Path, target: Path, keep: float) -> list[str]:
    return [sys.executable, __file__, "--slim", str(source), str(target), str(keep)]


def run_copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        flush(file)
    flush(target.parent)
    return time.perf_counter() - started


def kill_often(source: Path, target: Path, expected: Path, arguments: argparse.Namespace, *, seconds: float) -> int:
    """How many of the kills left nothing under the final name; after the last, a rerun has to give the same bytes."""
    moments = random.Random(arguments.seed)
    survived = 0
    for _ in range(arguments.kills):
        process = subprocess.Popen(slim_command(source, target, arguments.keep), stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.02, 0.98) * seconds)
        ended = process.poll() is not None
        process.kill()
        process.wait()
        whole = target.exists() and same_files(target, expected)
        survived += (ended and whole) or not target.exists()
        shutil.rmtree(target, ignore_errors=True)
    run_slim(source, target, arguments.keep)
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(".")]
    return survived if same_files(target, expected) and not left else 0


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(subprocess.run(["cmp", "-s", str(one / name), str(other / name)]).returncode == 0 for name in names)


def drop_pages(folder: Path) -> None:
    """Forget the contents of files, so that both sides read from the disk. They have to be on it."""
    for file in folder.iterdir():
        flush(file)
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- the model


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    narrow = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(num_layers):
        parts = {
            "input_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, inner),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.k_proj.bias": (narrow,),
            "self_attn.k_proj.weight": (narrow, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.v_proj.bias": (narrow,),
            "self_attn.v_proj.weight": (narrow, hidden),
        }
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def tensor_bytes(shape: tuple[int, ...]) -> int:
    count = 2
    for size in shape:
        count *= size
    return count


def model_bytes(num_layers: int) -> int:
    return sum(map(tensor_bytes, shapes(num_layers).values()))


def generate(folder: Path, *, num_layers: int, seed: int) -> None:
    """A checkpoint as `save_pretrained` would write it: shards in the order of the modules, and an index."""
    import ml_dtypes
    import numpy as np

    folder.mkdir()
    values = np.random.default_rng(seed).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    block = memoryview(values.astype(ml_dtypes.bfloat16).tobytes())
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes(num_layers).items():
        if filled + tensor_bytes(shape) > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor_bytes(shape)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_shard(folder / file, {name: shapes(num_layers)[name] for name in names}, block)
    total = model_bytes(num_layers)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "num_hidden_layers": num_layers, "max_window_layers": num_layers})
    )


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], block: memoryview) -> None:
    header, position = {}, 0
    for name, shape in tensors.items():
        end = position + tensor_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, shape in enumerate(tensors.values()):
            left, start = tensor_bytes(shape), 2 * 1009 * number % len(block)
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
