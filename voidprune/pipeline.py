"""The steps that a user asks for, put together from the rooms above: profile, export, evaluate, benchmark, demo.

Each takes values and returns values; writing artefacts is left to the caller where there is one. Progress is reported through a
`Track`, so that nothing here knows about terminals.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import voidprune
from voidprune import artifacts
from voidprune.errors import ContextLengthError, ModelError, ScheduleError
from voidprune.execution.manifest import Manifest, Parity, is_bundle, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession, size_thread_pool
from voidprune.export.bundle import FORMATS, export_bundle
from voidprune.models.checkpoint import Checkpoint, find_model, open_checkpoint, precision_name
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
from voidprune.quality.evaluation import Evaluation, Runner, count_differences, evaluate, require_agreement
from voidprune.quality.parity import check_bundle
from voidprune.schedule import Schedule, full_schedule

Advance = Callable[[int], None]
Track = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""`with track(what, total, unit) as advance: advance(n)`; the total is None where it is not known beforehand."""


@contextmanager
def untracked(_what: str, _total: int | None, _unit: str) -> Iterator[Advance]:
    yield lambda _amount: None


def open_model(name: str) -> Checkpoint:
    """A model by folder, Hub id, or "demo" for the one that ships with the package. Raises ModelError, CheckpointError."""
    if name == "demo" and not Path(name).exists():
        return open_checkpoint(demo_folder(), name="voidprune-demo")
    folder = find_model(name)
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
    dtype: str | None = None,
    device: str | None = None,
    track: Track = untracked,
) -> Profile:
    """Trace a model over a calibration set, by default on CUDA in bf16 where there is a device, else in fp32.

    Raises ModelError, DatasetError, RuntimeProviderError.
    """
    ends = end_tokens(checkpoint.folder)
    context = checkpoint.architecture.context_length
    reserved = max_new_tokens if responses == "generate" else 0
    longest = min(max_length or context, context) - reserved
    if longest < 2:
        raise ModelError(
            f"responses of {max_new_tokens} tokens leave no room for prompts in a context of {context}",
            hint="lower --max-new-tokens",
        )
    device = device or default_device()
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    tokenizer = load_tokenizer(checkpoint.folder)
    if responses == "generate":  # the responses of the dataset are not used, so they need not fit
        rows = [replace(row, response=None) for row in rows]
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=longest, num_samples=num_samples)
    if responses == "dataset":
        require_responses(samples)
    model = load_model(checkpoint.folder, dtype=dtype, device=device)
    if responses == "generate":
        with track("generating", None, "tokens") as advance:
            samples = generate_responses(
                model,
                samples,
                max_new_tokens=max_new_tokens,
                end_tokens=ends,
                batch_size=batch_size,
                on_progress=lambda _num_samples, num_tokens: advance(num_tokens),
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
    dtype = precision_name(checkpoint.dtype) if precision == "keep" else precision

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
    """Evaluations of several runners on the same items, by runner name.

    `different` counts the responses that the reference and the ONNX bundle give differently; None where there is no bundle.
    """

    model: str
    dataset: str
    max_new_tokens: int
    evaluations: dict[str, Evaluation]
    different: int | None = None

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key("evaluation", 1),
            "model": self.model,
            "dataset": self.dataset,
            "max_new_tokens": self.max_new_tokens,
            "runners": [{"name": name, **result.to_document()} for name, result in self.evaluations.items()],
            "different_responses": self.different,
            "written_by": f"voidprune {voidprune.__version__}",
        }


def evaluate_model(
    name: str,
    rows: Sequence[Row],
    *,
    dataset: str,
    schedule: Schedule | None = None,
    baseline: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    provider: str | None = None,
    track: Track = untracked,
) -> EvaluationReport:
    """Evaluate a bundle (reference and graphs, which must agree in float32) or a model (whole, and under a schedule).

    For a bundle, `baseline` names the whole model to put beside it. Raises ParityError where a float32 bundle disagrees with its
    reference, ScheduleError and ModelError where the options do not go with what `name` is.
    """
    checkpoint = open_model(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    samples = encode_rows(
        rows,
        tokenizer,
        end_tokens=ends,
        max_length=checkpoint.architecture.context_length,
        max_new_tokens=max_new_tokens,
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

    different = None
    if is_bundle(checkpoint.folder):
        if schedule is not None:
            raise ScheduleError(f"{name} is a bundle and has its schedule already", hint="give the whole model")
        different = _run_bundle(checkpoint, run, baseline=baseline, provider=provider, results=results)
    elif baseline is not None:
        raise ModelError(f"{name} is no bundle to put beside a baseline", hint="leave --baseline out, or give a bundle")
    else:
        schedules = {"whole model": full_schedule(checkpoint.identity)}
        if schedule is not None:
            schedule.check_model(checkpoint.identity, place="the schedule")
            schedules["reference"] = schedule
        model = load_model(checkpoint.folder, device=default_device())
        for label, actions in schedules.items():
            with scheduled(model, actions) as runner:
                run(label, runner)
    return EvaluationReport(checkpoint.name, dataset, max_new_tokens, results, different)


def _run_bundle(
    checkpoint: Checkpoint,
    run: Callable[[str, Runner], None],
    *,
    baseline: str | None,
    provider: str | None,
    results: dict[str, Evaluation],
) -> int | None:
    """Whole model, reference and graphs of a bundle; how many responses of the last two differ."""
    manifest, device = read_manifest(checkpoint.folder), default_device()
    dtype = precision_name(manifest.dtype)
    if baseline is not None:
        whole = open_model(baseline)
        manifest.schedule.check_model(whole.identity, place=str(checkpoint.folder))
        with scheduled(load_model(whole.folder, dtype=dtype, device=device), full_schedule(whole.identity)) as runner:
            run("whole model", runner)
    slim = manifest.schedule.on_slim_model(checkpoint.identity)
    with scheduled(load_model(checkpoint.folder, dtype=dtype, device=device), slim) as runner:
        run("reference", runner)
    if not manifest.graphs:
        return None
    run("onnx", BundleSession(checkpoint.folder, provider=provider or default_provider()))
    if manifest.dtype == "F32":
        require_agreement(results["reference"], results["onnx"])
    return count_differences(results["reference"], results["onnx"])


def _check_baseline(baseline: Manifest, pruned: Manifest, *, place: str) -> None:
    """Raise where a bundle is not the whole model of another, in the same precision."""
    baseline.schedule.check_model(pruned.schedule.model, place=place)
    if not baseline.schedule.is_full or (baseline.dtype, baseline.schedule.boundary) != (
        pruned.dtype,
        pruned.schedule.boundary,
    ):
        raise ModelError(
            f"{place} is not the whole model in {pruned.dtype} with the boundary {pruned.schedule.boundary}",
            hint="give the model itself as --baseline",
        )


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
        if is_bundle(whole.folder):
            _check_baseline(read_manifest(whole.folder), manifest, place=baseline)
        else:
            manifest.schedule.check_model(whole.identity, place=str(folder))
            baseline_folder = Path(scratch) / "baseline"
            schedule = full_schedule(whole.identity, boundary=manifest.schedule.boundary)
            precision = precision_name(manifest.dtype)
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
