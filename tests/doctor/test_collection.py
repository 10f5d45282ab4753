"""Facts of environments that are really broken: fake wheels on the path, a Hub that is not there, a disk that is too small."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from voidprune.doctor import collection
from voidprune.doctor.children import run_examination
from voidprune.doctor.collection import collect_facts, look_at_folder, look_at_machine
from voidprune.doctor.diagnosis import Diagnosis, diagnose
from voidprune.doctor.judgements import Finding, Status
from voidprune.doctor.requirements import REQUIRED
from voidprune.models.checkpoint import read_header
from voidprune.pipeline.models import demo_folder

pytestmark = pytest.mark.usefixtures("patient_doctor")


def install(place: Path, name: str, version: str) -> None:
    """The metadata of a wheel, as pip leaves it."""
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with packages: nothing of this environment is on the path but voidprune and the standard library."""
    place = tmp_path / "site"
    place.mkdir()
    standard = [entry for entry in sys.path if "site-packages" not in entry and "dist-packages" not in entry]
    root = str(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", [str(place), *(entry for entry in standard if entry != root), root])
    return place


def examine(tmp_path: Path, model: str | None = None) -> Diagnosis:
    return diagnose(collect_facts(model, output=tmp_path / "out"))


def about(diagnosis: Diagnosis, area: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.area == area]


FAKE_RUNTIME = "class InferenceSession: pass\n__version__ = '1.31.1'\ndef get_available_providers(): return []"
FAKE_BUILD = "package_name = 'onnxruntime'\n__version__ = '1.31.1'\ncuda_version = ''"


def fill(place: Path, package: str, files: dict[str, str]) -> None:
    """The files of a package."""
    for name, content in files.items():
        file = place / package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_an_environment_with_nothing_in_it(site: Path, tmp_path: Path) -> None:
    diagnosis = examine(tmp_path, "demo")
    absent = {finding.fact for finding in about(diagnosis, "packages")}
    assert absent == {f"{name} is not installed" for name in REQUIRED}
    assert about(diagnosis, "onnxruntime")[0].fact == "onnxruntime is not installed"
    assert about(diagnosis, "providers")[0].status is Status.NOT_CHECKED
    assert "ModuleNotFoundError" in about(diagnosis, "model")[0].fact
    assert diagnosis.status is Status.PROBLEM
    json.dumps(diagnosis.to_document(), allow_nan=False)


def test_two_wheels_of_onnxruntime(site: Path, tmp_path: Path) -> None:
    install(site, "onnxruntime", "1.31.1")
    install(site, "onnxruntime-gpu", "1.30.0")
    fill(
        site,
        "onnxruntime",
        {"__init__.py": FAKE_RUNTIME, "capi/__init__.py": "", "capi/build_and_package_info.py": FAKE_BUILD},
    )
    (finding,) = about(examine(tmp_path), "onnxruntime")
    assert finding.status is Status.PROBLEM
    assert finding.fact == (
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are both installed, and overwrite each other's files; "
        "those that lie there are of onnxruntime 1.31.1"
    )


def test_files_of_a_wheel_that_was_removed_lie_over_those_of_another(site: Path, tmp_path: Path) -> None:
    install(site, "onnxruntime-gpu", "1.31.1")
    fill(
        site,
        "onnxruntime",
        {"__init__.py": FAKE_RUNTIME, "capi/__init__.py": "", "capi/build_and_package_info.py": FAKE_BUILD},
    )
    (finding,) = about(examine(tmp_path), "onnxruntime")
    assert finding.fact == "onnxruntime-gpu 1.31.1 is installed, but the files that lie there are of onnxruntime 1.31.1"


@pytest.mark.parametrize("flavours", [("onnxruntime-gpu",), ()])
def test_an_uninstalled_wheel_leaves_an_empty_package(flavours: tuple[str, ...], site: Path, tmp_path: Path) -> None:
    for name in flavours:
        install(site, name, "1.31.1")
    fill(site, "onnxruntime", {"capi/leftover.txt": ""})
    (finding,) = about(examine(tmp_path), "onnxruntime")
    assert finding.status is Status.PROBLEM
    assert "cannot be imported: ImportError: the package onnxruntime is empty" in finding.fact


def test_packages_that_crash_hide_or_lie(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *arguments: str, timeout: float) -> Any:
        return run_examination(name, *arguments, timeout=1.0 if arguments == ("scipy",) else timeout)

    monkeypatch.setattr(collection, "run_examination", run)
    install(site, "torch", "2.13.0")
    fill(site, "torch", {"__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGILL)"})
    install(site, "numpy", "1.26.4")
    fill(site, "numpy", {"__init__.py": ""})
    install(site, "scipy", "1.17.0")
    fill(site, "scipy", {"__init__.py": "import time\ntime.sleep(3600)"})
    (site / "damaged-1.0.dist-info").mkdir()  # without metadata
    facts = {finding.fact for finding in about(examine(tmp_path), "packages")}
    assert "torch 2.13.0 cannot be imported: it crashes (SIGILL)" in facts
    assert "numpy 1.26.4 is installed; at least 2.0 is needed" in facts
    assert "scipy 1.17.0 cannot be imported: no answer in 1 s" in facts


@pytest.fixture
def _few_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages take seconds to import, and do not matter to what is tested."""
    monkeypatch.setattr(collection, "REQUIRED", {})
    monkeypatch.setattr(collection, "EXTRAS", {})


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and nobody can, because it is taken."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.usefixtures("_few_imports")
def test_a_hub_that_does_not_answer_and_whose_secrets_stay_secret(
    closed_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:secret@127.0.0.1:{closed_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    diagnosis = examine(tmp_path, "org/model")
    unreachable, token = about(diagnosis, "hub")
    assert unreachable.status is Status.WARNING
    assert unreachable.fact.startswith(f"http://127.0.0.1:{closed_port} does not answer: ")
    assert token.fact == "there is an access token"
    model = about(diagnosis, "model")[0]
    assert model.status is Status.PROBLEM
    assert "no model org/model" in model.fact
    text = json.dumps(diagnosis.to_document())
    assert "secret" not in text
    assert diagnosis.facts.cache is not None
    assert diagnosis.facts.cache.writable


def sparse_model(folder: Path, num_bytes: int) -> None:
    """The demo model with one tensor more, a hole that is larger than the disk."""
    shutil.copytree(demo_folder(), folder)
    file = folder / "model.safetensors"
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + header_bytes])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["hole.weight"] = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [end, end + num_bytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = content[8 + header_bytes :]
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(file, 8 + len(text) + end + num_bytes)
    assert "hole.weight" in read_header(file)


@pytest.mark.usefixtures("_few_imports")
def test_a_model_that_is_larger_than_disk_and_memory(tmp_path: Path) -> None:
    num_bytes = 2 * max(shutil.disk_usage(tmp_path).total, 1 << 40) // 4 * 4
    try:
        sparse_model(tmp_path / "huge", num_bytes)
    except OSError as error:
        pytest.skip(f"this file system has no holes of this size: {error}")
    findings = {finding.fact: finding for finding in about(examine(tmp_path, str(tmp_path / "huge")), "model")}
    short = {fact.split(":")[0] for fact, finding in findings.items() if finding.status is Status.PROBLEM}
    assert short == {
        "export with all layers",
        "running it on the CPU, in bf16",
        "verifying an export, one layer at a time",
    }


def test_this_environment_is_fine(tmp_path: Path) -> None:
    seen: list[int] = []

    def started(total: int) -> object:
        seen.append(total)
        return lambda: seen.append(1)

    facts = collect_facts("demo", output=tmp_path / "out", started=started)  # type: ignore[arg-type]
    diagnosis = diagnose(facts)
    areas = ("python", "packages", "onnxruntime", "model")
    assert {finding.status for area in areas for finding in about(diagnosis, area)} == {Status.OK}
    assert facts.trials["CPUExecutionProvider"].got == ("CPUExecutionProvider",)
    assert sum(seen[1:]) == seen[0]
    assert facts.output.path == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_limits_of_a_container(tmp_path: Path) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    800 kB\n")
    machine = look_at_machine(cgroup=tmp_path, memory_status=memory)
    assert (machine.memory_bytes, machine.free_memory_bytes, machine.core_limit) == (1024000, 819200, None)
    for name, content in {"memory.max": "500000\n", "memory.current": "200000\n", "cpu.max": "150000 100000\n"}.items():
        (tmp_path / name).write_text(content)
    machine = look_at_machine(cgroup=tmp_path, memory_status=memory)
    assert (machine.memory_bytes, machine.free_memory_bytes, machine.core_limit) == (500000, 300000, 1.5)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    machine = look_at_machine(cgroup=tmp_path, memory_status=memory)
    assert (machine.memory_bytes, machine.core_limit) == (1024000, None)


def test_a_folder_that_will_be_made(tmp_path: Path) -> None:
    folder = look_at_folder(tmp_path / "a" / "b")
    assert folder.writable
    assert folder.free_bytes
    (tmp_path / "file").write_text("")
    assert not look_at_folder(tmp_path / "file").writable
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
