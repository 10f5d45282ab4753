"""`voidprune compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from voidprune.cli.completion import complete_model
from voidprune.cli.options import json_option, overwrite_option, quiet_option, seed_option, trial_options
from voidprune.cli.output import progress_bars, show_result, write_result


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--keep", "keeps", default="0.9,0.7,0.5,0.3", show_default=True, help="Shares of layers, separated by commas."
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["bytes", "decode", "prefill"]),
    multiple=True,
    help="What is held equal: bytes, bytes read per output token, or arithmetic of the prompt. Default: all three.",
)
@click.option(
    "--search",
    "searches",
    type=click.Choice(["loss", "task"]),
    multiple=True,
    help="Searches to compare the rankings with. Default: loss.",
)
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="A profile of the model.")
@trial_options
@seed_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write quality against cost as SVG.")
@overwrite_option
@json_option
@quiet_option
def compare(
    model: str,
    keeps: str,
    scopes: tuple[str, ...],
    searches: tuple[str, ...],
    profile_file: Path | None,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    seed: int,
    search_evaluations: int | None,
    **options: Any,
) -> None:
    """Every way to choose layers, side by side on your model at equal cost.

    \b
      voidprune compare MODEL --dataset items.jsonl --keep 0.75,0.5 -o comparison.json --plot comparison.svg
    """
    from voidprune import artifacts
    from voidprune.pipeline.compare import CompareRequest, compare_model
    from voidprune.pipeline.comparison import SCOPES
    from voidprune.pipeline.models import open_model
    from voidprune.pipeline.plan import Calibrated
    from voidprune.profiling.profile import read_profile
    from voidprune.tables import comparison_table

    for target in (output, plot):
        if target is not None:
            artifacts.check_output_file(target, overwrite=overwrite)
    request = CompareRequest(
        keeps=_parse_keeps(keeps),
        scopes=scopes or tuple(SCOPES),
        searches=searches or ("loss",),
        search_evaluations=search_evaluations,
        seed=seed,
        calibrated=Calibrated(**options),
    )
    outcome = compare_model(
        request,
        open_model(model),
        profile=None if profile_file is None else read_profile(profile_file),
        output=output,
        overwrite=overwrite,
        track=progress_bars(quiet),
    )
    write_result(output, outcome, overwrite=overwrite)
    if plot is not None:
        from voidprune.plots import paint_svg, plot_comparison

        artifacts.write_file(plot, paint_svg(plot_comparison(outcome)).encode(), overwrite=overwrite)
    show_result(outcome, comparison_table, outcome, as_json=as_json)


def _parse_keeps(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of shares such as 0.75,0.5", param_hint="--keep") from error
