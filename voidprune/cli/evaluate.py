"""`voidprune eval`."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from voidprune.cli.adaptive import adaptive_command, adaptive_options
from voidprune.cli.completion import complete_model, complete_tasks
from voidprune.cli.options import (
    gate_options,
    gates_of,
    json_option,
    overwrite_option,
    provider_option,
    quiet_option,
)
from voidprune.cli.output import print_tables, progress_bars, show_result, write_result
from voidprune.demo.tasks import TASKS

if TYPE_CHECKING:
    from voidprune.models.checkpoint import Checkpoint
    from voidprune.pipeline.evaluation import EvaluationReport


@click.command(name="eval")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--tasks",
    shell_complete=complete_tasks,
    default="demo",
    show_default=True,
    help=f'"demo", {", ".join(TASKS)}, or a JSONL or text file.',
)
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Also run a whole model under a schedule."
)
@click.option("--baseline", shell_complete=complete_model, help="The whole model, to put beside a bundle.")
@click.option("--num-samples", type=click.IntRange(min=1), help="Items of a file (default all) or of each task (100).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@gate_options
@click.option("--harness", metavar="TASK[,TASK]", help="Tasks of lm-evaluation-harness, in place of --tasks.")
@click.option("--include-path", type=click.Path(path_type=Path), help="Harness: a folder with more tasks.")
@click.option("--limit", type=click.IntRange(min=1), help="Harness: the first items of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Harness: worked examples before each item.")
@click.option("--apply-chat-template", is_flag=True, help="Harness: contexts as messages of a user.")
@provider_option
@adaptive_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    model: str,
    tasks: str,
    schedule_file: Path | None,
    baseline: str | None,
    num_samples: int | None,
    max_new_tokens: int,
    batch_size: int,
    min_scores: tuple[tuple[str | None, float], ...],
    max_ppl_ratio: float | None,
    harness: str | None,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    provider: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **adaptive: Any,
) -> None:
    """Quality, with intervals: whole model, reference under a schedule, ONNX bundle, item by item.

    Perplexity of given responses and agreement with the whole model, multiple choice, exact match of generated answers; or tasks of
    lm-evaluation-harness.

    \b
      voidprune eval slim --baseline MODEL --tasks items.jsonl --min-score 0.9 --max-ppl-ratio 1.05
      voidprune eval slim --baseline MODEL --harness boolq,arc_easy --limit 200
      voidprune eval MODEL --adaptive readout --adaptive mask --alpha 0.8 --tasks items.jsonl
    """
    from voidprune import artifacts
    from voidprune.pipeline.tasks import dataset_name, find_rows
    from voidprune.schedule import read_schedule

    others = ("schedule_file", "baseline", "provider", "min_scores", "max_ppl_ratio", "harness")
    given = [name for name in others if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if adaptive_command(
        model,
        lambda: find_rows(tasks, num_items=num_samples),
        dataset=dataset_name(tasks),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        output=output,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
        refused=[
            "--" + {"schedule_file": "schedule", "min_scores": "min-score"}.get(name, name.replace("_", "-"))
            for name in given
        ],
        **adaptive,
    ):
        return
    _refuse_strangers(context, harness is not None)
    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    gates = gates_of(min_scores, max_ppl_ratio)
    schedule = None if schedule_file is None else read_schedule(schedule_file)
    if harness is not None:
        from voidprune.pipeline.harness import run_harness
        from voidprune.tables import harness_table

        with contextlib.ExitStack() as stack:
            if quiet or not sys.stderr.isatty():  # lm_eval draws bars of its own, whatever is asked of it
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            found = run_harness(
                model,
                harness.split(","),
                schedule=schedule,
                baseline=baseline,
                include_path=include_path,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                provider=provider,
                track=progress_bars(quiet),
            )
        outcome = found.to_document()
        write_result(output, outcome, overwrite=overwrite)
        show_result(outcome, harness_table, outcome, as_json=as_json)
        gates.check_scores(found.scores, what=f"{found.model} ({found.judged})")
        return
    from voidprune.pipeline.evaluation import evaluate_model
    from voidprune.tables import evaluation_table

    rows = find_rows(tasks, num_items=num_samples)
    gates.check_rows(rows, has_whole=baseline is not None or schedule is not None)
    report = evaluate_model(
        model,
        rows,
        dataset=dataset_name(tasks),
        schedule=schedule,
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        provider=provider,
        track=progress_bars(quiet),
    )
    outcome = report.to_document()
    write_result(output, outcome, overwrite=overwrite)
    show_result(outcome, evaluation_table, outcome, as_json=as_json)
    gates.check(report)


def _refuse_strangers(context: click.Context, with_harness: bool) -> None:
    """Options that would say nothing are usage errors."""
    ours = ("tasks", "num_samples", "max_ppl_ratio")
    theirs = ("include_path", "limit", "num_fewshot", "apply_chat_template")
    for name in ours if with_harness else theirs:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} {'does not go' if with_harness else 'goes'} with --harness")


def gate_export(
    checkpoint: Checkpoint,
    min_scores: Sequence[tuple[str | None, float]],
    max_ppl_ratio: float | None,
    tasks: str,
    *,
    provider: str | None,
    as_json: bool,
    quiet: bool,
) -> Callable[[Path], None] | None:
    """For `export`: what asks the staged folder for the quality that the options of `gate_options` want; None where they want none.

    What was measured is printed, for people on stdout, before the gates are judged.
    """
    gates = gates_of(min_scores, max_ppl_ratio)
    if not gates:
        return None
    from voidprune.pipeline.gates import gate_bundle
    from voidprune.pipeline.tasks import dataset_name, find_rows
    from voidprune.tables import evaluation_table

    def show(found: EvaluationReport) -> None:
        if not as_json:
            print_tables(evaluation_table(found.to_document()))

    return gate_bundle(
        gates,
        find_rows(tasks),
        dataset=dataset_name(tasks),
        source=checkpoint,
        on_report=show,
        provider=provider,
        track=progress_bars(quiet),
    )
