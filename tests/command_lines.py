"""Command lines as click reads them, without running what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from voidprune.cli import main


def parse_command(name: str, arguments: Sequence[str], **settings: Any) -> click.Context:
    """A command with its parent: without one it would be given another help option, and keep that for all who come later."""
    parent = click.Context(main, info_name="voidprune", **main.context_settings)
    return main.commands[name].make_context(name, list(arguments), parent=parent, **settings)
