"""`voidprune doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from voidprune.cli.options import json_option, quiet_option

STYLES = {"ok": "green", "not checked": "cyan", "warning": "yellow", "problem": "red"}


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("."),
    show_default="this folder",
    help="Where you will write to.",
)
@json_option
@quiet_option
@click.pass_context
def doctor(ctx: click.Context, model: str | None, output: Path, as_json: bool, quiet: bool) -> None:
    """Is this machine set up right, and is it large enough for MODEL?

    Every finding is ok, a warning, a problem or not checked, with the command that mends it. Exits with 1 where there is a
    problem, else with 0. Changes nothing; of a model on the Hub, only headers are fetched.

    \b
      voidprune doctor MODEL -o slim
    """
    from voidprune.doctor.collection import collect_facts
    from voidprune.doctor.diagnosis import diagnose
    from voidprune.doctor.judgements import Status

    # Not rich's bar, as everywhere else: rich may be what is broken.
    def count(total: int) -> Callable[[], None]:
        done = iter(range(1, total + 1))
        return lambda: click.echo(f"\rlooking: {next(done)} of {total}", nl=False, err=True)

    hidden = quiet or not sys.stderr.isatty()
    facts = collect_facts(model, output=output, **({} if hidden else {"started": count}))
    if not hidden:
        click.echo("\r\033[K", nl=False, err=True)
    diagnosis = diagnose(facts)
    if as_json:
        click.echo(json.dumps(diagnosis.to_document(), indent=2, sort_keys=True))
    else:
        for finding in diagnosis.findings:
            status = click.style(f"{finding.status:12}", fg=STYLES[finding.status])
            click.echo(f"{status}{finding.area:12} {finding.fact}")
            if finding.mend is not None:
                click.echo(f"{'':25}{finding.mend}")
    if diagnosis.status is Status.PROBLEM:
        ctx.exit(1)
