"""The command line: parse, call one function, print. Results on stdout, progress and errors on stderr.

One module a command. Everything heavy is imported inside the command that needs it, so that `voidprune --help` answers at once.
"""

from __future__ import annotations

import errno
import signal
from typing import Any, NoReturn

import click

import voidprune
from voidprune.cli.bench import bench
from voidprune.cli.compare import compare
from voidprune.cli.completion import completion
from voidprune.cli.demo import demo
from voidprune.cli.diff import diff
from voidprune.cli.doctor import doctor
from voidprune.cli.evaluate import evaluate
from voidprune.cli.export import export
from voidprune.cli.generate import generate
from voidprune.cli.heal import heal
from voidprune.cli.plan import plan
from voidprune.cli.probe import probe
from voidprune.cli.profile import profile
from voidprune.cli.report import report
from voidprune.cli.run import run
from voidprune.cli.show import families, show
from voidprune.errors import ModelError, VoidpruneError


class _Group(click.Group):
    """Shows our own errors in two lines, without a traceback, and exits with their code. SIGTERM ends a command like Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except VoidpruneError as error:
            _end(ctx, error)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            # Of what a command reads; what it writes is checked before.
            _end(ctx, ModelError("a name is too long to be that of a file or model", hint="check the command line"))
        finally:
            signal.signal(signal.SIGTERM, before)


def _end(context: click.Context, error: VoidpruneError) -> NoReturn:
    click.echo(f"error: {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    context.exit(error.exit_code)


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # unwinds, so that half-built folders are removed


@click.group(
    name="voidprune", cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(voidprune.__version__, prog_name="voidprune")
def main() -> None:
    """Make language models smaller by leaving out decoder layers.

    One schedule for prefill, one for decode; a slim Hugging Face checkpoint and two ONNX graphs that read the same weights.

    \b
      voidprune profile MODEL -o profile.json
      voidprune plan profile.json -o schedule.json --keep-prefill 0.5 --keep-decode 1
      voidprune export MODEL -o DIR --schedule schedule.json

    MODEL is a folder, a Hub id, or "demo" for the small model that ships with the package.
    """


for command in (
    profile, probe, plan, compare, heal, export, generate, show, diff, families, evaluate, bench, run, report, demo, doctor,
    completion,
):  # fmt: skip
    main.add_command(command)
