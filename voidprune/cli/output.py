"""Results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from voidprune.pipeline.progress import Advance


def write_result(path: Path | None, document: Mapping[str, Any], *, overwrite: bool) -> None:
    from voidprune import artifacts

    if path is not None:
        artifacts.write_file(path, artifacts.canonical_bytes(document), overwrite=overwrite)


def show_result(document: Mapping[str, Any], table: Callable[[Any], Any], value: Any, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_tables(table(value))


def print_tables(*tables: Any) -> None:
    from rich.console import Console

    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="replace")  # a sign that the terminal lacks is no reason to show nothing
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100
    for table in tables:
        console.print(table)


def progress_bars(quiet: bool) -> Callable[[str, int | None, str], Any]:
    """Progress bars on stderr with rate and time left; silent when stderr is not a terminal."""

    @contextmanager
    def track(what: str, total: int | None, unit: str) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.finished_speed or task.speed or 0:,.0f} {unit}/s")

        console = Console(stderr=True)
        columns = [TextColumn("{task.description}"), BarColumn(), Rate(), TimeRemainingColumn()]
        with Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty()) as progress:
            task = progress.add_task(what, total=total)
            yield lambda amount: progress.advance(task, amount)

    return track
