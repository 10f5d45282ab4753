"""`voidprune export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from voidprune.cli.options import (
    budget_options,
    json_option,
    output_option,
    output_target,
    overwrite_option,
    provider_option,
    quiet_option,
    seed_option,
)
from voidprune.cli.output import print_tables, show_result
from voidprune.cli.plan import plan_export


@click.command()
@click.argument("model")
@output_option("Folder", required=False)
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="A schedule made by plan.")
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="A profile to plan from.")
@click.option("--format", "formats", type=click.Choice(["hf", "onnx"]), multiple=True, help="Default: both.")
@click.option("--precision", type=click.Choice(["keep", "fp32", "fp16", "bf16"]), default="keep", show_default=True)
@budget_options
@provider_option
@seed_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@json_option
@quiet_option
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
    from voidprune import artifacts
    from voidprune.execution.manifest import FILE
    from voidprune.models.checkpoint import PRECISIONS
    from voidprune.models.sizes import measure_sizes
    from voidprune.pipeline.export import export_model
    from voidprune.pipeline.models import open_model
    from voidprune.schedule import read_schedule
    from voidprune.tables import costs_table, manifest_table, schedule_table

    target = output_target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_folder(target, overwrite=overwrite, marker=FILE)
    if schedule_file is not None:
        for name in (*budget, "profile_file"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                option = "--" + name.removesuffix("_file").replace("_", "-")
                raise click.UsageError(f"--schedule says all about the layers; it does not go with {option}")
    checkpoint = open_model(model)
    if schedule_file is not None:
        planned = read_schedule(schedule_file)
        planned.check_model(checkpoint.identity, place=str(schedule_file))
    else:
        planned = plan_export(checkpoint, profile_file, seed=seed, quiet=quiet, **budget)
    if not as_json:
        print_tables(
            schedule_table(planned), costs_table(measure_sizes(checkpoint, dtype=PRECISIONS.get(precision)), planned)
        )
    if target is None:
        if as_json:
            click.echo(json.dumps(planned.to_document(), indent=2, sort_keys=True))
        return
    manifest = export_model(
        checkpoint,
        planned,
        target,
        formats=formats or ("hf", "onnx"),
        precision=precision,
        provider=provider,
        overwrite=overwrite,
        seed=seed,
    )
    show_result(manifest.to_document(), manifest_table, manifest, as_json=as_json)
    if not as_json:
        click.echo(f"wrote {target}")
