"""Cores, memory, disks, the Hub and a model: each state by itself, from plain facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.doctor.healthy import CPU_MACHINE, GB, GPU_MACHINE, MODEL
from tests.doctor.test_software import bad
from voidprune.doctor.facts import Folder, Hub, Machine, Model
from voidprune.doctor.hardware import HEADROOM, judge_hub, judge_machine, judge_model
from voidprune.doctor.judgements import Status


def test_nothing_is_wrong_with_a_healthy_machine() -> None:
    assert bad(judge_machine, CPU_MACHINE) == bad(judge_hub, CPU_MACHINE) == []
    assert bad(judge_model, CPU_MACHINE, machine=replace(CPU_MACHINE.machine, free_memory_bytes=90 * GB)) == []


@pytest.mark.parametrize(
    ("machine", "fact", "mend"),
    [
        (Machine(16, 2.0, None, GB, GB), "16 cores are seen, but this container may use 2", "taskset --cpu-list 0-1 voidprune ..."),
        (Machine(16, 0.5, None, GB, GB), "this container may use 0.5", "taskset --cpu-list 0-0 voidprune ..."),
        (Machine(16, None, "1", GB, GB), "16 cores; torch uses 1, because OMP_NUM_THREADS says so", "unset OMP_NUM_THREADS"),
    ],
)  # fmt: skip
def test_cores_that_are_not_used_or_not_there(machine: Machine, fact: str, mend: str) -> None:
    (finding,) = bad(judge_machine, CPU_MACHINE, machine=machine)
    assert finding.status is Status.WARNING
    assert fact in finding.fact
    assert finding.mend == mend


@pytest.mark.parametrize("place", ["output", "temporary", "cache"])
def test_a_folder_that_cannot_be_written_to(place: str) -> None:
    (finding,) = bad(judge_machine, CPU_MACHINE, **{place: Folder("/locked", False, GB)})
    assert finding.status is Status.PROBLEM
    assert "nothing can be written to /locked" in finding.fact
    assert finding.mend


def test_what_the_system_does_not_say_is_not_checked() -> None:
    facts = replace(CPU_MACHINE, machine=Machine(1, None, None, None, None), cache=None)
    statuses = [finding.status for finding in judge_machine(facts)]
    assert statuses.count(Status.NOT_CHECKED) == 2
    assert "the system does not say how much memory is free" in [finding.fact for finding in judge_model(facts)]


@pytest.mark.parametrize(
    ("hub", "status", "fact"),
    [
        (Hub("https://h", status=None, failure="ConnectError: refused"), Status.WARNING, "does not answer: ConnectError: refused"),
        (Hub("https://h", status=403), Status.WARNING, "https://h answers 403"),
        (Hub("https://h", offline=True), Status.NOT_CHECKED, "HF_HUB_OFFLINE is set"),
        (Hub(failure="ImportError: x"), Status.NOT_CHECKED, "huggingface_hub does not work: ImportError: x"),
        (Hub("https://h", status=200), Status.NOT_CHECKED, "there is no access token"),
    ],
)  # fmt: skip
def test_the_hub(hub: Hub, status: Status, fact: str) -> None:
    found = [finding for finding in judge_hub(replace(CPU_MACHINE, hub=hub)) if finding.status is status]
    assert any(fact in finding.fact for finding in found)


def test_headroom_is_that_of_the_verification() -> None:
    from voidprune.quality import parity

    assert HEADROOM == parity.HEADROOM


def test_without_a_model_the_command_is_named() -> None:
    (finding,) = judge_model(replace(CPU_MACHINE, model=None))
    assert (finding.status, finding.mend) == (Status.NOT_CHECKED, "voidprune doctor MODEL")


def test_a_model_that_cannot_be_opened_says_why() -> None:
    (finding,) = judge_model(replace(CPU_MACHINE, model=Model("m", failure="no model at m", hint="give a folder")))
    assert (finding.status, finding.fact, finding.mend) == (Status.PROBLEM, "m: no model at m", "give a folder")


def test_a_quantized_model_is_compared_with_disks_only() -> None:
    found = list(judge_model(replace(CPU_MACHINE, model=replace(MODEL, is_quantized=True))))
    assert not any("memory" in finding.fact for finding in found)
    assert found[-1].status is Status.NOT_CHECKED


# 16 GB of bf16 are 32 in float32: 40 GB to run in float32, 20 in bf16, 80 for two models.
@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (80, {}),
        (79, {"heal --method distill": Status.WARNING}),
        (39, {"in fp32": Status.WARNING, "heal --method linear": Status.WARNING, "heal --method distill": Status.WARNING}),
        (19, {"in bf16": Status.PROBLEM, "heal --method linear": Status.WARNING, "heal --method distill": Status.WARNING}),
        (1, {"in bf16": Status.PROBLEM, "verifying an export": Status.PROBLEM,
             "heal --method linear": Status.WARNING, "heal --method distill": Status.WARNING}),
    ],
)  # fmt: skip
def test_memory_against_a_model(free: int, expected: dict[str, Status]) -> None:
    machine = replace(CPU_MACHINE.machine, free_memory_bytes=free * GB)
    findings = bad(judge_model, CPU_MACHINE, machine=machine)
    assert len(findings) == len(expected)
    for part, status in expected.items():
        assert [finding.status for finding in findings if part in finding.fact] == [status]
        assert all(finding.mend for finding in findings)


def test_a_model_that_fits_into_memory_layer_by_layer_can_be_exported() -> None:
    machine = replace(CPU_MACHINE.machine, free_memory_bytes=30 * GB)
    facts = [finding.fact for finding in judge_model(replace(CPU_MACHINE, machine=machine))]
    assert "verifying an export, one layer at a time: 1.25 GB of memory, 30.00 GB free" in facts


@pytest.mark.parametrize(
    ("changes", "status", "fact"),
    [
        ({"output": Folder("/o", True, 15 * GB)}, Status.PROBLEM, "export with all layers: 16.00 GB on the disk of /o"),
        ({"temporary": Folder("/t", True, 15 * GB)}, Status.WARNING, "bench --baseline"),
        ({"cache": Folder("/c", True, 15 * GB), "model": replace(MODEL, is_remote=True)}, Status.WARNING, "fetching the whole"),
    ],
)  # fmt: skip
def test_disks_against_a_model(changes: dict[str, Any], status: Status, fact: str) -> None:
    machine = replace(CPU_MACHINE.machine, free_memory_bytes=90 * GB)
    (finding,) = bad(judge_model, CPU_MACHINE, machine=machine, **changes)
    assert finding.status is status
    assert fact in finding.fact


def test_the_cache_does_not_matter_for_a_model_that_is_here() -> None:
    machine = replace(CPU_MACHINE.machine, free_memory_bytes=90 * GB)
    assert bad(judge_model, CPU_MACHINE, machine=machine, cache=Folder("/c", True, 0)) == []


def test_a_gpu_against_a_model() -> None:
    machine = replace(GPU_MACHINE.machine, free_memory_bytes=90 * GB)
    assert bad(judge_model, GPU_MACHINE, machine=machine) == []
    (device,) = GPU_MACHINE.torch.devices
    small = replace(GPU_MACHINE.torch, devices=(replace(device, free_bytes=19 * GB),))
    (finding,) = bad(judge_model, GPU_MACHINE, machine=machine, torch=small)
    assert "running it on RTX, in bf16: 20.00 GB, 19.00 GB free" in finding.fact


def test_memory_for_the_cpu_is_no_problem_where_a_gpu_has_enough() -> None:
    machine = replace(GPU_MACHINE.machine, free_memory_bytes=19 * GB)
    assert {finding.status for finding in bad(judge_model, GPU_MACHINE, machine=machine)} == {Status.WARNING}
