"""The options of `voidprune eval --adaptive`, and what they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from voidprune.cli.output import print_tables, progress_bars, write_result

if TYPE_CHECKING:
    from voidprune.profiling.calibration import Row

Command = TypeVar("Command", bound=Callable[..., Any])


def adaptive_options(command: Command) -> Command:
    options = [
        click.option(
            "--adaptive",
            "modes",
            type=click.Choice(["readout", "mask"]),
            multiple=True,
            help="Run LAC token by token: as published, or skipping truly. May be given twice.",
        ),
        click.option(
            "--alpha",
            "alphas",
            type=click.FloatRange(min=0),
            multiple=True,
            help="With --adaptive: LAC's threshold factor; may be given several times. Default 0.8.",
        ),
        click.option(
            "--lac-arithmetic",
            type=click.Choice(["float32", "model"]),
            help='With --adaptive: norms in float32 (default), or in the dtype of the model ("as published").',
        ),
        click.option(
            "--static", is_flag=True, help="With --adaptive: also the schedule of the same mean use of layers."
        ),
        click.option("--temperature", type=float, help="With --adaptive: sample; the paper used 0.6."),
        click.option("--top-p", type=float, help="With --temperature: the paper used 0.9."),
        click.option("--seed", type=int, help="With --adaptive: seed of samples and of random layers. Default 0."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def adaptive_command(
    model: str,
    rows: Callable[[], Sequence[Row]],
    *,
    dataset: str,
    max_new_tokens: int,
    batch_size: int,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    refused: Sequence[str],
    modes: Sequence[str],
    alphas: Sequence[float],
    lac_arithmetic: str | None,
    static: bool,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> bool:
    """Do `eval --adaptive` where it was asked for; False where it was not. `refused`: options given that do not go with it."""
    given = {
        "--alpha": alphas,
        "--lac-arithmetic": lac_arithmetic,
        "--static": static,
        "--temperature": temperature is not None,
        "--top-p": top_p is not None,
        "--seed": seed is not None,
    }
    if not modes:
        if wrong := [option for option, value in given.items() if value]:
            raise click.UsageError(f"{wrong[0]} goes with --adaptive readout or --adaptive mask")
        return False
    if refused:
        raise click.UsageError(f"{refused[0]} does not go with --adaptive")
    if top_p is not None and temperature is None:
        raise click.UsageError("--top-p goes with --temperature")
    if static and temperature is not None:
        raise click.UsageError("--static answers greedily; it does not go with --temperature")
    if not all(map(math.isfinite, alphas)):
        raise click.UsageError("--alpha is not a number")
    from voidprune import artifacts
    from voidprune.execution.sampling import Sampling
    from voidprune.pipeline.adaptive import AdaptiveSettings, Mode, evaluate_adaptively, open_subject
    from voidprune.tables import adaptive_tables

    sampling = None
    if temperature is not None:
        try:
            sampling = Sampling(temperature, 1.0 if top_p is None else top_p, seed or 0)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    document = evaluate_adaptively(
        open_subject(model),
        rows(),
        dataset=dataset,
        settings=AdaptiveSettings(
            modes=tuple(dict.fromkeys(map(Mode, modes))),
            alphas=tuple(dict.fromkeys(alphas)) or (0.8,),
            arithmetic=lac_arithmetic or "float32",
            static=static,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed or 0,
        ),
        track=progress_bars(quiet),
    )
    write_result(output, document, overwrite=overwrite)
    if as_json:
        click.echo(artifacts.canonical_bytes(document).decode(), nl=False)
    else:
        print_tables(*adaptive_tables(document))
    return True
