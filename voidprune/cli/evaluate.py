"""`voidprune eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

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
@gate_options
@provider_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@overwrite_option
@json_option
@quiet_option
def evaluate(
    model: str,
    tasks: str,
    schedule_file: Path | None,
    baseline: str | None,
    num_samples: int | None,
    max_new_tokens: int,
    batch_size: int,
    min_scores: tuple[tuple[str | None, float], ...],
    max_ppl_ratio: float | None,
    provider: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quality, with intervals: whole model, reference under a schedule, ONNX bundle, item by item.

    Perplexity of given responses and agreement with the whole model, multiple choice, exact match of generated answers.

    \b
      voidprune eval slim --baseline MODEL --tasks items.jsonl --min-score 0.9 --max-ppl-ratio 1.05
    """
    from voidprune import artifacts
    from voidprune.pipeline.evaluation import evaluate_model
    from voidprune.pipeline.tasks import dataset_name, find_rows
    from voidprune.schedule import read_schedule
    from voidprune.tables import evaluation_table

    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    rows = find_rows(tasks, num_items=num_samples)
    gates = gates_of(min_scores, max_ppl_ratio)
    gates.check_rows(rows, has_whole=baseline is not None or schedule_file is not None)
    found = evaluate_model(
        model,
        rows,
        dataset=dataset_name(tasks),
        schedule=None if schedule_file is None else read_schedule(schedule_file),
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        provider=provider,
        track=progress_bars(quiet),
    )
    outcome = found.to_document()
    write_result(output, outcome, overwrite=overwrite)
    show_result(outcome, evaluation_table, outcome, as_json=as_json)
    gates.check(found)


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
