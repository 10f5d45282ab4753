"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

Everything heavy is imported inside the command that needs it, so that `voidprune --help` answers at once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

import voidprune
from voidprune.demo.tasks import TASKS
from voidprune.errors import DatasetError, VoidpruneError
from voidprune.planning.criteria import CRITERIA

if TYPE_CHECKING:
    from voidprune.models.checkpoint import Checkpoint
    from voidprune.pipeline import Advance
    from voidprune.profiling.calibration import Row
    from voidprune.profiling.profile import Profile
    from voidprune.schedule import ModelIdentity, Schedule

Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Shows our own errors in two lines, without a traceback, and exits with their code. SIGTERM ends a command like Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except VoidpruneError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            ctx.exit(error.exit_code)
        finally:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # unwinds, so that half-built folders are removed


@click.group(
    name="voidprune", cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(voidprune.__version__, prog_name="voidprune")
def main() -> None:
    """Make language models smaller by leaving out decoder layers.

    One schedule for prefill, one for decode; a slim Hugging Face checkpoint and two ONNX graphs that read the same weights.

    \b
      voidprune profile MODEL -o profile.json
      voidprune plan profile.json -o schedule.json --keep-prefill 0.5 --keep-decode 1
      voidprune export MODEL -o DIR --schedule schedule.json

    MODEL is a folder, a Hub id, or "demo" for the small model that ships with the package.
    """


# ---- options that several commands share


def _output(what: str, *, required: bool = True) -> Callable[[Command], Command]:
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=required, help=f"{what} to write.")


_overwrite = click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
_provider = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default=None,
    help="onnxruntime provider. Default: cuda where it works.",
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")


def _budget_options(command: Command) -> Command:
    options = [
        click.option("--keep", type=float, help="Share of layers to run in each phase, in (0, 1]."),
        click.option("--keep-prefill", type=float, help="The same, for prefill only."),
        click.option("--keep-decode", type=float, help="The same, for decode only."),
        click.option(
            "--criterion",
            type=click.Choice(list(CRITERIA)),
            default="lac",
            show_default=True,
            help="How to rank layers.",
        ),
        click.option(
            "--phases",
            type=click.Choice(["split", "shared"]),
            default="split",
            show_default=True,
            help="One set of layers a phase, or one for both.",
        ),
        click.option(
            "--boundary",
            type=click.Choice(["decode", "prefill"]),
            default="decode",
            show_default=True,
            help="The phase of the last prompt token.",
        ),
        click.option("--single-turn", is_flag=True, help="Give up second turns, and the K/V that only they need."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _calibration_options(command: Command) -> Command:
    options = [
        click.option(
            "--dataset", type=click.Path(path_type=Path), help="JSONL or text. Default: prompts that ship with it."
        ),
        click.option("--num-samples", type=click.IntRange(min=1), help="Use the first N samples only."),
        click.option(
            "--responses",
            type=click.Choice(["generate", "dataset"]),
            default="generate",
            show_default=True,
            help="Let the model answer, or take the responses of the dataset.",
        ),
        click.option(
            "--alpha", type=click.FloatRange(min=0), default=0.8, show_default=True, help="LAC's threshold factor."
        ),
        click.option(
            "--lac-arithmetic",
            type=click.Choice(["float32", "model"]),
            default="float32",
            show_default=True,
            help='Norms and thresholds in float32, or in the dtype of the model ("as published").',
        ),
        click.option(
            "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest response."
        ),
        click.option(
            "--max-length", type=click.IntRange(min=2), help="Longest prompt and response. Default: the context."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True),
        click.option(
            "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default=None, help="Default: fp32, bf16 on CUDA."
        ),
        click.option("--device", help='Torch device. Default: "cuda" where there is one, else "cpu".'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


# ---- commands


@main.command()
@click.argument("model")
@_output("Profile")
@_calibration_options
@_overwrite
@_as_json
@_quiet
def profile(model: str, output: Path, overwrite: bool, as_json: bool, quiet: bool, **calibration: Any) -> None:
    """Measure how often each layer is active, in prefill and in decode.

    \b
      voidprune profile Qwen/Qwen2.5-0.5B-Instruct -o profile.json --dataset prompts.jsonl
    """
    from voidprune import artifacts, pipeline
    from voidprune.profiling.profile import write_profile
    from voidprune.tables import profile_table

    artifacts.check_output_file(output, overwrite=overwrite)
    measured = _profile(pipeline.open_model(model), quiet=quiet, **calibration)
    write_profile(output, measured, overwrite=overwrite)
    _show(measured.to_document(), profile_table, measured, as_json=as_json)


@main.command()
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@_output("Schedule", required=False)
@_budget_options
@_seed
@_overwrite
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@_as_json
def plan(profile_file: Path, output: Path | None, overwrite: bool, dry_run: bool, as_json: bool, **budget: Any) -> None:
    """Turn a profile and a budget into a schedule.

    \b
      voidprune plan profile.json -o schedule.json --keep 0.5 --criterion block-influence
    """
    from voidprune import artifacts
    from voidprune.profiling.profile import read_profile
    from voidprune.schedule import write_schedule

    target = _target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_file(target, overwrite=overwrite)
    measured = read_profile(profile_file)
    planned = _plan(measured.model, measured, **budget)
    _print_plan(measured, planned, as_json=as_json)
    if target is not None:
        write_schedule(target, planned, overwrite=overwrite)


@main.command()
@click.argument("model")
@_output("Folder", required=False)
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="A schedule made by plan.")
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="A profile to plan from.")
@click.option("--format", "formats", type=click.Choice(["hf", "onnx"]), multiple=True, help="Default: both.")
@click.option("--precision", type=click.Choice(["keep", "fp32", "fp16", "bf16"]), default="keep", show_default=True)
@_budget_options
@_provider
@_seed
@_overwrite
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@_as_json
@_quiet
@click.pass_context
def export(
    context: click.Context,
    /,
    model: str,
    output: Path | None,
    schedule_file: Path | None,
    profile_file: Path | None,
    formats: tuple[str, ...],
    precision: str,
    provider: str | None,
    seed: int,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **budget: Any,
) -> None:
    """Write a slim checkpoint and two ONNX graphs into one folder, verified before it appears.

    Without a schedule or a profile, the model is profiled on the prompts that ship with the package.

    \b
      voidprune export MODEL -o slim --keep 0.3
    """
    from voidprune import artifacts, pipeline
    from voidprune.execution.manifest import FILE
    from voidprune.models.checkpoint import PRECISIONS
    from voidprune.models.sizes import measure_sizes
    from voidprune.schedule import read_schedule
    from voidprune.tables import costs_table, manifest_table, schedule_table

    target = _target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_folder(target, overwrite=overwrite, marker=FILE)
    if schedule_file is not None:
        for name in (*budget, "profile_file"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                option = "--" + name.removesuffix("_file").replace("_", "-")
                raise click.UsageError(f"--schedule says all about the layers; it does not go with {option}")
    checkpoint = pipeline.open_model(model)
    if schedule_file is not None:
        planned = read_schedule(schedule_file)
        planned.check_model(checkpoint.identity, place=str(schedule_file))
    else:
        planned = _plan_export(checkpoint, profile_file, seed=seed, quiet=quiet, **budget)
    if not as_json:
        _print(
            schedule_table(planned), costs_table(measure_sizes(checkpoint, dtype=PRECISIONS.get(precision)), planned)
        )
    if target is None:
        if as_json:
            click.echo(json.dumps(planned.to_document(), indent=2, sort_keys=True))
        return
    manifest = pipeline.export_model(
        checkpoint,
        planned,
        target,
        formats=formats or ("hf", "onnx"),
        precision=precision,
        provider=provider,
        overwrite=overwrite,
        seed=seed,
    )
    _show(manifest.to_document(), manifest_table, manifest, as_json=as_json)
    if not as_json:
        click.echo(f"wrote {target}")


@main.command()
@click.argument("model")
@click.option("--prompt", required=True, help='Text of the user\'s turn; "-" reads standard input.')
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Run a whole model under a schedule, in torch."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--raw", is_flag=True, help="Continue the text: no chat template.")
@_provider
def generate(
    model: str, prompt: str, schedule_file: Path | None, max_new_tokens: int, raw: bool, provider: str | None
) -> None:
    """Answer a prompt, greedily. A bundle runs in onnxruntime, a model in torch.

    \b
      voidprune generate slim --prompt "Write a haiku about rain."
    """
    from voidprune import pipeline
    from voidprune.schedule import read_schedule

    text = sys.stdin.read() if prompt == "-" else prompt
    schedule = None if schedule_file is None else read_schedule(schedule_file)
    for piece in pipeline.generate_text(
        model, text, schedule=schedule, raw=raw, max_new_tokens=max_new_tokens, provider=provider
    ):
        click.echo(piece, nl=False)
    click.echo()


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_as_json
def show(path: Path, as_json: bool) -> None:
    """Show a profile, schedule, evaluation, benchmark or exported folder.

    \b
      voidprune show profile.json
    """
    from voidprune import report

    document, tables = report.describe(path)
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        _print(*tables)


@main.command()
def families() -> None:
    """List the model families that are supported."""
    from voidprune.models.families import FAMILIES

    for spec in FAMILIES.values():
        click.echo(f"{spec.model_type:10} {spec.title}")


@main.command(name="eval")
@click.argument("model")
@click.option(
    "--tasks", default="demo", show_default=True, help=f'"demo", {", ".join(TASKS)}, or a JSONL or text file.'
)
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Also run a whole model under a schedule."
)
@click.option("--baseline", help="The whole model, to put beside a bundle.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Items of a file (default all) or of each task (100).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@_provider
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@_overwrite
@_as_json
@_quiet
def evaluate(
    model: str,
    tasks: str,
    schedule_file: Path | None,
    baseline: str | None,
    num_samples: int | None,
    max_new_tokens: int,
    batch_size: int,
    provider: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Perplexity and task accuracy: whole model, reference under a schedule, ONNX bundle.

    \b
      voidprune eval slim --baseline MODEL --tasks items.jsonl
    """
    from voidprune import artifacts, pipeline
    from voidprune.schedule import read_schedule
    from voidprune.tables import evaluation_table

    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    outcome = pipeline.evaluate_model(
        model,
        _task_rows(tasks, num_samples),
        dataset=tasks if tasks in ("demo", *TASKS) else Path(tasks).name,
        schedule=None if schedule_file is None else read_schedule(schedule_file),
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        provider=provider,
        track=_track(quiet),
    ).to_document()
    _write_result(output, outcome, overwrite=overwrite)
    _show(outcome, evaluation_table, outcome, as_json=as_json)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--baseline", required=True, help="The whole model, or its bundle, to measure against.")
@click.option("--prompt-length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timed rounds after one to warm up."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as onnxruntime takes.")
@_provider
@_seed
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@_overwrite
@_as_json
@_quiet
def bench(
    folder: Path,
    baseline: str,
    prompt_length: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
    provider: str | None,
    seed: int,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time to first token, time per output token, bytes and memory, beside the whole model in the same run.

    \b
      voidprune bench slim --baseline MODEL
    """
    from voidprune import artifacts, pipeline
    from voidprune.tables import benchmark_table

    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    outcome = pipeline.benchmark_bundle(
        folder,
        baseline=baseline,
        provider=provider,
        threads=threads,
        prompt_length=prompt_length,
        num_new_tokens=new_tokens,
        num_rounds=rounds,
        seed=seed,
        track=_track(quiet),
    )
    _write_result(output, outcome, overwrite=overwrite)
    _show(outcome, benchmark_table, outcome, as_json=as_json)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_output("HTML page")
@_overwrite
def report(folder: Path, output: Path, overwrite: bool) -> None:
    """One HTML page of everything that was measured in a folder.

    \b
      voidprune report out/demo -o report.html
    """
    from voidprune import artifacts
    from voidprune.report import render_report

    artifacts.check_output_file(output, overwrite=overwrite)
    artifacts.write_file(output, render_report(folder).encode(), overwrite=overwrite)
    click.echo(f"wrote {output}")


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option(
    "--num-items", type=click.IntRange(min=4), default=100, show_default=True, help="Evaluation items of each task."
)
@_seed
@_overwrite
@_quiet
def demo(output: Path, num_items: int, seed: int, overwrite: bool, quiet: bool) -> None:
    """The whole main job on the model that ships: profile, compare criteria, export, verify, evaluate, bench, report."""
    from voidprune import artifacts, walkthrough
    from voidprune.report import render_report
    from voidprune.tables import benchmark_table, comparison_table, evaluation_table, profile_table, schedule_table

    artifacts.check_output_folder(output, overwrite=overwrite, marker="comparison.json")
    outcome = walkthrough.run_demo(output, num_items=num_items, seed=seed, overwrite=overwrite, track=_track(quiet))
    artifacts.write_file(output / "report.html", render_report(output).encode())
    _print(
        profile_table(outcome.profile),
        comparison_table(outcome.comparison["rows"]),
        schedule_table(outcome.schedule),
        evaluation_table(outcome.evaluation),
        benchmark_table(outcome.benchmark),
    )
    click.echo(f"exported folder: {output / 'pruned'}\nreport: {output / 'report.html'}")


# ---- what the commands share


def _profile(
    checkpoint: Checkpoint,
    *,
    dataset: Path | None,
    alpha: float,
    lac_arithmetic: str,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> Profile:
    from voidprune import pipeline
    from voidprune.profiling.calibration import default_rows, read_rows
    from voidprune.profiling.profile import LacSettings

    if not math.isfinite(alpha):
        raise click.UsageError("--alpha is not a number")
    return pipeline.profile_model(
        checkpoint,
        default_rows() if dataset is None else read_rows(dataset),
        lac=LacSettings(alpha=alpha, arithmetic=lac_arithmetic),
        dtype=dtype,
        device=device,
        track=_track(quiet),
        **settings,
    )


def _plan(
    model: ModelIdentity,
    measured: Profile | None,
    *,
    keep: float | None,
    keep_prefill: float | None,
    keep_decode: float | None,
    criterion: str,
    phases: str,
    boundary: str,
    single_turn: bool,
    seed: int,
) -> Schedule:
    from voidprune.planning.planner import plan_schedule
    from voidprune.schedule import Boundary, Phase

    ratios = {
        Phase.PREFILL: keep if keep_prefill is None else keep_prefill,
        Phase.DECODE: keep if keep_decode is None else keep_decode,
    }
    chosen = {phase: ratio for phase, ratio in ratios.items() if ratio is not None}
    if len(chosen) < len(ratios):
        raise click.UsageError("say how many layers to keep: --keep, or --keep-prefill and --keep-decode")
    return plan_schedule(
        model,
        measured,
        criterion=criterion,
        keep=chosen,
        shared=phases == "shared",
        boundary=Boundary(boundary),
        single_turn=single_turn,
        seed=seed,
    )


def _plan_export(checkpoint: Checkpoint, profile_file: Path | None, *, quiet: bool, **budget: Any) -> Schedule:
    """A schedule for an export that was given none: from the profile at hand, or from one made on the way."""
    from voidprune import pipeline
    from voidprune.planning.criteria import find_criterion
    from voidprune.planning.planner import num_kept
    from voidprune.profiling.calibration import default_rows
    from voidprune.profiling.profile import read_profile

    ratios = [budget[name] for name in ("keep", "keep_prefill", "keep_decode") if budget[name] is not None]
    for ratio in ratios:
        num_kept(ratio, checkpoint.architecture.num_layers)
    measured = None
    if profile_file is not None:
        measured = read_profile(profile_file)
    elif ratios and find_criterion(budget["criterion"]).needs_profile:
        context = checkpoint.architecture.context_length
        measured = pipeline.profile_model(
            checkpoint, default_rows(), max_new_tokens=min(64, context // 2), track=_track(quiet)
        )
    return _plan(checkpoint.identity, measured, **budget)


def _target(output: Path | None, *, dry_run: bool) -> Path | None:
    """Where to write; None for a dry run."""
    if dry_run:
        return None
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    return output


def _print_plan(measured: Profile, planned: Schedule, *, as_json: bool) -> None:
    from dataclasses import asdict

    from voidprune.planning.costs import baseline_costs, schedule_costs
    from voidprune.tables import costs_table, schedule_table

    if as_json:
        costs = asdict(schedule_costs(measured.sizes, planned))
        whole = asdict(baseline_costs(measured.sizes, planned))
        document = {"schedule": planned.to_document(), "costs": costs, "baseline": whole}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        _print(schedule_table(planned), costs_table(measured.sizes, planned))


def _task_rows(tasks: str, num_items: int | None) -> list[Row]:
    from voidprune import pipeline
    from voidprune.profiling.calibration import read_rows

    if tasks in ("demo", *TASKS):
        return pipeline.task_rows(tasks, num_items=num_items or 100)
    if not Path(tasks).exists():
        raise DatasetError(f"there is no task or file {tasks}", hint=f"give a file, demo, or one of {', '.join(TASKS)}")
    return read_rows(Path(tasks))[:num_items]


def _write_result(path: Path | None, document: Mapping[str, Any], *, overwrite: bool) -> None:
    from voidprune import artifacts

    if path is not None:
        artifacts.write_file(path, artifacts.canonical_bytes(document), overwrite=overwrite)


def _show(document: Mapping[str, Any], table: Callable[[Any], Any], value: Any, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        _print(table(value))


def _print(*tables: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100
    for table in tables:
        console.print(table)


def _track(quiet: bool) -> Callable[[str, int | None, str], Any]:
    """Progress bars on stderr with rate and time left; silent when stderr is not a terminal."""

    @contextmanager
    def track(what: str, total: int | None, unit: str) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.finished_speed or task.speed or 0:,.0f} {unit}/s")

        console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), Rate(), TimeRemainingColumn()]
        with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as progress:
            task = progress.add_task(what, total=total)
            yield lambda amount: progress.advance(task, amount)

    return track
