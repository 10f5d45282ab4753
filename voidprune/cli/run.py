"""`voidprune run`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from voidprune.cli.completion import complete_model
from voidprune.cli.options import output_option, overwrite_option, quiet_option
from voidprune.cli.output import print_tables, progress_bars, tell

if TYPE_CHECKING:
    from voidprune.pipeline.steps import StepState
    from voidprune.recipe import CompressionRecipe, ExperimentRecipe

EXPERIMENT_OPTIONS = ("data", "limit", "alphas", "batch_size", "overwrite")
COMPRESSION_OPTIONS = ("rerun", "dry_run")


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@output_option("Folder")
@click.option("--model", shell_complete=complete_model, help="Instead of the recipe's model.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Instead of the recipe's.")
@click.option("--rerun", metavar="STEP", multiple=True, help="Do this step of a compression again, and what follows.")
@click.option("--dry-run", is_flag=True, help="Print the steps of a compression and which of them would run.")
@click.option(
    "--data",
    metavar="NAME=FILE",
    multiple=True,
    help="A local file for a data set of an experiment; the others are left out.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N items of each data set of an experiment.")
@click.option(
    "--alpha",
    "alphas",
    type=click.FloatRange(min=0),
    multiple=True,
    help="Instead of the experiment's; may be given several times.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Instead of the experiment's.")
@overwrite_option
@quiet_option
@click.pass_context
def run(
    context: click.Context,
    /,
    recipe_file: Path,
    output: Path,
    model: str | None,
    dtype: str | None,
    rerun: tuple[str, ...],
    dry_run: bool,
    data: tuple[str, ...],
    limit: int | None,
    alphas: tuple[float, ...],
    batch_size: int | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run a recipe: a compression from profile to report, or an experiment.

    Each step is done once. The same recipe into the same folder goes on where it was stopped; of a compression, what has changed
    since is done again.

    \b
      voidprune run recipes/compression/demo.yaml -o out/demo-healed
      voidprune run recipes/void-paper/qwen2.5-7b-instruct.yaml -o out/void-paper
    """
    if not all(map(math.isfinite, alphas)):
        raise click.UsageError("--alpha is not a number")
    from voidprune.recipe import CompressionRecipe, read_recipe

    recipe = read_recipe(recipe_file)
    is_compression = isinstance(recipe, CompressionRecipe)
    for name in EXPERIMENT_OPTIONS if is_compression else COMPRESSION_OPTIONS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--alpha" if name == "alphas" else "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} does not go with a recipe of this kind")
    recipe = replace(recipe, model=model or recipe.model)
    if isinstance(recipe, CompressionRecipe):
        recipe = replace(recipe, dtype=dtype or recipe.dtype)
        changes = [*(("--model", model) if model else ()), *(("--dtype", dtype) if dtype else ())]
        record = ["run", str(recipe_file), "-o", "DIR", *changes]
        _run_compression(
            recipe, output, record=record, text=recipe_file.read_text(), rerun=rerun, dry_run=dry_run, quiet=quiet
        )
        return
    recipe = replace(
        _with_files(recipe, data),
        dtype=dtype or recipe.dtype,
        limit=limit or recipe.limit,
        batch_size=batch_size or recipe.batch_size,
    )
    _run_experiment(recipe, output, alphas=alphas, overwrite=overwrite, quiet=quiet)


def _run_compression(
    recipe: CompressionRecipe,
    folder: Path,
    *,
    record: list[str],
    text: str,
    rerun: tuple[str, ...],
    dry_run: bool,
    quiet: bool,
) -> None:
    """`record` is the command that the report shows, `text` the recipe."""
    from voidprune.pipeline.compression import compression_steps
    from voidprune.pipeline.steps import preview_steps, run_steps
    from voidprune.report import write_report
    from voidprune.report.record import write_record

    def write(made: Path, page: Path) -> None:
        write_record(made, record, recipe=text)
        write_report(made, page, overwrite=True, tell=tell)

    steps = compression_steps(recipe, folder, write_report=write, track=progress_bars(quiet))
    if dry_run:
        for state in preview_steps(steps, folder, rerun=rerun):
            _tell(state, "run" if state.must_run else "keep")
        return
    for state in run_steps(steps, folder, rerun=rerun):
        _tell(state, "kept" if state.seconds is None else f"{state.seconds:.0f} s")


def _tell(state: StepState, what: str) -> None:
    click.echo(f"{state.name:<9} {what:<7} {state.output:<16} {state.reason}")


def _run_experiment(
    recipe: ExperimentRecipe, folder: Path, *, alphas: tuple[float, ...], overwrite: bool, quiet: bool
) -> None:
    from voidprune.pipeline.recipes import run_recipe
    from voidprune.recipe import AdaptiveRecipe
    from voidprune.tables import adaptive_tables, probe_tables

    if isinstance(recipe, AdaptiveRecipe):
        recipe, tables = replace(recipe, alphas=tuple(dict.fromkeys(alphas)) or recipe.alphas), adaptive_tables
    else:
        if alphas:
            raise click.UsageError("--alpha is LAC's, and this recipe is of another kind")
        tables = probe_tables
    for finished in run_recipe(recipe, folder, overwrite=overwrite, track=progress_bars(quiet)):
        print_tables(*tables(finished.document))
        click.echo(f"{'kept' if finished.was_there else 'wrote'} {finished.file}")


def _with_files(recipe: ExperimentRecipe, data: tuple[str, ...]) -> ExperimentRecipe:
    """With local files: the data sets that have one, in the order of the recipe; a task becomes a file of rows."""
    from voidprune.recipe import AdaptiveRecipe, DataSource

    if not data:
        return recipe
    files = {}
    for entry in data:
        name, sign, file = entry.partition("=")
        if not sign or not file or name not in recipe.datasets:
            raise click.UsageError(f"--data {entry}: give NAME=FILE with one of {', '.join(recipe.datasets)}")
        files[name] = Path(file).absolute()
    if not isinstance(recipe, AdaptiveRecipe):
        named = {
            name: replace(source, task=None, source=files[name])
            for name, source in recipe.datasets.items()
            if name in files
        }
        return replace(recipe, datasets=named)
    chosen = {name: DataSource(source.layout, files[name]) for name, source in recipe.datasets.items() if name in files}
    return replace(recipe, datasets=chosen)
