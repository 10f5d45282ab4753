"""`voidprune demo`."""

from __future__ import annotations

from pathlib import Path

import click

from voidprune.cli.options import overwrite_option, quiet_option, seed_option
from voidprune.cli.output import print_tables, progress_bars


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option(
    "--num-items", type=click.IntRange(min=4), default=100, show_default=True, help="Evaluation items of each task."
)
@seed_option
@overwrite_option
@quiet_option
def demo(output: Path, num_items: int, seed: int, overwrite: bool, quiet: bool) -> None:
    """The whole main job on the model that ships: profile, compare criteria, export, verify, evaluate, bench, report.

    \b
      voidprune demo -o out/demo --num-items 20
    """
    from voidprune import artifacts, walkthrough
    from voidprune.report import write_report
    from voidprune.report.record import write_record
    from voidprune.tables import (
        benchmark_table,
        comparison_table,
        evaluation_table,
        free_part_table,
        profile_table,
        schedule_table,
    )

    artifacts.check_output_folder(output, overwrite=overwrite, marker="comparison.json")
    outcome = walkthrough.run_demo(
        output, num_items=num_items, seed=seed, overwrite=overwrite, track=progress_bars(quiet)
    )
    write_record(output, ["demo", "--num-items", str(num_items), "--seed", str(seed), "-o", "DIR"])
    write_report(output, output / "report.html")
    print_tables(
        profile_table(outcome.profile),
        comparison_table(outcome.comparison),
        schedule_table(outcome.free.schedule),
        free_part_table(outcome.free),
        evaluation_table(outcome.evaluation),
        benchmark_table(outcome.benchmark),
    )
    click.echo(f"exported folder: {output / 'pruned'}\nreport: {output / 'report.html'}")
