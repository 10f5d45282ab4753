"""`voidprune generate`."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from voidprune.cli.chat import converse_on_terminal
from voidprune.cli.completion import complete_model
from voidprune.cli.options import provider_option, quiet_option, seed_option
from voidprune.cli.output import progress_bars

if TYPE_CHECKING:
    from voidprune.models.pretrained import Message
    from voidprune.pipeline.generation import Piece, Speaker, Style


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--prompt", "texts", multiple=True, help='Text of a user\'s turn; "-" reads standard input. Repeatable.')
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="Many of them: JSONL, or paragraphs of text.")
@click.option("--chat", is_flag=True, help="Take turns in the terminal, or line by line on a pipe.")
@click.option("--system", help="A system message before everything.")
@click.option("--raw", is_flag=True, help="Continue the text: no chat template.")
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Run a whole model under a schedule, in torch."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Default: 128 where the context has room for them; in a chat, all the room there is.",
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Sample. Default: greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), help="Sample from the likeliest share P.")
@seed_option
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts at a time.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens that a chat may have. Default: the model's context, at most 8192.",
)
@provider_option
@click.option(
    "--map-weights",
    is_flag=True,
    help="On a CPU, leave float32 weights in their file: starts at once, decodes more slowly, takes no memory of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a prompt, a line each.")
@quiet_option
def generate(
    model: str,
    texts: tuple[str, ...],
    file: Path | None,
    chat: bool,
    system: str | None,
    raw: bool,
    schedule_file: Path | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: tuple[str, ...],
    batch_size: int,
    context: int | None,
    provider: str | None,
    map_weights: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer prompts, or chat. A bundle runs in onnxruntime, a model in torch.

    Answers appear as they come; of several prompts, one after the other under a line with its number.

    \b
      voidprune generate slim --prompt "Write a haiku about rain."
      voidprune generate slim --chat --temperature 0.7 --top-p 0.9
      voidprune generate slim --prompts prompts.jsonl --json
    """
    if sum((bool(texts), file is not None, chat)) != 1:
        raise click.UsageError("give one of --prompt, --prompts and --chat")
    if chat and as_json:
        raise click.UsageError("--json does not go with --chat")
    if context is not None and not chat:
        raise click.UsageError("--context goes with --chat")

    from voidprune.execution.sampling import Sampling
    from voidprune.pipeline.chat import Chat
    from voidprune.pipeline.generation import Style, open_speaker, prompt_messages
    from voidprune.schedule import read_schedule

    sampling = None
    if (temperature, top_k, top_p) != (None, None, None):
        try:
            sampling = Sampling(temperature or 1.0, top_p or 1.0, seed, top_k)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if any(not text for text in stop):
        raise click.BadParameter("an empty text ends everything", param_hint="'--stop'")
    style = Style(max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
    schedule = None if schedule_file is None else read_schedule(schedule_file)
    turns = [] if chat else prompt_messages([_read(text) for text in texts], file=file, system=system)
    with open_speaker(model, schedule=schedule, provider=provider, prepack=not map_weights) as speaker:
        _report_device(speaker)
        if chat:
            converse_on_terminal(Chat(speaker, style, system=system, raw=raw, max_positions=context))
        else:
            _answer_all(speaker, turns, style, raw=raw, batch_size=batch_size, as_json=as_json, quiet=quiet)


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _report_device(speaker: Speaker) -> None:
    """On a GPU: what the weights take there, and whether every graph had to take its own."""
    session = speaker.session
    if session is None or session.provider == "cpu":
        return
    copies = "one copy" if session.weight_copies == 1 else f"{session.weight_copies} copies"
    taken = "" if session.device_bytes is None else f", {session.device_bytes:,} bytes of device memory"
    click.echo(f"{session.provider}: {copies} of the weights{taken}", err=True)


def _answer_all(
    speaker: Speaker,
    turns: Sequence[Sequence[Message]],
    style: Style,
    *,
    raw: bool,
    batch_size: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """A bar only where answers go elsewhere: on a terminal they are seen as they come."""
    from voidprune.pipeline.generation import encode_prompt, generate_texts

    track = progress_bars(quiet or len(turns) < 2 or sys.stdout.isatty())
    prompts = [encode_prompt(speaker.tokenizer, messages, raw=raw) for messages in turns]
    with track("answering", len(prompts), "prompts") as advance:
        for start in range(0, len(prompts), batch_size):
            pieces = generate_texts(speaker, prompts[start : start + batch_size], style)
            for row, answer in _in_order(pieces, len(prompts[start : start + batch_size])):
                number = start + row
                if as_json:
                    _print_document(turns[number][-1]["content"], list(answer))
                else:
                    if len(prompts) > 1:
                        click.echo(f"--- {number + 1}")
                    for piece in answer:
                        click.echo(piece.text, nl=False)
                    click.echo()
                advance(1)


def _print_document(prompt: str, answer: Sequence[Piece]) -> None:
    document = {
        "prompt": prompt,
        "response": "".join(piece.text for piece in answer),
        "ended_by": str(answer[-1].ending),
    }
    click.echo(json.dumps(document, ensure_ascii=False))


def _in_order(pieces: Iterable[Piece], num_rows: int) -> Iterator[tuple[int, Iterator[Piece]]]:
    """Pieces that come in turns, row after row: those of a later row wait until the rows before it are complete."""
    source = iter(pieces)
    waiting: list[deque[Piece]] = [deque() for _ in range(num_rows)]

    def answer(row: int) -> Iterator[Piece]:
        while True:
            while not waiting[row]:
                piece = next(source)
                waiting[piece.row].append(piece)
            yield waiting[row][0]
            if waiting[row].popleft().ending is not None:
                return

    for row in range(num_rows):
        yield row, answer(row)
