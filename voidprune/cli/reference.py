"""docs/cli.md: the command line as a page, from the commands themselves. `make docs` writes it."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import click

from voidprune.errors import QualityGateError, VoidpruneError

_HEAD = f"""\
# Command line

Every command, what it is for, an example and its options: the text of `voidprune COMMAND --help`, from which `make docs` makes this
page.

MODEL is a folder, an id of the Hugging Face Hub, or `demo` for the small model that ships with the package. Results go to standard
output, for machines with `--json`; progress and errors go to standard error. Progress shows a rate and the time left; it is silent
with `-q`, and where standard error is not a terminal. Tables fit into 80 columns. Colours are left out where the output is not a
terminal, where `NO_COLOR` is set and where `TERM` is `dumb`; nothing is said by colour alone.

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| {VoidpruneError.exit_code} | an error whose cause is outside of the program: what is wrong, and what to do; or Ctrl-C |
| {click.UsageError.exit_code} | the command line itself is wrong |
| {QualityGateError.exit_code} | a quality gate was missed (`--min-score`, `--max-ppl-ratio`) |
| 143 | SIGTERM; half-built folders are removed |

A traceback is a bug of ours.
"""


@dataclass(frozen=True)
class CommandHelp:
    """The help text of one command: its paragraphs, a line each, and its examples, a command line each."""

    paragraphs: tuple[str, ...]
    examples: tuple[str, ...]


def read_help(command: click.Command) -> CommandHelp:
    """Examples are what stands behind a \\b, indented."""
    paragraphs, examples = [], []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        lines = block.splitlines()
        if lines[0].strip() == "\b":
            examples += [line.strip() for line in lines[1:]]
        else:
            paragraphs.append(" ".join(line.strip() for line in lines))
    return CommandHelp(tuple(paragraphs), tuple(examples))


def render_reference(group: click.Group) -> str:
    """The page, of a group whose commands have no commands of their own."""
    context = click.Context(group, info_name=group.name, **group.context_settings)
    commands = {name: group.commands[name] for name in group.list_commands(context)}
    contents = ["## Commands", "", "| command | what it does |", "|---|---|"]
    for name, command in commands.items():
        contents.append(f"| [{name}](#voidprune-{name}) | {_escape(read_help(command).paragraphs[0])} |")
    sections = (
        _render_command(command, click.Context(command, info_name=name, parent=context))
        for name, command in commands.items()
    )
    return "\n".join([_HEAD, *contents, "", *sections])


def _render_command(command: click.Command, context: click.Context) -> str:
    told = read_help(command)
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    lines = [f"## {context.command_path}", "", "```", usage, "```", ""]
    for paragraph in told.paragraphs:
        lines += [_escape(paragraph), ""]
    lines += ["```sh", *told.examples, "```", "", "| option | what it does |", "|---|---|"]
    for parameter in command.get_params(context):
        record = None if isinstance(parameter, click.Argument) else parameter.get_help_record(context)
        if record is not None:
            names, text = (part.replace("|", "\\|") for part in record)
            lines.append(f"| `{names}` | {_escape(' '.join(text.split()))} |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """What Markdown would read as more than text."""
    return re.sub(r"([*_<\[\]])", r"\\\1", text)


if __name__ == "__main__":
    from voidprune.cli import main

    click.echo(render_reference(main), nl=False)
