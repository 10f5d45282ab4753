"""The steps that a user asks for, put together from the rooms above: profile, export, evaluate, benchmark, demo.

Each takes values and returns values; writing artefacts is left to the caller where there is one. Progress is reported through a
`Track`, so that nothing here knows about terminals.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import ContextLengthError, ModelError, ScheduleError
from voidprune.execution.manifest import Manifest, Parity, is_bundle, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession, size_thread_pool
from voidprune.export.bundle import FORMATS, export_bundle
from voidprune.export.hf_checkpoint import PRECISIONS
from voidprune.models.checkpoint import Checkpoint, find_model, open_checkpoint
from voidprune.models.pretrained import (
    default_device,
    encode_chat,
    encode_text,
    end_tokens,
    load_model,
    load_tokenizer,
)
from voidprune.profiling.calibration import Row, encode_rows, require_responses
from voidprune.profiling.profile import LacSettings, Profile
from voidprune.profiling.tracing import generate_responses, trace_model
from voidprune.quality.bench import run_benchmark
from voidprune.quality.evaluation import Evaluation, Runner, evaluate, require_agreement
from voidprune.quality.parity import check_bundle
from voidprune.schedule import Schedule, full_schedule

Advance = Callable[[int], None]
Track = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""`with track(what, total, unit) as advance: advance(n)`; the total is None where it is not known beforehand."""


@contextmanager
def untracked(_what: str, _total: int | None, _unit: str) -> Iterator[Advance]:
    yield lambda _amount: None


def open_model(name: str, *, revision: str | None = None) -> Checkpoint:
    """A model by folder, Hub id, or "demo" for the one that ships with the package. Raises ModelError, CheckpointError."""
    if name == "demo" and not Path(name).exists():
        return open_checkpoint(demo_folder(), name="voidprune-demo")
    folder = find_model(name, revision=revision)
    return open_checkpoint(folder, name=folder.resolve().name if Path(name).is_dir() else name)


def default_provider() -> str:
    """ "cuda" where onnxruntime was built for it and torch sees a device, else "cpu"."""
    import onnxruntime as ort

    built = "CUDAExecutionProvider" in ort.get_available_providers()
    return "cuda" if built and default_device() == "cuda" else "cpu"


def demo_folder() -> Path:
    return Path(str(resources.files("voidprune.demo") / "model"))


def profile_model(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    responses: str = "generate",
    num_samples: int | None = None,
    max_new_tokens: int = 64,
    max_length: int | None = None,
    lac: LacSettings = LacSettings(),  # noqa: B008  a frozen value
    batch_size: int = 8,
    dtype: str = "fp32",
    device: str | None = None,
    track: Track = untracked,
) -> Profile:
    """Trace a model over a calibration set. Raises ModelError, DatasetError."""
    ends = end_tokens(checkpoint.folder)
    context = checkpoint.architecture.context_length
    reserved = max_new_tokens if responses == "generate" else 0
    longest = min(max_length or context, context) - reserved
    if longest < 2:
        raise ModelError(
            f"responses of {max_new_tokens} tokens leave no room for prompts in a context of {context}",
            hint="lower --max-new-tokens",
        )
    tokenizer = load_tokenizer(checkpoint.folder)
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=longest, num_samples=num_samples)
    if responses == "dataset":
        require_responses(samples)
    model = load_model(checkpoint.folder, dtype=dtype, device=device or default_device())
    if responses == "generate":
        with track("generating", len(samples), "samples") as advance:
            samples = generate_responses(
                model,
                samples,
                max_new_tokens=max_new_tokens,
                end_tokens=ends,
                batch_size=batch_size,
                on_progress=lambda num_samples, _num_tokens: advance(num_samples),
            )
    num_tokens = sum(len(sample.prompt) + len((sample.response or ())[1:]) for sample in samples)
    with track("tracing", num_tokens, "tokens") as advance:
        return trace_model(
            model,
            checkpoint,
            samples,
            responses=responses,
            max_new_tokens=max_new_tokens if responses == "generate" else 0,
            lac=lac,
            batch_size=batch_size,
            on_progress=lambda _num_samples, num_tokens: advance(num_tokens),
        )


def export_model(
    checkpoint: Checkpoint,
    schedule: Schedule,
    folder: Path,
    *,
    formats: Iterable[str] = FORMATS,
    precision: str = "keep",
    provider: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Manifest:
    """Export a bundle, verified against the source model before it is published. Raises every VoidpruneError of the way."""
    provider = provider or default_provider()
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    dtype = names[checkpoint.dtype] if precision == "keep" else precision

    def verify(stage: Path) -> Parity:
        source = load_model(checkpoint.folder, dtype=dtype, device="cuda" if provider == "cuda" else "cpu")
        return check_bundle(stage, source=source, schedule=schedule, provider=provider, seed=seed)

    return export_bundle(
        checkpoint,
        schedule,
        folder,
        verify=verify,
        formats=tuple(formats),
        precision=precision,
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class EvaluationReport:
    """Evaluations of several runners on the same items, by runner name; `different` counts responses that differ between the
    reference and the ONNX bundle, None where there is no bundle."""

    dataset: str
    evaluations: dict[str, Evaluation]
    different: int | None

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key("evaluation", 1),
            "dataset": self.dataset,
            "runners": [{"name": name, **result.to_document()} for name, result in self.evaluations.items()],
            "different_responses": self.different,
        }


def evaluate_model(
    name: str,
    rows: Sequence[Row],
    *,
    dataset: str,
    schedule: Schedule | None = None,
    baseline: str | None = None,
    num_samples: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    provider: str | None = None,
    track: Track = untracked,
) -> EvaluationReport:
    """Evaluate a bundle (reference and graphs, which must agree) or a model (whole, and under a schedule).

    For a bundle, `baseline` names the whole model to put beside it. Raises ParityError where a bundle disagrees with its reference.
    """
    folder = find_model(name) if name != "demo" else None
    bundled = folder is not None and is_bundle(folder)
    checkpoint = open_model(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    samples = encode_rows(
        rows,
        tokenizer,
        end_tokens=ends,
        max_length=checkpoint.architecture.context_length - max_new_tokens,
        num_samples=num_samples,
    )
    results: dict[str, Evaluation] = {}

    def run(label: str, runner: Runner) -> None:
        total = sum((sample.response is not None) + (sample.answer is not None) for sample in samples)
        with track(label, total, "items") as advance:
            results[label] = evaluate(
                runner,
                samples,
                decode_text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
                end_tokens=ends,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_progress=advance,
            )

    device = default_device()
    if bundled:
        manifest = read_manifest(checkpoint.folder)
        if baseline is not None:
            whole = open_model(baseline)
            manifest.schedule.check_model(whole.identity, place=str(checkpoint.folder))
            with scheduled(load_model(whole.folder, device=device), full_schedule(whole.identity)) as runner:
                run("whole model", runner)
        slim = manifest.schedule.on_slim_model(checkpoint.identity)
        with scheduled(load_model(checkpoint.folder, device=device), slim) as runner:
            run("reference", runner)
        if not manifest.graphs:
            return EvaluationReport(dataset, results, None)
        run("onnx", BundleSession(checkpoint.folder, provider=provider or default_provider()))
        return EvaluationReport(dataset, results, require_agreement(results["reference"], results["onnx"]))
    model: Any = load_model(checkpoint.folder, device=device)
    if schedule is not None:
        schedule.check_model(checkpoint.identity, place="the schedule")
    with scheduled(model, full_schedule(checkpoint.identity)) as runner:
        run("whole model", runner)
    if schedule is not None:
        with scheduled(model, schedule) as runner:
            run("reference", runner)
    return EvaluationReport(dataset, results, None)


def task_rows(tasks: str, *, num_items: int, split: str = "evaluation") -> list[Row]:
    """Rows of the demo's tasks: "demo" for all four, or one by its name."""
    from voidprune.demo.tasks import TASKS, make_items

    chosen = list(TASKS) if tasks == "demo" else [tasks]
    return [
        Row(
            place=f"{task}, item {number}",
            messages=({"role": "user", "content": item.prompt},),
            response=item.response,
            answer=item.answer,
            group=task,
        )
        for task in chosen
        for number, item in enumerate(make_items(task, split=split, num_items=num_items))
    ]


def generate_text(
    name: str,
    text: str,
    *,
    schedule: Schedule | None = None,
    raw: bool = False,
    max_new_tokens: int = 128,
    provider: str | None = None,
) -> Iterator[str]:
    """Answer a text greedily, piece by piece: a bundle in onnxruntime, a model in torch (whole, or under a schedule)."""
    checkpoint = open_model(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    prompt = encode_text(tokenizer, text) if raw else encode_chat(tokenizer, [{"role": "user", "content": text}])
    room = checkpoint.architecture.context_length - len(prompt)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; the model's context is {checkpoint.architecture.context_length}",
            hint="shorten the prompt",
        )
    max_new_tokens = min(max_new_tokens, room)
    if is_bundle(checkpoint.folder):
        if schedule is not None:
            raise ScheduleError(f"{name} is a bundle and has its schedule already", hint="give the whole model")
        session = BundleSession(checkpoint.folder, provider=provider or default_provider())
        tokens = session.stream(prompt, max_new_tokens=max_new_tokens, end_tokens=ends)
    else:
        schedule = schedule or full_schedule(checkpoint.identity)
        schedule.check_model(checkpoint.identity, place="the schedule")
        with scheduled(load_model(checkpoint.folder, device=default_device()), schedule) as runner:
            tokens = iter(runner.generate([prompt], max_new_tokens=max_new_tokens, end_tokens=ends)[0])
    told, so_far = "", list[int]()
    for token in tokens:
        so_far.append(token)
        whole = str(tokenizer.decode(so_far, skip_special_tokens=True))
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may need several tokens
            yield whole[len(told) :]
            told = whole


def benchmark_bundle(
    folder: Path,
    *,
    baseline: str,
    provider: str | None = None,
    threads: int | None = None,
    prompt_length: int = 128,
    num_new_tokens: int = 32,
    num_rounds: int = 15,
    seed: int = 0,
    track: Track = untracked,
) -> artifacts.Document:
    """Benchmark a bundle beside the whole model, exported for the occasion in the same precision where it is no bundle yet."""
    if threads is not None:
        size_thread_pool(threads)
    provider = provider or default_provider()
    manifest = read_manifest(folder)
    whole = open_model(baseline)
    with tempfile.TemporaryDirectory() as scratch:
        baseline_folder = whole.folder
        if not is_bundle(whole.folder):
            manifest.schedule.check_model(whole.identity, place=str(folder))
            baseline_folder = Path(scratch) / "baseline"
            precision = {dtype: name for name, dtype in PRECISIONS.items()}[manifest.dtype]
            schedule = full_schedule(whole.identity, boundary=manifest.schedule.boundary)
            export_model(whole, schedule, baseline_folder, precision=precision, provider=provider)
        with track("timing", num_rounds + 1, "rounds") as advance:
            benchmark = run_benchmark(
                {"whole model": baseline_folder, "pruned": folder},
                provider=provider,
                threads=threads,
                prompt_length=prompt_length,
                num_new_tokens=num_new_tokens,
                num_rounds=num_rounds,
                seed=seed,
                on_progress=advance,
            )
    return {"schema": artifacts.schema_key("benchmark", 1), **benchmark.to_document()}
