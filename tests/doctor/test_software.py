"""Python, packages, onnxruntime and CUDA: each state by itself, from plain facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.doctor.healthy import CPU_MACHINE, GPU_MACHINE
from voidprune.doctor.facts import Driver, Facts, Package, Runtime, Torch, Trial
from voidprune.doctor.judgements import Finding, Status
from voidprune.doctor.software import judge_cuda, judge_extras, judge_packages, judge_providers, judge_runtime

REPAIRED = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu>=1.31'"


def bad(judge: Callable[[Facts], Iterator[Finding]], facts: Facts, **changes: Any) -> list[Finding]:
    found = list(judge(replace(facts, **changes)))
    return [finding for finding in found if finding.status in (Status.WARNING, Status.PROBLEM)]


@pytest.mark.parametrize("facts", [CPU_MACHINE, GPU_MACHINE])
def test_nothing_is_wrong_with_a_healthy_machine(facts: Facts) -> None:
    for judge in (judge_packages, judge_runtime, judge_cuda, judge_providers, judge_extras):
        assert bad(judge, facts) == []


def test_packages_that_are_absent_too_old_too_new_or_broken() -> None:
    packages = {
        **CPU_MACHINE.packages,
        "onnx": Package("onnx", None),
        "numpy": Package("numpy", "1.26.4"),
        "transformers": Package("transformers", "6.0.0"),
        "torch": Package("torch", "2.13.0", "OSError: libc10.so: cannot open shared object file"),
    }
    findings = bad(judge_packages, CPU_MACHINE, packages=packages)
    assert {(finding.status, finding.fact, finding.mend) for finding in findings} == {
        (Status.PROBLEM, "onnx is not installed", "pip install 'onnx>=1.20'"),
        (Status.PROBLEM, "numpy 1.26.4 is installed; at least 2.0 is needed", "pip install 'numpy>=2.0'"),
        (
            Status.PROBLEM,
            "transformers 6.0.0 is installed; at least 4.57 and below 6 is needed",
            "pip install 'transformers>=4.57,<6'",
        ),
        (
            Status.PROBLEM,
            "torch 2.13.0 cannot be imported: OSError: libc10.so: cannot open shared object file",
            "pip install --force-reinstall 'torch>=2.6'",
        ),
    }
    (fine,) = [one for one in judge_packages(replace(CPU_MACHINE, packages=packages)) if one.area == "packages"][4:]
    assert "torch" not in fine.fact
    assert "safetensors 0.6" in fine.fact


def test_an_old_python() -> None:
    (finding,) = bad(judge_packages, CPU_MACHINE, python=(3, 10, 4))
    assert finding.fact == "Python 3.10.4; 3.11 or newer is needed"


BOTH = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
GPU_WHEEL = {"onnxruntime-gpu": "1.31.1"}


@pytest.mark.parametrize(
    ("flavours", "runtime", "fact"),
    [
        (BOTH, Runtime("onnxruntime", "1.31.1"), "overwrite each other's files; those that lie there are of onnxruntime 1.31.1"),
        (BOTH, Runtime(failure="ImportError: x"), "those that lie there are of neither"),
        (GPU_WHEEL, Runtime("onnxruntime", "1.31.1"), "onnxruntime-gpu 1.31.1 is installed, but the files that lie there are of"),
        (GPU_WHEEL, Runtime("onnxruntime-gpu", "1.30.0"), "the files that lie there are of onnxruntime-gpu 1.30.0"),
        (GPU_WHEEL, Runtime(failure="ImportError: the package onnxruntime is empty"), "cannot be imported: ImportError: the"),
        ({}, Runtime(failure="ModuleNotFoundError: No module named 'onnxruntime'"), "onnxruntime is not installed"),
        ({}, Runtime(failure="ImportError: empty"), "onnxruntime, of no installed wheel, cannot be imported"),
        ({"onnxruntime-gpu": "1.22.0"}, Runtime("onnxruntime-gpu", "1.22.0"), "at least 1.31 is needed"),
    ],
)  # fmt: skip
def test_wheels_of_onnxruntime_that_do_not_fit(flavours: dict[str, str], runtime: Runtime, fact: str) -> None:
    (finding,) = bad(judge_runtime, CPU_MACHINE, flavours=flavours, runtime=runtime)
    assert finding.status is Status.PROBLEM
    assert fact in finding.fact
    assert finding.mend == REPAIRED


def test_an_onnxruntime_that_says_nothing_of_itself_is_taken_by_its_version() -> None:
    assert bad(judge_runtime, CPU_MACHINE, runtime=Runtime(None, "1.31.1", "13.0")) == []


def test_files_of_no_wheel_are_worth_a_warning() -> None:
    (finding,) = bad(judge_runtime, CPU_MACHINE, flavours={}, runtime=Runtime("onnxruntime-gpu", "1.31.1"))
    assert finding.status is Status.WARNING


def test_the_repair_takes_onnxruntime_genai_along_because_it_brings_a_wheel() -> None:
    extras = {**CPU_MACHINE.extras, "onnxruntime-genai": Package("onnxruntime-genai", "0.18.0")}
    (finding,) = bad(judge_runtime, CPU_MACHINE, flavours=BOTH, extras=extras)
    assert finding.mend == (
        "pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-genai"
        " && pip install 'onnxruntime-gpu>=1.31' 'onnxruntime-genai-cuda>=0.18'"
    )


def test_the_repair_on_other_processors_is_the_wheel_for_the_cpu() -> None:
    (finding,) = bad(judge_runtime, CPU_MACHINE, flavours=BOTH, processor="aarch64")
    assert str(finding.mend).endswith("&& pip install 'onnxruntime>=1.31'")


def test_without_a_gpu_cuda_is_not_checked() -> None:
    (finding,) = judge_cuda(CPU_MACHINE)
    assert finding.status is Status.NOT_CHECKED
    assert "torch 2.13.0+cpu is a CPU build" in finding.fact


@pytest.mark.parametrize(
    ("changes", "status", "fact"),
    [
        ({"driver": Driver(True, None, None, "cuInit says 999")}, Status.PROBLEM, "its driver does not answer: cuInit says 999"),
        ({"driver": Driver(True, "535.1", (12, 2))}, Status.PROBLEM, "onnxruntime needs CUDA 13, and the driver speaks CUDA 12.2"),
        ({"torch": Torch("2.13.0+cpu")}, Status.WARNING, "torch 2.13.0+cpu was built for the CPU only"),
        ({"torch": Torch("2.13.0", "13.0")}, Status.PROBLEM, "built for CUDA 13.0, sees no GPU"),
        ({"runtime": Runtime("onnxruntime", "1.31.1")}, Status.WARNING, "onnxruntime was built for the CPU only"),
        ({"libraries": {"libcudart.so.13": None, "libcudnn.so.9": "absent"}}, Status.PROBLEM,
         "onnxruntime needs CUDA 13 and cuDNN 9; not found: libcudnn.so.9"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(changes: dict[str, Any], status: Status, fact: str) -> None:
    (finding,) = bad(judge_cuda, GPU_MACHINE, **changes)
    assert finding.status is status
    assert fact in finding.fact
    assert finding.mend


def test_libraries_of_another_cuda_are_named() -> None:
    torch = replace(GPU_MACHINE.torch, cuda="12.8")
    assert bad(judge_cuda, GPU_MACHINE, torch=torch) == []  # both can be there
    (finding,) = bad(judge_cuda, GPU_MACHINE, torch=torch, libraries={"libcudart.so.13": "absent"})
    assert "(torch brings those of CUDA 12.8)" in finding.fact
    assert finding.mend == "pip install 'voidprune[cuda]'"


def test_a_silent_fall_back_is_a_problem_where_there_is_a_gpu() -> None:
    fallen = {**GPU_MACHINE.trials, "CUDAExecutionProvider": Trial(("CPUExecutionProvider",))}
    (finding,) = bad(judge_providers, GPU_MACHINE, trials=fallen)
    assert finding.status is Status.PROBLEM
    assert "the session has CPUExecutionProvider instead" in finding.fact
    assert bad(judge_providers, CPU_MACHINE, trials=fallen) == []


def test_a_crash_of_a_provider_is_told() -> None:
    crashed = {**CPU_MACHINE.trials, "CPUExecutionProvider": Trial(failure="it crashes (SIGILL)")}
    (finding,) = bad(judge_providers, CPU_MACHINE, trials=crashed)
    assert (finding.fact, finding.mend) == ("CPUExecutionProvider does not work: it crashes (SIGILL)", REPAIRED)


def test_providers_that_voidprune_does_not_use_are_no_problem() -> None:
    trials = {**GPU_MACHINE.trials, "TensorrtExecutionProvider": Trial(failure="Fail: no TensorRT")}
    assert bad(judge_providers, GPU_MACHINE, trials=trials) == []


def test_extras_that_are_absent_old_or_broken() -> None:
    extras = {
        **CPU_MACHINE.extras,
        "matplotlib": Package("matplotlib", None),
        "peft": Package("peft", "0.9.0"),
        "lm_eval": Package("lm_eval", "0.4.13", "ImportError: no evaluate"),
        "optimum-onnx": Package("optimum-onnx", "0.1.0", "ImportError: transformers"),
    }
    findings = list(judge_extras(replace(CPU_MACHINE, extras=extras)))
    absent = {(finding.fact, finding.mend) for finding in findings if finding.status is Status.NOT_CHECKED}
    assert absent == {
        ("not installed, for plots", "pip install 'voidprune[report]'"),
        ("not installed, for running exports in onnxruntime-genai", "pip install 'voidprune[genai]'"),
    }
    warned = {finding.fact: finding.mend for finding in findings if finding.status is Status.WARNING}
    assert {fact.split()[0]: mend for fact, mend in warned.items()} == {
        "peft": "pip install 'voidprune[heal]'",
        "lm_eval": "pip install --force-reinstall --no-deps 'lm_eval>=0.4.13'",
        "optimum-onnx": "python -m venv optimum && optimum/bin/pip install 'voidprune[optimum]'",
    }


def test_either_package_of_onnxruntime_genai_will_do() -> None:
    extras = {**CPU_MACHINE.extras, "onnxruntime-genai": Package("onnxruntime-genai", "0.18.0")}
    found = [finding for finding in judge_extras(replace(CPU_MACHINE, extras=extras)) if "genai" in finding.fact]
    assert [finding.status for finding in found] == [Status.OK]
