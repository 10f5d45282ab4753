"""`voidprune report`."""

from __future__ import annotations

from pathlib import Path

import click

from voidprune.cli.options import output_option, overwrite_option
from voidprune.cli.output import tell


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@output_option("HTML page")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Also write each picture into this folder, as SVG and as PNG. PNG needs the extra [report].",
)
@overwrite_option
def report(folder: Path, output: Path, pictures: Path | None, overwrite: bool) -> None:
    """One HTML page of everything that was measured in a folder, and beside it the same as JSON.

    A file that cannot be read is left out, and so are further files of a kind, the first by name excepted; the page says so.

    \b
      voidprune report out/demo -o report.html --pictures report_pictures
    """
    from voidprune.report import write_report

    for file in write_report(folder, output, pictures=pictures, overwrite=overwrite, tell=tell):
        click.echo(f"wrote {file}")
