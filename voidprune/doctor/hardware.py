"""What the facts about cores, memory, disks, the Hub and a model mean."""

from __future__ import annotations

from collections.abc import Iterator

from voidprune.doctor.facts import Facts, Model
from voidprune.doctor.judgements import Finding, Status

HEADROOM = 1.25
"""Memory that a model takes while it runs, per byte of its weights: as `quality/parity.py` counts."""


def judge_machine(facts: Facts) -> Iterator[Finding]:
    machine = facts.machine
    cores, limit = machine.usable_cores, machine.core_limit
    if limit is not None and limit < cores:
        threads = max(1, int(limit))
        fact = (
            f"{cores} cores are seen, but this container may use {limit:g}: too many threads would wait for each other"
        )
        yield Finding("machine", Status.WARNING, fact, f"taskset --cpu-list 0-{threads - 1} voidprune ...")
    elif machine.omp_threads is not None and machine.omp_threads != str(cores):
        fact = f"{cores} cores; torch uses {machine.omp_threads}, because OMP_NUM_THREADS says so"
        yield Finding("machine", Status.WARNING, fact, "unset OMP_NUM_THREADS")
    else:
        yield Finding("machine", Status.OK, f"{cores} cores")
    if machine.memory_bytes is None:
        yield Finding("machine", Status.NOT_CHECKED, "the system does not say how much memory there is")
    else:
        free = "" if machine.free_memory_bytes is None else f"{format_bytes(machine.free_memory_bytes)} free of "
        yield Finding("machine", Status.OK, f"{free}{format_bytes(machine.memory_bytes)} of memory")
    for folder, purpose, mend in (
        (facts.output, "output", "cd to a folder that you may write to, or give another -o"),
        (facts.temporary, "temporary files", "export TMPDIR=FOLDER   # one that you may write to"),
        (facts.cache, "models from the Hub", "export HF_HOME=FOLDER   # one that you may write to"),
    ):
        if folder is None:
            yield Finding("machine", Status.NOT_CHECKED, f"the folder for {purpose} is not known")
        elif not folder.writable:
            yield Finding("machine", Status.PROBLEM, f"nothing can be written to {folder.path}, for {purpose}", mend)
        else:
            free = "" if folder.free_bytes is None else f", {format_bytes(folder.free_bytes)} free"
            yield Finding("machine", Status.OK, f"{folder.path}, for {purpose}{free}")


def judge_hub(facts: Facts) -> Iterator[Finding]:
    hub = facts.hub
    if hub.endpoint is None:
        yield Finding("hub", Status.NOT_CHECKED, f"huggingface_hub does not work: {hub.failure}")
        return
    if hub.offline:
        yield Finding(
            "hub",
            Status.NOT_CHECKED,
            "HF_HUB_OFFLINE is set: only models of this machine are used",
            "unset HF_HUB_OFFLINE",
        )
    elif hub.status is None:
        fact = f"{hub.endpoint} does not answer: {hub.failure}"
        mend = f"curl -I {hub.endpoint}   # then set HTTPS_PROXY or HF_ENDPOINT, or HF_HUB_OFFLINE=1 to work without"
        yield Finding("hub", Status.WARNING, fact, mend)
    elif hub.status >= 400:
        yield Finding(
            "hub", Status.WARNING, f"{hub.endpoint} answers {hub.status}", "hf auth login   # or check HF_ENDPOINT"
        )
    else:
        yield Finding("hub", Status.OK, f"{hub.endpoint} answers")
    if hub.has_token:
        yield Finding("hub", Status.OK, "there is an access token")
    else:
        fact = "there is no access token: models behind a licence cannot be fetched"
        yield Finding("hub", Status.NOT_CHECKED, fact, "hf auth login")


def judge_model(facts: Facts) -> Iterator[Finding]:
    """Whether disk and memory are enough for what the commands do with a model."""
    model = facts.model
    if model is None:
        yield Finding("model", Status.NOT_CHECKED, "no model was given", "voidprune doctor MODEL")
        return
    if model.failure is not None:
        yield Finding("model", Status.PROBLEM, f"{model.name}: {model.failure}", model.hint)
        return
    fact = f"{model.name}: {model.model_type}, {model.num_layers} layers, {format_bytes(model.stored_bytes)} in {model.dtype}"
    yield Finding("model", Status.OK, fact)
    yield from _judge_disks(facts, model)
    if model.is_quantized:
        fact = "it is quantized: what it takes to run depends on its kernels"
        yield Finding("model", Status.NOT_CHECKED, fact)
        return
    yield from _judge_memory(facts, model)
    yield from _judge_devices(facts, model)


def _judge_disks(facts: Facts, model: Model) -> Iterator[Finding]:
    """All bytes: what a schedule writes that leaves no layer out of both phases. Built beside the old folder, on the same disk."""
    for folder, purpose, short, mend in (
        (facts.output, "export with all layers", Status.PROBLEM,
         "give -o a folder on a larger disk, or leave layers out of both phases"),
        (facts.temporary, "bench --baseline, which exports the whole model", Status.WARNING,
         "export TMPDIR=FOLDER   # one on a larger disk"),
        (facts.cache if model.is_remote else None, "fetching the whole model", Status.WARNING,
         "export HF_HOME=FOLDER   # one on a larger disk"),
    ):  # fmt: skip
        if folder is not None and folder.free_bytes is not None:
            fact = f"{purpose}: {format_bytes(model.stored_bytes)} on the disk of {folder.path}"
            yield _compare(fact, model.stored_bytes, folder.free_bytes, short=short, mend=mend)


def _judge_memory(facts: Facts, model: Model) -> Iterator[Finding]:
    free = facts.machine.free_memory_bytes
    if free is None:
        yield Finding("model", Status.NOT_CHECKED, "the system does not say how much memory is free")
        return
    whole, half, part = _run_bytes(model.fp32_bytes), _run_bytes(model.fp32_bytes) // 2, _run_bytes(model.part_bytes)
    elsewhere = any(half <= device.free_bytes for device in facts.torch.devices)
    if half > free:
        short = Status.WARNING if elsewhere else Status.PROBLEM
        mend = "profile, plan and evaluate on a machine with more memory"
        yield _compare(
            f"running it on the CPU, in bf16: {format_bytes(half)} of memory", half, free, short=short, mend=mend
        )
    else:
        mend = f"add --dtype bf16 to profile, plan, compare, probe and heal: {format_bytes(half)}"
        fact = f"running it on the CPU, in fp32: {format_bytes(whole)} of memory"
        yield _compare(fact, whole, free, short=Status.WARNING, mend=mend)
    needed, how = (whole, "") if whole <= free else (part, ", one layer at a time")
    fact = f"verifying an export{how}: {format_bytes(needed)} of memory"
    yield _compare(fact, needed, free, short=Status.PROBLEM, mend="export on a machine with more memory")
    # Two models in float32: the whole one and, at most as large, the one that learns from it.
    for method, copies in (("linear", 1), ("distill", 2)):
        fact = f"heal --method {method} on the CPU: at least {format_bytes(copies * whole)} of memory"
        mend = "heal on a machine with more memory"
        yield _compare(fact, copies * whole, free, short=Status.WARNING, mend=mend)


def _judge_devices(facts: Facts, model: Model) -> Iterator[Finding]:
    needed = _run_bytes(model.fp32_bytes) // 2
    for device in facts.torch.devices:
        mend = "add --device cpu to run the whole model; an export with fewer layers or bits may still fit"
        fact = f"running it on {device.name}, in bf16: {format_bytes(needed)}"
        yield _compare(fact, needed, device.free_bytes, short=Status.WARNING, mend=mend)


def _run_bytes(weight_bytes: int) -> int:
    return int(HEADROOM * weight_bytes)


def _compare(fact: str, needed: int, free: int, *, short: Status, mend: str) -> Finding:
    enough = needed <= free
    return Finding(
        "model", Status.OK if enough else short, f"{fact}, {format_bytes(free)} free", None if enough else mend
    )


def format_bytes(count: float) -> str:
    """As in all our tables; those are made with rich, which may be what is broken."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
