"""Commands that only look: `show`, `families`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from voidprune.cli.options import json_option, quiet_option
from voidprune.cli.output import print_tables, progress_bars


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Of an exported folder: read every file and compare it with its hash.")
@json_option
@quiet_option
def show(path: Path, verify: bool, as_json: bool, quiet: bool) -> None:
    """Show a profile, schedule, probe, comparison, evaluation, benchmark or exported folder.

    A profile is drawn as a heat map, layers by measures and phases, above its figures; a schedule as a strip a phase.

    \b
      voidprune show profile.json
      voidprune show slim --verify
    """
    from voidprune.report.findings import describe

    if verify:
        from voidprune.execution.integrity import check_files
        from voidprune.execution.manifest import read_manifest

        manifest = read_manifest(path)
        with progress_bars(quiet)("reading", sum(manifest.sizes.values()), "bytes") as advance:
            check_files(path, manifest, verify_hashes=True, advance=advance)
        click.echo("all files are as they were exported", err=True)
    document, tables = describe(path)
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_tables(*tables)


@click.command()
def families() -> None:
    """List the model families, what is exported of each, and those that are refused.

    \b
      voidprune families
    """
    from voidprune.models.families import FAMILIES, REFUSED

    for spec in FAMILIES.values():
        click.echo(f"{spec.model_type:16} {' '.join(spec.formats):8} {spec.title}")
    for model_type, reason in REFUSED.items():
        click.echo(f"{model_type:16} {'refused':8} {reason}")
