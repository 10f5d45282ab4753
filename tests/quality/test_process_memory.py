"""A request is watched phase by phase, in a process of its own."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from voidprune.errors import RuntimeProviderError
from voidprune.pipeline.export import export_model
from voidprune.pipeline.models import open_model
from voidprune.quality.process_memory import PHASES, count_once, measure_process, resident_bytes, watch_request
from voidprune.schedule import full_schedule

REQUEST = {"provider": "cpu", "threads": None, "prompt_length": 6, "num_new_tokens": 3}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "bundle"
    checkpoint = open_model("demo")
    export_model(checkpoint, full_schedule(checkpoint.identity), folder, provider="cpu")
    return folder


def test_memory_grows_by_what_is_loaded_and_run(bundle: Path) -> None:
    for _ in range(5):  # the kernel may take pages of files away meanwhile; it does not do so every time
        found = measure_process(bundle, provider="cpu", threads=2, prompt_length=6, num_new_tokens=3)
        resident = [found.resident_bytes[phase] for phase in PHASES]
        if resident == sorted(resident):
            break
    assert resident == sorted(resident)
    assert found.peak_resident_bytes >= resident[-1]
    weights = (bundle / "model.safetensors").stat().st_size
    assert found.resident_bytes["decoded"] - found.resident_bytes["before"] > weights
    assert found.device_bytes is None
    assert found.load_seconds > 0


def test_the_same_request_here(bundle: Path) -> None:
    found = watch_request(bundle, **REQUEST)  # type: ignore[arg-type]
    assert tuple(found.resident_bytes) == PHASES


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeProviderError, match=r"memory of absent failed: .*is not a bundle"):
        measure_process(tmp_path / "absent", provider="cpu", threads=None, prompt_length=6, num_new_tokens=3)


def test_what_is_mapped_twice_counts_once(tmp_path: Path) -> None:
    def resident() -> int:
        """Of this file alone: the kernel may take pages of others away meanwhile."""
        mappings = re.split(r"^(?=[\da-f]+-[\da-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        return count_once("".join(one for one in mappings if str(tmp_path / "weights") in one))

    size = 64 * 2**20
    (tmp_path / "weights").write_bytes(bytes(size))
    mapped, seen = [], [resident()]
    with (tmp_path / "weights").open("rb") as file:
        for _ in range(2):
            mapped.append(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
            assert not any(mapped[-1][:: mmap.PAGESIZE])
            seen.append(resident())
    assert seen[0] == 0
    assert 0.9 * size < seen[1] <= size < resident_bytes()
    assert seen[2] - seen[1] < 0.1 * size


def test_mappings_as_the_kernel_lists_them() -> None:
    listed = """\
7f00-7f10 r--p 00001000 08:01 99 /weights
Size:               1024 kB
Rss:                 400 kB
7f20-7f30 r--p 00001000 08:01 99 /weights
Rss:                 500 kB
7f30-7f40 r--p 00002000 08:01 99 /weights
Rss:                   7 kB
7f40-7f50 rw-p 00000000 00:00 0
Rss:                  10 kB
7f50-7f60 rw-p 00000000 00:00 0 [heap]
Rss:                  20 kB
"""
    assert count_once(listed) == (500 + 7 + 10 + 20) * 1024
