"""`voidprune bench`."""

from __future__ import annotations

from pathlib import Path

import click

from voidprune.cli.options import json_option, overwrite_option, provider_option, quiet_option, seed_option
from voidprune.cli.output import progress_bars, show_result, write_result


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--baseline", required=True, help="The whole model, or its bundle, to measure against.")
@click.option("--prompt-length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timed rounds after one to warm up."
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as onnxruntime takes.")
@provider_option
@seed_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@overwrite_option
@json_option
@quiet_option
def bench(
    folder: Path,
    baseline: str,
    prompt_length: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
    provider: str | None,
    seed: int,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time to first token, time per output token, bytes and memory, beside the whole model in the same run.

    \b
      voidprune bench slim --baseline MODEL
    """
    from voidprune import artifacts
    from voidprune.pipeline.benchmark import benchmark_bundle
    from voidprune.tables import benchmark_table

    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    outcome = benchmark_bundle(
        folder,
        baseline=baseline,
        provider=provider,
        threads=threads,
        prompt_length=prompt_length,
        num_new_tokens=new_tokens,
        num_rounds=rounds,
        seed=seed,
        track=progress_bars(quiet),
    )
    write_result(output, outcome, overwrite=overwrite)
    show_result(outcome, benchmark_table, outcome, as_json=as_json)
