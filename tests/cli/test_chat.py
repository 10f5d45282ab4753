"""A chat at a terminal and on a pipe: interruptions, commands, limits."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import voidprune
from voidprune.cli import main
from voidprune.cli.chat import HELP, converse
from voidprune.errors import ContextLengthError
from voidprune.pipeline.chat import Chat
from voidprune.pipeline.generation import Style, open_speaker

FIRST, SECOND = "Sort from smallest to largest: 91, 97, 73", "Is 9 larger than 3?"

AT_TERMINAL = """
import fcntl, runpy, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # whose Ctrl-C is for this process
runpy.run_module("voidprune", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where the shell that started the tests had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def reader(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Lines as somebody types them; Ctrl-C and the end as the exceptions that they are."""
    typed: Iterator[str | type[BaseException]] = iter(lines)

    def read() -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


@pytest.fixture
def make_chat() -> Iterator[Callable[..., Chat]]:
    with open_speaker("demo") as speaker:
        yield lambda **options: Chat(speaker, Style(), **options)


def test_ctrl_c_stops_an_answer_and_not_the_chat(make_chat: Callable[..., Chat]) -> None:
    told: list[str] = []
    notes: list[str] = []
    pressed = []

    def show(text: str) -> None:
        told.append(text)
        if len(told) == 2 and not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    chat = make_chat()
    converse(chat, read=reader(FIRST, KeyboardInterrupt, SECOND), show=show, note=notes.append, interactive=True)
    assert pressed
    assert notes == [f"\n{HELP}"]
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] == "".join(told[:2])
    assert "".join(told) == "".join(f"{message['content']}\n" for message in chat.messages[1::2])


def test_interruptions_end_a_chat_on_a_pipe(make_chat: Callable[..., Chat]) -> None:
    with pytest.raises(KeyboardInterrupt):
        converse(make_chat(), read=reader(KeyboardInterrupt), show=print, note=print, interactive=False)

    def interrupted(_: str) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        converse(make_chat(), read=reader(FIRST), show=interrupted, note=print, interactive=False)


def test_limits_are_said(make_chat: Callable[..., Chat]) -> None:
    notes: list[str] = []
    first = make_chat()
    list(first.say(FIRST))
    room = first.num_processed + 4
    chat = make_chat(max_positions=room)
    lines = (FIRST, FIRST, "  ", "/clear", SECOND)
    converse(chat, read=reader(*lines), show=lambda _: None, note=notes.append, interactive=True)
    cut, refused, cleared, *_ = notes
    assert cut == f"the answer is cut: all {room} positions are full; /clear begins a new chat"
    assert refused.endswith(f"there is room for {room}: /clear begins a new chat")
    assert cleared == "a new chat"
    assert [message["content"] for message in chat.messages[::2]] == [SECOND]
    with pytest.raises(ContextLengthError):
        converse(make_chat(max_positions=12), read=reader(FIRST), show=print, note=print, interactive=False)


def test_a_pipe_gets_answers_and_nothing_else() -> None:
    arguments = ["generate", "demo", "--chat", "--provider", "cpu"]
    result = CliRunner().invoke(main, arguments, input=f"{FIRST}\n\n/clear\n{FIRST}\n", catch_exceptions=False)
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert first == second
    assert first.startswith("Answer:")
    assert result.stderr == "a new chat\n"


def test_a_terminal() -> None:
    """A real one: the prompt, an answer, Ctrl-C, and the end with Ctrl-D."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL, "generate", "demo", "--chat", "--provider", "cpu"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path(voidprune.__file__).parents[1])},
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str, *, times: int = 1, key: bytes = b"") -> None:
        """`key` is pressed, and again where nothing follows: readline overlooks a Ctrl-C in the instant before it listens.

        What is counted are waits, not seconds: a machine that was asleep loses one.
        """
        nonlocal seen
        os.write(ours, key)
        waits = 60
        while seen.count(text) < times:
            assert waits, f"{text!r} does not come after {seen!r}"
            if select.select([ours], [], [], 10)[0]:
                seen += os.read(ours, 4096).decode()
            else:
                waits -= 1
                os.write(ours, key)

    wait_for("> ")
    os.write(ours, FIRST.encode() + b"\n")
    wait_for("> ", times=2)
    assert "Answer:" in seen
    wait_for(HELP, times=2, key=b"\x03")
    wait_for("> ", times=3)
    os.write(ours, b"\x04")
    assert process.wait(timeout=600) == 0
    os.close(ours)
