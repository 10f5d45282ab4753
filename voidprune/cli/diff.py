"""`voidprune diff`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from voidprune.cli.options import json_option
from voidprune.cli.output import print_tables


@click.command()
@click.argument("first", metavar="A", type=click.Path(path_type=Path))
@click.argument("second", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--profile", "profile_file", type=click.Path(path_type=Path), help="Of the model: lends sizes, for costs."
)
@json_option
def diff(first: Path, second: Path, profile_file: Path | None, as_json: bool) -> None:
    """Compare two schedules, two exported folders, or two profiles of one model.

    Of schedules: the layers that differ in each phase, and both costs where they are known: of folders, or with --profile. Of
    profiles: settings, and every measure of every layer, with what stands out. The exit code is 0 whether they differ or not.

    \b
      voidprune diff schedule.json other.json --profile profile.json
    """
    from voidprune.profiling.profile import read_profile
    from voidprune.report.differences import compare_files
    from voidprune.tables import diff_tables

    document = compare_files(first, second, profile=None if profile_file is None else read_profile(profile_file))
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_tables(*diff_tables(document))
