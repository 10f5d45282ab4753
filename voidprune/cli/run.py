"""`voidprune run`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from voidprune.cli.options import output_option, overwrite_option, quiet_option
from voidprune.cli.output import print_tables, progress_bars

if TYPE_CHECKING:
    from voidprune.recipe import Recipe


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@output_option("Folder")
@click.option("--model", help="Instead of the recipe's model.")
@click.option(
    "--data",
    metavar="NAME=FILE",
    multiple=True,
    help="A local file for a data set of the recipe; the others are left out.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N items of each data set only.")
@click.option(
    "--alpha",
    "alphas",
    type=click.FloatRange(min=0),
    multiple=True,
    help="Instead of the recipe's; may be given several times.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Instead of the recipe's.")
@overwrite_option
@quiet_option
def run(
    recipe_file: Path,
    output: Path,
    model: str | None,
    data: tuple[str, ...],
    limit: int | None,
    alphas: tuple[float, ...],
    batch_size: int | None,
    dtype: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run a recipe. The same recipe into the same folder goes on where it was stopped.

    \b
      voidprune run recipes/void-paper/qwen2.5-7b-instruct.yaml -o out/void-paper
    """
    if not all(map(math.isfinite, alphas)):
        raise click.UsageError("--alpha is not a number")
    from voidprune.pipeline.recipes import run_recipe
    from voidprune.recipe import AdaptiveRecipe, read_recipe
    from voidprune.tables import adaptive_tables, probe_tables

    recipe = _with_files(read_recipe(recipe_file), data)
    recipe = replace(
        recipe,
        model=model or recipe.model,
        dtype=dtype or recipe.dtype,
        limit=limit or recipe.limit,
        batch_size=batch_size or recipe.batch_size,
    )
    if isinstance(recipe, AdaptiveRecipe):
        recipe, tables = replace(recipe, alphas=tuple(dict.fromkeys(alphas)) or recipe.alphas), adaptive_tables
    else:
        if alphas:
            raise click.UsageError("--alpha is LAC's, and this recipe is of another kind")
        tables = probe_tables
    for finished in run_recipe(recipe, output, overwrite=overwrite, track=progress_bars(quiet)):
        print_tables(*tables(finished.document))
        click.echo(f"{'kept' if finished.was_there else 'wrote'} {finished.file}")


def _with_files(recipe: Recipe, data: tuple[str, ...]) -> Recipe:
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
