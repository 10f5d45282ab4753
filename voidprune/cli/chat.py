"""A chat in the terminal, or line by line on a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from voidprune.errors import ContextLengthError

if TYPE_CHECKING:
    from voidprune.pipeline.chat import Chat

HELP = "Ctrl-C stops an answer, Ctrl-D ends the chat, /clear begins a new one"


def converse(
    chat: Chat,
    *,
    read: Callable[[], str],
    show: Callable[[str], None],
    note: Callable[[str], None],
    interactive: bool,
) -> None:
    """Take turns until `read` raises EOFError. Where nobody sits at a terminal, interruptions and errors end the chat."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            note(f"\n{HELP}")
            continue
        if line == "/clear":
            chat.clear()
            note("a new chat")
        elif line:
            _answer(chat, line, show=show, note=note, interactive=interactive)


def _answer(
    chat: Chat, line: str, *, show: Callable[[str], None], note: Callable[[str], None], interactive: bool
) -> None:
    try:
        with contextlib.closing(chat.say(line)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                show(piece)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except ContextLengthError as error:
        if not interactive:
            raise
        note(f"{error.message}: {error.hint}")
        return
    show("\n")
    if chat.is_full:
        note(f"the answer is cut: all {chat.max_positions} positions are full; /clear begins a new chat")


def converse_on_terminal(chat: Chat) -> None:
    """The same on standard input and output, plain where they are no terminal."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() gets a history and keys that edit
        click.echo(HELP, err=True)

    def read() -> str:
        if interactive:
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def show(text: str) -> None:
        click.echo(text, nl=False)

    def note(text: str) -> None:
        click.echo(text, err=True)

    converse(chat, read=read, show=show, note=note, interactive=interactive)
    if interactive:
        click.echo()
