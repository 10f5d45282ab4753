"""Memory and loading time of a bundle, measured in processes of their own, phase by phase.

A process imports everything, loads the bundle, prefills, decodes, and says after each how much of its memory is resident,
mapped weights included. What two sessions map of one file counts once. `before` is what Python and its libraries take. On CUDA
also how much more of the device's memory is taken than before.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from voidprune.errors import RuntimeProviderError
from voidprune.execution.providers import size_thread_pool
from voidprune.execution.session import BundleSession

PHASES = ("before", "loaded", "prefilled", "decoded")


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes after each of PHASES, and the most ever; `device_bytes` is None on the CPU.

    `load_seconds`: until a prompt of two tokens is answered.
    """

    resident_bytes: dict[str, int]
    peak_resident_bytes: int
    device_bytes: dict[str, int] | None
    load_seconds: float


def measure_process(
    folder: Path,
    *,
    provider: str,
    threads: int | None,
    prompt_length: int,
    num_new_tokens: int,
) -> ProcessMemory:
    """Start a process that loads the bundle and answers one request. Raises RuntimeProviderError where it fails."""
    arguments = [str(folder), provider, str(threads or 0), str(prompt_length), str(num_new_tokens)]
    command = [sys.executable, "-m", "voidprune.quality.process_memory", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeProviderError(f"the process that measures the memory of {folder.name} failed: {reason}")
    return ProcessMemory(**json.loads(finished.stdout))


def watch_request(
    folder: Path, *, provider: str, threads: int | None, prompt_length: int, num_new_tokens: int
) -> ProcessMemory:
    """Load a bundle and answer one request in this process."""
    if threads is not None:
        size_thread_pool(threads)
    resident, device = {}, {}

    def note(phase: str) -> None:
        resident[phase] = resident_bytes()
        if provider == "cuda":
            device[phase] = _free_device_bytes()

    note("before")
    started = time.perf_counter()
    session = BundleSession(folder, provider=provider)
    session.start(max_positions=2).prefill_greedily([[0, 0]])  # some of it is opened when it is needed first
    load_seconds = time.perf_counter() - started
    note("loaded")
    conversation = session.start(max_positions=prompt_length + num_new_tokens)
    prompt = np.random.default_rng(0).integers(0, session.vocab_size, prompt_length).tolist()
    token = conversation.prefill_greedily([prompt])
    note("prefilled")
    for _ in range(num_new_tokens):
        token = conversation.decode_greedily(token[:, np.newaxis])[:, -1]
    note("decoded")
    taken = {phase: device["before"] - free for phase, free in device.items()}
    return ProcessMemory(resident, max(peak_resident_bytes(), *resident.values()), taken or None, load_seconds)


def resident_bytes() -> int:
    """Of this process, now: what it maps twice, such as weights that two sessions read, counts once."""
    mappings = Path("/proc/self/smaps")
    return count_once(mappings.read_text()) if mappings.exists() else peak_resident_bytes()


def count_once(mappings: str) -> int:
    """Resident bytes of the mappings that /proc/PID/smaps lists, of those of one place in one file only the largest."""
    largest: dict[tuple[str, ...], int] = {}
    key: tuple[str, ...] = ()
    for line in mappings.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # address, permissions, offset, device, inode, file
            address, (_, offset, device, inode) = name, rest.split()[:4]
            key = (address,) if inode == "0" else (device, inode, offset)
        elif name == "Rss:":
            largest[key] = max(largest.get(key, 0), int(rest.split()[0]) * 1024)
    return sum(largest.values())


def peak_resident_bytes() -> int:
    """The most that this process had resident; of what is mapped twice now, once."""
    import resource

    # getrusage would count what the parent had before this process was started
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak, now = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    return largest if peak is None or now is None else max(peak - now, 0) + resident_bytes()


def _status_bytes(name: str) -> int | None:
    """A line of what Linux says of this process; None on other systems."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    kilobytes = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return None if kilobytes is None else int(kilobytes[1]) * 1024


def _free_device_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def main(folder: str, provider: str, threads: str, prompt_length: str, num_new_tokens: str) -> None:
    found = watch_request(
        Path(folder),
        provider=provider,
        threads=int(threads) or None,
        prompt_length=int(prompt_length),
        num_new_tokens=int(num_new_tokens),
    )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
