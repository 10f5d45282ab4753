"""Looking at this machine: facts, without a word about what they mean. Never raises because of what it finds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voidprune.doctor.children import Failure, redact, run_examination
from voidprune.doctor.facts import (
    Device,
    Driver,
    Facts,
    Folder,
    Hub,
    Machine,
    Model,
    Package,
    Runtime,
    Torch,
    Trial,
)
from voidprune.doctor.requirements import CUDNN, EXTRAS, REQUIRED

IMPORT_SECONDS = 120.0
"""Longest import. torch takes 2 seconds, and 20 on a busy machine with a cold disk."""
PROVIDER_SECONDS = 60.0
MODEL_SECONDS = 120.0
HUB_SECONDS = 5
CGROUP = Path("/sys/fs/cgroup")

Advance = Callable[[], None]


def collect_facts(
    model: str | None = None, *, output: Path, started: Callable[[int], Advance] = lambda _count: lambda: None
) -> Facts:
    """Everything that can be seen here. `started` is told how many examinations there are, and gives what is called after each."""
    versions = installed_versions()
    required = {name: Package(name, versions.get(_normal(name))) for name in REQUIRED}
    extras = {name: Package(name, versions.get(_normal(name))) for name in EXTRAS}
    importable = [
        (REQUIRED[name].module, package)
        for name, package in required.items()
        if package.installed and name != "torch"  # examined for itself
    ]
    importable += [(EXTRAS[name].requirement.module, package) for name, package in extras.items() if package.installed]
    workers = max(2, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        advance = started(len(importable) + 4 + (model is not None))

        def examine(name: str, *arguments: str, timeout: float = IMPORT_SECONDS) -> Future[Any]:
            future = pool.submit(run_examination, name, *arguments, timeout=timeout)
            future.add_done_callback(lambda _: advance())
            return future

        torch = examine("torch")
        runtime = examine("runtime")
        driver = examine("driver", timeout=PROVIDER_SECONDS)
        hub = examine("hub", str(HUB_SECONDS))
        opened = examine("model", model, timeout=MODEL_SECONDS) if model is not None else None
        imports = {
            package.name: examine("transformers") if module == "transformers" else examine("import", module)
            for module, package in importable
        }
        torch_facts = _torch(torch)
        failures = {"torch": torch_facts.failure, **{name: _failure(future) for name, future in imports.items()}}
        runtime_facts = _runtime(runtime)
        trials = {
            provider: pool.submit(run_examination, "provider", provider, timeout=PROVIDER_SECONDS)
            for provider in runtime_facts.providers
        }
        libraries = _libraries(runtime_facts)
        hub_facts, cache = _hub(hub)
        return Facts(
            python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
            system=sys.platform,
            processor=platform.machine(),
            packages={name: Package(name, one.installed, failures.get(name)) for name, one in required.items()},
            extras={name: Package(name, one.installed, failures.get(name)) for name, one in extras.items()},
            flavours=runtime_flavours(versions),
            runtime=runtime_facts,
            torch=torch_facts,
            driver=_driver(driver),
            machine=look_at_machine(),
            hub=hub_facts,
            output=look_at_folder(output),
            temporary=look_at_folder(_temporary_folder()),
            cache=None if cache is None else look_at_folder(cache),
            libraries=libraries,
            trials={provider: _trial(future) for provider, future in trials.items()},
            model=None if model is None or opened is None else _model(model, opened),
        )


def installed_versions() -> dict[str, str]:
    """Distribution -> version, by the metadata on the path; the first of a name is the one that Python finds."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name, version = distribution.metadata["Name"], distribution.version
        except Exception:  # a damaged dist-info has no name to put into a finding
            continue
        if name and version:
            found.setdefault(_normal(name), version)
    return found


def runtime_flavours(versions: Mapping[str, str]) -> dict[str, str]:
    """The wheels that write into `onnxruntime/`. Other packages of that project have a module of their own."""
    return {
        name: version
        for name, version in sorted(versions.items())
        if re.fullmatch(
            r"onnxruntime(-(gpu|cuda\d*|directml|openvino|qnn|rocm|migraphx|silicon|training|azure|webgpu))?", name
        )
    }


def look_at_machine(*, cgroup: Path = CGROUP, memory_status: Path = Path("/proc/meminfo")) -> Machine:
    """Cores and memory, within what a container grants (version 2 of cgroups)."""
    affinity = getattr(os, "sched_getaffinity", None)
    total, free = _memory(memory_status)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and (total is None or limit < total):
        total, free = limit, max(0, min(free or limit, limit - (used or 0)))
    return Machine(
        usable_cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        core_limit=_core_limit(cgroup / "cpu.max"),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        memory_bytes=total,
        free_memory_bytes=free,
    )


def look_at_folder(path: Path) -> Folder:
    """A folder, or where it would be made: its nearest parent that there is. Writing is tried, not asked for."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free: int | None = shutil.disk_usage(place).free
    except OSError:
        free = None
    try:
        with tempfile.TemporaryFile(dir=place):
            return Folder(str(path.absolute()), True, free)
    except OSError:
        return Folder(str(path.absolute()), False, free)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none can be written to
        return Path(os.environ.get("TMPDIR", "/tmp"))


def _failure(future: Future[Any]) -> str | None:
    try:
        future.result()
    except Failure as failure:
        return str(failure)
    return None


def _runtime(future: Future[Any]) -> Runtime:
    try:
        found = future.result()
    except Failure as failure:
        return Runtime(failure=str(failure))
    return Runtime(found["package"], found["version"], found["cuda"], tuple(found["providers"]))


def _torch(future: Future[Any]) -> Torch:
    try:
        found = future.result()
    except Failure as failure:
        return Torch(failure=str(failure))
    return Torch(found["version"], found["cuda"], tuple(Device(**device) for device in found["devices"]))


def _trial(future: Future[Any]) -> Trial:
    try:
        return Trial(tuple(future.result()["got"]))
    except Failure as failure:
        return Trial(failure=str(failure))


def _libraries(runtime: Runtime) -> dict[str, str | None]:
    """What onnxruntime's CUDA provider of this build loads, as its `preload_dlls` names it."""
    if runtime.cuda is None:
        return {}
    major = runtime.cuda.split(".")[0]
    names = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas")]
    names += ["libcurand.so.10", f"libcudnn.so.{CUDNN}"]
    try:
        found: dict[str, str | None] = run_examination("libraries", *names, timeout=PROVIDER_SECONDS)
    except Failure as failure:
        return dict.fromkeys(names, str(failure))
    return found


def _driver(future: Future[Any]) -> Driver:
    has_device = Path("/dev/nvidia0").exists() or Path("/dev/nvhost-ctrl").exists() or Path("/dev/dxg").exists()
    version = _driver_version()
    try:
        major, minor = future.result()["cuda"]
    except Failure as failure:
        return Driver(has_device, version, failure=str(failure))
    return Driver(has_device, version, (major, minor))


def _driver_version() -> str | None:
    """By the kernel module, else by nvidia-smi, which hangs where a GPU does."""
    try:
        found = re.search(r"(\d{3,}\.\d+(\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return found[1]
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROVIDER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def _hub(future: Future[Any]) -> tuple[Hub, Path | None]:
    try:
        found = future.result()
    except Failure as failure:
        return Hub(failure=str(failure)), None
    reason = None if found["failure"] is None else redact(found["failure"])
    hub = Hub(redact(found["endpoint"]), found["offline"], found["status"], reason, found["has_token"])
    return hub, Path(found["cache"])


def _model(name: str, future: Future[Any]) -> Model:
    try:
        return Model(name, **future.result())
    except Failure as failure:
        return Model(name, failure=str(failure))


def _memory(status: Path) -> tuple[int | None, int | None]:
    """(bytes of memory, bytes that are free). Pages of files count as free."""
    try:
        sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", status.read_text(), re.MULTILINE))
        return int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (ValueError, OSError):
        return None, None


def _core_limit(file: Path) -> float | None:
    """ "200000 100000" is two cores, "max 100000" is all of them."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
