"""`voidprune bench`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from voidprune.cli.options import Counts, json_option, overwrite_option, provider_option, quiet_option, seed_option
from voidprune.cli.output import progress_bars, show_result, write_result


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--baseline", required=True, help="The whole model, or its bundle, to measure against.")
@click.option(
    "--prompt-lengths", type=Counts(least=2), default="128", show_default=True, help="TTFT of each, in tokens."
)
@click.option("--context-lengths", type=Counts(), default="128", show_default=True, help="TPOT behind each, in tokens.")
@click.option("--batch-sizes", type=Counts(), default="1", show_default=True, help="Both for as many rows at once.")
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Steps that a TPOT is the mean of."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timed rounds after one to warm up."
)
@click.option(
    "--max-spread",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Widest interval of a ratio, as a share of it; above it nothing is shown.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as onnxruntime takes.")
@provider_option
@seed_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it, into a file named *.svg or *.png.")
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def bench(
    context: click.Context,
    /,
    folder: Path,
    baseline: str,
    prompt_lengths: tuple[int, ...],
    context_lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    max_spread: float,
    threads: int | None,
    provider: str | None,
    seed: int,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time to first token, time per output token, bytes and memory, beside the whole model in the same run.

    Every time is also given as a multiple of its floor: what reading the bytes that it must read, or multiplying what it must
    multiply, takes on this machine at best.

    \b
      voidprune bench slim --baseline MODEL
      voidprune bench slim --baseline MODEL --prompt-lengths 32,128,512
    """
    from voidprune import artifacts
    from voidprune.pipeline.benchmark import benchmark_bundle
    from voidprune.tables import benchmark_table

    if rounds == 1 and context.get_parameter_source("max_spread") is not ParameterSource.DEFAULT:
        raise click.UsageError("--max-spread needs --rounds 2 or more: one round has no intervals")
    for file in (output, plot):
        if file is not None:
            artifacts.check_output_file(file, overwrite=overwrite)
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise click.UsageError(f"{plot} is neither *.svg nor *.png")
    outcome = benchmark_bundle(
        folder,
        baseline=baseline,
        provider=provider,
        threads=threads,
        prompt_lengths=prompt_lengths,
        context_lengths=context_lengths,
        batch_sizes=batch_sizes,
        num_new_tokens=new_tokens,
        num_rounds=rounds,
        max_spread=max_spread,
        seed=seed,
        track=progress_bars(quiet),
    )
    if plot is not None:
        from voidprune.plots import plot_benchmark

        artifacts.write_file(plot, plot_benchmark(outcome, format=plot.suffix[1:]), overwrite=overwrite)
    write_result(output, outcome, overwrite=overwrite)
    show_result(outcome, benchmark_table, outcome, as_json=as_json)
