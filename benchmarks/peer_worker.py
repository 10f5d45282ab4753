"""One runtime, in the environment that it needs, as a process that `benchmarks/peers.py` drives line by line.

`peer_worker.py prepare PEER SOURCE TARGET` converts the checkpoint in SOURCE to what the runtime reads. `peer_worker.py serve
PEER FOLDER THREADS POSITIONS` loads that and answers JSON lines: {"do": "prefill", "tokens": [...]}, {"do": "context",
"tokens": [...]} and {"do": "decode", "steps": n}. Every answer is a JSON line. A prefill starts from nothing and ends with the
likeliest token; decode takes `steps` greedy tokens behind the context, each time the same ones. Nothing of voidprune is
imported, but by its own worker.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from peer_runtimes import PEERS


def resident_bytes() -> int:
    """What is mapped twice of a file counts once, as in `voidprune.quality.process_memory`."""
    largest: dict[tuple[str, ...], int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            offset, device, inode = rest.split()[1:4]
            key = (name,) if inode == "0" else (device, inode, offset)
        elif name == "Rss:":
            largest[key] = max(largest.get(key, 0), int(rest.split()[0]) * 1024)
    return sum(largest.values())


def serve(peer: str, folder: Path, threads: int, positions: int) -> None:
    # What libraries print must not get between the lines of the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    started = time.perf_counter()
    runtime = PEERS[peer](folder, threads, positions)
    answer({"seconds": time.perf_counter() - started})
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        if do == "prefill":
            started = time.perf_counter()
            token = runtime.prefill(asked["tokens"])
            answer({"seconds": time.perf_counter() - started, "token": token})
        elif do == "context":
            runtime.context(asked["tokens"])
            answer({"token": runtime.first})
        elif do == "decode":
            runtime.start()
            started = time.perf_counter()
            tokens = [runtime.step() for _ in range(asked["steps"])]
            answer({"seconds": (time.perf_counter() - started) / len(tokens), "tokens": tokens})
        elif do == "memory":
            answer({"resident_bytes": resident_bytes()})
        else:
            answer(getattr(runtime, do)(**asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["prepare", "serve"])
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    arguments = parser.parse_args()
    if arguments.do == "prepare":
        PEERS[arguments.peer].prepare(arguments.folder, Path(arguments.rest[0]))
    else:
        serve(arguments.peer, arguments.folder, *map(int, arguments.rest))


if __name__ == "__main__":
    main()
