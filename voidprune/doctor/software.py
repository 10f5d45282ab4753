"""What the facts about Python, packages, onnxruntime and CUDA mean."""

from __future__ import annotations

from collections.abc import Iterator

from voidprune.doctor.facts import Facts, Package
from voidprune.doctor.judgements import Finding, Status
from voidprune.doctor.requirements import (
    CUDNN,
    EXTRAS,
    GENAI_MINIMAL,
    MINIMAL_PYTHON,
    REQUIRED,
    RUNTIME_MINIMAL,
    Requirement,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_RUNTIME = Requirement("onnxruntime", "onnxruntime", RUNTIME_MINIMAL)


def judge_packages(facts: Facts) -> Iterator[Finding]:
    """Python and the packages that everything needs."""
    python = ".".join(map(str, facts.python))
    if facts.python[:2] < MINIMAL_PYTHON:
        wanted = ".".join(map(str, MINIMAL_PYTHON))
        yield Finding(
            "python", Status.PROBLEM, f"Python {python}; {wanted} or newer is needed", f"python{wanted} -m venv .venv"
        )
    else:
        yield Finding("python", Status.OK, f"Python {python}, {facts.system} on {facts.processor}")
    found = [(REQUIRED[name], package) for name, package in facts.packages.items()]
    wrong = [finding for requirement, package in found for finding in _judge_package(requirement, package)]
    yield from wrong
    blamed = {finding.fact.split()[0] for finding in wrong}
    fine = [f"{package.name} {package.installed}" for _, package in found if package.name not in blamed]
    if fine:
        yield Finding("packages", Status.OK, ", ".join(fine))


def _judge_package(requirement: Requirement, package: Package) -> Iterator[Finding]:
    """Nothing where the package is as it should be. A fact begins with the package's name."""
    mend = f"pip install '{requirement.specifier}'"
    if package.installed is None:
        yield Finding("packages", Status.PROBLEM, f"{package.name} is not installed", mend)
    elif not requirement.admits(package.installed):
        limit = f" and below {requirement.limit}" if requirement.limit else ""
        fact = f"{package.name} {package.installed} is installed; at least {requirement.minimal}{limit} is needed"
        yield Finding("packages", Status.PROBLEM, fact, mend)
    elif package.failure is not None:
        fact = f"{package.name} {package.installed} cannot be imported: {package.failure}"
        yield Finding("packages", Status.PROBLEM, fact, f"pip install --force-reinstall '{requirement.specifier}'")


def judge_runtime(facts: Facts) -> Iterator[Finding]:
    """Whether exactly one wheel of onnxruntime is there, and its files are its own."""
    runtime, installed = facts.runtime, facts.flavours
    named = " and ".join(f"{name} {version}" for name, version in installed.items())
    built = " ".join(filter(None, (runtime.package, runtime.version)))
    mend = _reinstall(facts)
    if len(installed) > 1:
        fact = f"{named} are both installed, and overwrite each other's files"
        yield Finding("onnxruntime", Status.PROBLEM, f"{fact}; those that lie there are of {built or 'neither'}", mend)
    elif runtime.failure is not None:
        if not installed and "No module named 'onnxruntime'" in runtime.failure:
            yield Finding("onnxruntime", Status.PROBLEM, "onnxruntime is not installed", mend)
        else:
            fact = f"{named or 'onnxruntime, of no installed wheel,'} cannot be imported: {runtime.failure}"
            yield Finding("onnxruntime", Status.PROBLEM, fact, mend)
    elif not installed:
        fact = f"the files of onnxruntime {built} belong to no installed wheel"
        yield Finding("onnxruntime", Status.WARNING, fact, mend)
    elif (runtime.package, runtime.version) not in ((None, *installed.values()), next(iter(installed.items()))):
        fact = f"{named} is installed, but the files that lie there are of {built}"
        yield Finding("onnxruntime", Status.PROBLEM, fact, mend)
    elif not _RUNTIME.admits(str(runtime.version)):
        fact = f"{named} is installed; at least {RUNTIME_MINIMAL} is needed"
        yield Finding("onnxruntime", Status.PROBLEM, fact, mend)
    else:
        cuda = f", built for CUDA {runtime.cuda} and cuDNN {CUDNN}" if runtime.cuda else ""
        yield Finding("onnxruntime", Status.OK, f"{named}{cuda}")


def _reinstall(facts: Facts) -> str:
    """The command that leaves one flavour: the one that pyproject.toml asks for here. No wheel comes back from a cache half."""
    flavour = "onnxruntime-gpu" if (facts.system, facts.processor) == ("linux", "x86_64") else "onnxruntime"
    gone = sorted({*facts.flavours, "onnxruntime", "onnxruntime-gpu"})
    wanted = [f"'{flavour}>={RUNTIME_MINIMAL}'"]
    genai = [name for name in ("onnxruntime-genai", "onnxruntime-genai-cuda") if _installed(facts, name)]
    if genai:  # each brings a flavour with it
        gone += genai
        suffix = "-cuda" if flavour.endswith("gpu") else ""
        wanted.append(f"'onnxruntime-genai{suffix}>={GENAI_MINIMAL}'")
    return f"pip uninstall -y {' '.join(gone)} && pip install {' '.join(wanted)}"


def _installed(facts: Facts, name: str) -> bool:
    package = facts.extras.get(name)
    return package is not None and package.installed is not None


def has_gpu(facts: Facts) -> bool:
    """Whether there is an NVIDIA GPU to be used, working or not."""
    return facts.driver.has_device or facts.driver.cuda is not None or bool(facts.torch.devices)


def judge_cuda(facts: Facts) -> Iterator[Finding]:
    """Driver, torch and the libraries that onnxruntime's CUDA provider loads."""
    driver, torch, runtime = facts.driver, facts.torch, facts.runtime
    if not has_gpu(facts):
        build = f"built for CUDA {torch.cuda}" if torch.cuda else "a CPU build"
        known = "" if torch.version is None else f"; torch {torch.version} is {build}"
        yield Finding("cuda", Status.NOT_CHECKED, f"no NVIDIA GPU is seen here: models run on the CPU{known}")
        return
    if driver.cuda is None:
        fact = f"there is an NVIDIA GPU, but its driver does not answer: {driver.failure}"
        yield Finding(
            "cuda", Status.PROBLEM, fact, "nvidia-smi   # says more; then install NVIDIA's driver again, and reboot"
        )
        return
    spoken = ".".join(map(str, driver.cuda))
    yield Finding("cuda", Status.OK, f"NVIDIA driver {driver.version or 'of unknown version'}, up to CUDA {spoken}")
    yield from _judge_torch_build(facts)
    if runtime.failure is not None:
        return
    if runtime.cuda is None:
        fact = "there is a GPU, and onnxruntime was built for the CPU only"
        yield Finding("cuda", Status.WARNING, fact, _reinstall(facts))
        return
    needed = int(runtime.cuda.split(".")[0])
    if driver.cuda[0] < needed:
        fact = f"onnxruntime needs CUDA {needed}, and the driver speaks CUDA {spoken} at most"
        yield Finding("cuda", Status.PROBLEM, fact, f"install an NVIDIA driver that speaks CUDA {needed}")
    missing = [name for name, reason in facts.libraries.items() if reason is not None]
    if missing:
        fact = f"onnxruntime needs CUDA {needed} and cuDNN {CUDNN}; not found: {', '.join(missing)}"
        if torch.cuda and torch.cuda.split(".")[0] != str(needed):
            fact += f" (torch brings those of CUDA {torch.cuda})"
        yield Finding("cuda", Status.PROBLEM, fact, "pip install 'voidprune[cuda]'")
    else:
        yield Finding("cuda", Status.OK, f"the libraries of CUDA {needed} and cuDNN {CUDNN} can be loaded")


def _judge_torch_build(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch.failure is not None:
        return
    if torch.cuda is None:
        fact = f"there is a GPU, and torch {torch.version} was built for the CPU only"
        yield Finding("cuda", Status.WARNING, fact, "pip install --force-reinstall torch")
    elif not torch.devices:
        fact = f"torch {torch.version}, built for CUDA {torch.cuda}, sees no GPU"
        yield Finding("cuda", Status.PROBLEM, fact, "python -c 'import torch; torch.cuda.init()'   # says why")
    else:
        for device in torch.devices:
            free, total = device.free_bytes / 1e9, device.total_bytes / 1e9
            yield Finding(
                "cuda", Status.OK, f"torch {torch.version} sees {device.name}: {free:.1f} of {total:.1f} GB free"
            )


def judge_providers(facts: Facts) -> Iterator[Finding]:
    """What a session really ran on: onnxruntime lists what it was built with, and falls back to the CPU without an error."""
    if facts.runtime.failure is not None:
        yield Finding("providers", Status.NOT_CHECKED, "onnxruntime cannot be imported")
        return
    for provider, trial in facts.trials.items():
        reason = trial.failure or f"the session has {', '.join(trial.got)} instead"
        if trial.failure is None and trial.got[:1] == (provider,):
            yield Finding("providers", Status.OK, f"{provider} ran a graph")
        elif provider == CPU:
            yield Finding("providers", Status.PROBLEM, f"{provider} does not work: {reason}", _reinstall(facts))
        elif provider == CUDA and has_gpu(facts):
            fact = f"{provider} is listed and does not work: {reason}"
            yield Finding("providers", Status.PROBLEM, fact, "pip install 'voidprune[cuda]'")
        else:
            why = "there is no GPU" if provider == CUDA else "voidprune does not use it"
            yield Finding("providers", Status.OK, f"{provider} is listed and does not work; {why}")


def judge_extras(facts: Facts) -> Iterator[Finding]:
    """Packages that some commands need. Of onnxruntime-genai there are two, and one is enough."""
    absent: dict[tuple[str, str], None] = {}
    for name, package in facts.extras.items():
        extra = EXTRAS[name]
        install = f"pip install 'voidprune[{extra.extra}]'"
        if package.installed is None:
            if extra.extra != "genai" or not any(
                _installed(facts, other) for other in EXTRAS if EXTRAS[other].extra == "genai"
            ):
                absent[(install, extra.purpose)] = None
        elif not extra.requirement.admits(package.installed):
            fact = f"{name} {package.installed} is installed; {extra.purpose} needs {extra.requirement.specifier}"
            yield Finding("extras", Status.WARNING, fact, install)
        elif package.failure is not None:
            fact = f"{name} {package.installed} cannot be imported: {package.failure}"
            mend = f"pip install --force-reinstall --no-deps '{extra.requirement.specifier}'"
            if extra.extra == "optimum":
                mend = "python -m venv optimum && optimum/bin/pip install 'voidprune[optimum]'"
            yield Finding("extras", Status.WARNING, fact, mend)
        else:
            yield Finding("extras", Status.OK, f"{name} {package.installed}, for {extra.purpose}")
    for install, purpose in absent:
        yield Finding("extras", Status.NOT_CHECKED, f"not installed, for {purpose}", install)
