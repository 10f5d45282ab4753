"""How much memory do both phases of a bundle take together, beside one graph alone? `make bench-memory`.

Generates a float32 checkpoint of the shape of Qwen2.5-0.5B with random weights (--full for all of it, 2 GB; by default fewer
layers and a smaller vocabulary), exports it, and runs children in turns: one loads the decode graph alone and runs prompt and
response through it, the other loads both graphs. Measured in each child after it has answered: its proportional set size (PSS:
pages that a process maps twice count once) and the part of it that is mapped from no file. Both are above a child that imported
the same and loaded nothing, so that Python and the libraries do not count; activations, tables and K/V do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_models import model_config, write_checkpoint

SMALL = (6, 32000)
"""Layers and vocabulary, without --full."""
MOST = 1.05
"""What both phases may take, as a multiple of one graph."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="All 24 layers and the whole vocabulary: 2 GB, twice on disk."
    )
    parser.add_argument("--directory", type=Path, help="Where to work; default: the temporary directory.")
    parser.add_argument(
        "--precision",
        choices=["fp32", "int8", "int4", "w8a8"],
        default="fp32",
    )
    parser.add_argument(
        "--mapped", action="store_true", help="Leave float32 weights in their file, two sessions over it."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs="*", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(answer_and_measure(arguments.measure, prepack=not arguments.mapped)))
        return
    with tempfile.TemporaryDirectory(prefix="voidprune-bench-", dir=arguments.directory) as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    size = (None, None) if arguments.full else SMALL
    config = model_config("qwen2.5-0.5b", num_layers=size[0], vocab_size=size[1])
    both = export(folder / "both", config, arguments.precision)
    folders = {"both": [both], "one": [decode_graph_alone(both, folder / "one")], "nothing": []}
    found: dict[str, list[dict[str, int]]] = {name: [] for name in folders}
    for _ in range(arguments.rounds):
        for name, bundles in folders.items():
            command = [
                sys.executable,
                __file__,
                *(["--mapped"] if arguments.mapped else []),
                "--measure",
                *map(str, bundles),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[name].append(json.loads(done.stdout))
    taken = {
        name: {key: int(statistics.median(run[key] for run in runs)) for key in runs[0]} for name, runs in found.items()
    }
    above = {name: {key: taken[name][key] - taken["nothing"][key] for key in taken[name]} for name in ("one", "both")}
    ratio = above["both"]["pss_bytes"] / above["one"]["pss_bytes"]
    result = {
        "precision": arguments.precision,
        "weights_are": "mapped" if arguments.mapped else "packed",
        "weight_bytes": max(file.stat().st_size for file in both.glob("*.safetensors")),
        "one_graph": above["one"],
        "both_phases": above["both"],
        "ratio": round(ratio, 4),
        "process_without_a_session": taken["nothing"],
        "rounds": arguments.rounds,
        "machine": f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB memory",
    }
    print(json.dumps(result, indent=2))
    if ratio > MOST and arguments.full:  # of a few layers, activations and tables are a larger share
        sys.exit(f"missed: both phases take {ratio:.3f} times the memory of one graph; {MOST} is allowed")


def export(folder: Path, config: dict[str, Any], precision: str) -> Path:
    """A bundle of random weights whose prefill writes K/V only in its upper half, so that the graphs differ."""
    from voidprune.export.bundle import export_bundle
    from voidprune.export.quantize import uniform_packing
    from voidprune.models.checkpoint import open_checkpoint
    from voidprune.schedule import LayerAction, Schedule

    source = folder.with_name(f"{folder.name}-source")
    write_checkpoint(source, config)
    checkpoint = open_checkpoint(source)
    layers = checkpoint.identity.num_layers
    half = (layers + 1) // 2
    schedule = Schedule(
        model=checkpoint.identity,
        prefill=(LayerAction.FULL,) * half + (LayerAction.KV_ONLY,) * (layers - half),
        decode=(LayerAction.FULL,) * layers,
    )
    packing = None if precision == "fp32" else uniform_packing(precision, layers)
    formats = ("hf", "onnx") if packing is None else ("onnx",)
    export_bundle(
        checkpoint,
        schedule,
        folder,
        verify=lambda _: None,
        formats=formats,
        packing=packing,
        max_shard_bytes=10**12,
    )
    return folder


def decode_graph_alone(bundle: Path, folder: Path) -> Path:
    """The same weights with one graph for both phases: one session."""
    from voidprune import artifacts
    from voidprune.execution import manifest as manifests
    from voidprune.schedule import Phase

    folder.mkdir()
    for file in bundle.iterdir():
        if file.name != manifests.FILE:
            os.link(file, folder / file.name)
    manifest = manifests.read_manifest(bundle)
    decode = manifest.graphs[Phase.DECODE]
    single = replace(manifest, graphs=dict.fromkeys(Phase, decode))
    artifacts.write_file(folder / manifests.FILE, artifacts.canonical_bytes(single.to_document()))
    return folder


def answer_and_measure(bundles: list[Path], *, prepack: bool) -> dict[str, int]:
    """In a process of its own. Every bundle stays loaded."""
    from voidprune.execution.sampling import Sampling
    from voidprune.execution.session import BundleSession

    sessions = [BundleSession(bundle, prepack=prepack) for bundle in bundles]
    for session in sessions:
        # Sampling, which needs the whole head: greedy decoding would read it in 8 bits, in the pair alone.
        session.generate([[5] * 32], max_new_tokens=8, sampling=Sampling(1.0))
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = {}
    for key, name in (("Pss", "pss_bytes"), ("Anonymous", "anonymous_bytes")):
        kilobytes = re.search(rf"^{key}:\s+(\d+) kB", rollup, re.MULTILINE)
        assert kilobytes is not None
        found[name] = int(kilobytes[1]) * 1024
    return found


if __name__ == "__main__":
    main()
