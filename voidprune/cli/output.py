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


def tell(sentence: str) -> None:
    """What people should know that is no result."""
    click.echo(sentence, err=True)


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
    if quiet or not sys.stderr.isatty():
        from voidprune.pipeline.progress import untracked

        return untracked

    @contextmanager
    def track(what: str, total: int | None, unit: str) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class Told(ProgressColumn):
            """One of the texts of `describe_progress`."""

            def __init__(self, place: int) -> None:
                self.place = place
                super().__init__(Column(no_wrap=True, justify="right"))

            def render(self, task: Task) -> Text:
                told = describe_progress(
                    unit,
                    done=task.completed,
                    total=task.total,
                    rate=task.finished_speed or task.speed,
                    elapsed=(task.finished_time if task.finished else task.elapsed) or 0.0,
                )
                return Text(told[self.place])

        columns = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            *(Told(place) for place in range(3)),
        ]
        console = Console(stderr=True)
        with Progress(*columns, console=console, expand=True, speed_estimate_period=_MEMORY) as progress:
            task = progress.add_task(what, total=total)
            yield lambda amount: progress.advance(task, amount)

    return track


_MEMORY = 300.0  # seconds over which a rate is averaged: single steps may take minutes


def describe_progress(
    unit: str,
    *,
    done: float,
    total: float | None,
    rate: float | None,
    elapsed: float,
) -> tuple[str, str, str]:
    """How far, how fast and how long still: of a step whose end is not known, or that is over, how long it has taken.

    `rate` is that of the last steps, where there were enough of them to say; `elapsed` are seconds.
    """
    from voidprune.tables.figures import format_bytes

    def amount(number: float) -> str:
        return format_bytes(number) if unit == "bytes" else f"{number:,.0f} {unit}"

    if not done:
        return "", "", "" if total is not None else _clock(elapsed)
    rate = rate or done / max(elapsed, 1e-9)
    far = amount(done) if total is None else f"{min(1.0, done / total):.0%}"
    slow = f"{rate:.2g} {unit}/s"
    fast = f"{format_bytes(rate)}/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s" if rate >= 10 else slow
    if total is None or done >= total:
        return far, fast, _clock(elapsed)
    return far, fast, f"{_clock((total - done) / rate)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
