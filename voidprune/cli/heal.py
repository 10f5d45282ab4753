"""`voidprune heal`."""

from __future__ import annotations

from pathlib import Path

import click

from voidprune.cli.options import (
    device_option,
    dtype_option,
    json_option,
    max_new_tokens_option,
    output_option,
    overwrite_option,
    quiet_option,
    responses_option,
)
from voidprune.cli.output import progress_bars, show_result


@click.command()
@click.argument("model")
@output_option("Folder")
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), required=True, help="Made by plan.")
@click.option(
    "--method",
    "methods",
    type=click.Choice(["linear"]),
    multiple=True,
    help="Several: one after the other. Default: linear.",
)
@click.option(
    "--dataset", help='A JSONL or text file, "demo", or one of its tasks. Default: prompts that ship with it.'
)
@click.option("--num-samples", type=click.IntRange(min=2), help="Use the first N samples of a file, or of each task.")
@responses_option
@max_new_tokens_option
@click.option("--max-length", type=click.IntRange(min=2), help="Longest prompt and response. Default: the context.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@dtype_option
@device_option
@overwrite_option
@json_option
@quiet_option
def heal(
    model: str,
    output: Path,
    schedule_file: Path,
    methods: tuple[str, ...],
    dataset: str | None,
    num_samples: int | None,
    responses: str,
    max_new_tokens: int,
    max_length: int | None,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Give a pruned model back some of the quality that leaving out layers costs.

    linear: the projections of the layers that stay are fitted, in closed form, to what the whole model does; minutes, no training.

    \b
      voidprune heal MODEL --schedule schedule.json -o healed --dataset prompts.jsonl
      voidprune export healed -o slim
    """
    from voidprune import artifacts
    from voidprune.execution.manifest import FILE
    from voidprune.pipeline.heal import heal_model
    from voidprune.pipeline.models import open_model
    from voidprune.pipeline.samples import Answering
    from voidprune.pipeline.tasks import find_rows
    from voidprune.profiling.calibration import default_rows
    from voidprune.schedule import read_schedule
    from voidprune.tables import manifest_table

    artifacts.check_output_folder(output, overwrite=overwrite, marker=FILE)
    schedule = read_schedule(schedule_file)
    manifest = heal_model(
        open_model(model),
        schedule,
        output,
        default_rows()[:num_samples]
        if dataset is None
        else find_rows(dataset, num_items=num_samples, split="training"),
        methods=methods or ("linear",),
        answering=Answering(responses, max_new_tokens, max_length, batch_size),
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        track=progress_bars(quiet),
    )
    assert manifest.healing is not None
    if not manifest.healing.has_helped:
        click.echo("nothing that was tried is better on held-out samples: the weights are the source's", err=True)
    show_result(manifest.to_document(), manifest_table, manifest, as_json=as_json)
    if not as_json:
        click.echo(f"wrote {output}")
