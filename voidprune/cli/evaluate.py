"""`voidprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from voidprune.cli.options import json_option, overwrite_option, provider_option, quiet_option
from voidprune.cli.output import progress_bars, show_result, write_result
from voidprune.demo.tasks import TASKS

if TYPE_CHECKING:
    pass


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
    from voidprune import artifacts
    from voidprune.pipeline.evaluation import evaluate_model
    from voidprune.pipeline.tasks import find_rows
    from voidprune.schedule import read_schedule
    from voidprune.tables import evaluation_table

    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    outcome = evaluate_model(
        model,
        find_rows(tasks, num_items=num_samples),
        dataset=tasks if tasks in ("demo", *TASKS) else Path(tasks).name,
        schedule=None if schedule_file is None else read_schedule(schedule_file),
        baseline=baseline,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        provider=provider,
        track=progress_bars(quiet),
    ).to_document()
    write_result(output, outcome, overwrite=overwrite)
    show_result(outcome, evaluation_table, outcome, as_json=as_json)
