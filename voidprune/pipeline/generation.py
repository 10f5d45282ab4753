"""A model or a bundle answers texts, piece by piece: a bundle in onnxruntime, a model in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from voidprune.errors import ContextLengthError, ModelError, ScheduleError
from voidprune.execution.generation import Conversation, Ending, Responses
from voidprune.execution.manifest import read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.reference_conversation import ReferenceConversation
from voidprune.execution.sampling import Sampling
from voidprune.execution.session import BundleSession
from voidprune.models.pretrained import (
    Message,
    default_device,
    encode_chat,
    encode_text,
    end_tokens,
    load_model,
    load_tokenizer,
)
from voidprune.pipeline.export import own_schedule
from voidprune.pipeline.models import default_provider, open_model
from voidprune.pipeline.text_stream import TextStream
from voidprune.profiling.calibration import read_rows
from voidprune.schedule import Schedule, full_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 128


class _Start(Protocol):
    def __call__(self, num_rows: int = 1, *, max_positions: int) -> Conversation: ...


@dataclass(frozen=True)
class Speaker:
    """A loaded model with its tokenizer. `start` gives an empty conversation; `session` is None where torch runs the model."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    context_length: int
    schedule: Schedule
    start: _Start
    session: BundleSession | None = None


@dataclass(frozen=True)
class Style:
    """How to answer: greedily without `sampling`; until `stop`, an end token, or `max_new_tokens`.

    Without `max_new_tokens` that is what the context has room for, and DEFAULT_NEW_TOKENS at most.
    """

    max_new_tokens: int | None = None
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()


@contextmanager
def open_speaker(
    name: str, *, schedule: Schedule | None = None, provider: str | None = None, prepack: bool = True
) -> Iterator[Speaker]:
    """Load a bundle, or a model, whole or under a schedule, for the block. Raises every VoidpruneError of loading.

    `prepack`: of a bundle, see `BundleSession`.
    """
    checkpoint = open_model(name)
    own = own_schedule(checkpoint)
    if own is not None and schedule is not None:
        raise ScheduleError(f"{name} is a bundle and has its schedule already", hint="give the whole model")
    tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
    context = checkpoint.architecture.context_length
    if own is not None and read_manifest(checkpoint.folder).graphs:
        session = BundleSession(checkpoint.folder, provider=provider or default_provider(), prepack=prepack)
        yield Speaker(name, tokenizer, ends, context, session.manifest.schedule, session.start, session)
        return
    schedule = schedule or own or full_schedule(checkpoint.identity)
    schedule.check_model(checkpoint.identity, place="the schedule")
    with scheduled(load_model(checkpoint.folder, device=default_device()), schedule) as running:

        def start(num_rows: int = 1, *, max_positions: int) -> Conversation:
            return ReferenceConversation(running, num_rows, max_positions=max_positions)

        yield Speaker(name, tokenizer, ends, context, schedule, start)


def count_new_tokens(style: Style, prompts: Sequence[Sequence[int]], *, room: int) -> int:
    """How long responses may be in `room` positions. Raises ContextLengthError where a prompt or a response does not fit."""
    longest = max(map(len, prompts))
    if longest >= room:
        raise ContextLengthError(
            f"the prompt has {longest} tokens; there is room for {room}", hint="shorten the prompt"
        )
    if style.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room - longest)
    if longest + style.max_new_tokens > room:
        raise ContextLengthError(
            f"the prompt has {longest} tokens and the response may have {style.max_new_tokens}; there is room for {room}",
            hint=f"shorten the prompt, or ask for --max-new-tokens {room - longest}",
        )
    return style.max_new_tokens


def prompt_messages(texts: Sequence[str], *, file: Path | None, system: str | None) -> list[list[Message]]:
    """What is asked: a user's turn a text, then a prompt a row of a dataset file. Raises DatasetError."""
    asked: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    for row in [] if file is None else read_rows(file):
        asked.append(list(row.messages) if row.text is None else [{"role": "user", "content": row.text}])
    return asked if system is None else [[{"role": "system", "content": system}, *messages] for messages in asked]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, raw: bool) -> list[int]:
    """Token ids of messages, by the chat template; with `raw` as plain text, one after the other."""
    if raw:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    return encode_chat(tokenizer, messages)


@dataclass(frozen=True)
class Piece:
    """Some text of the response to prompt `row`; with its `ending` when it is the last."""

    row: int
    text: str
    ending: Ending | None = None


def generate_texts(speaker: Speaker, prompts: Sequence[Sequence[int]], style: Style) -> Iterator[Piece]:
    """Answer prompts together, in pieces as they come. Raises ContextLengthError before anything is run."""
    max_new_tokens = count_new_tokens(style, prompts, room=speaker.context_length)
    conversation = speaker.start(len(prompts), max_positions=max(map(len, prompts)) + max_new_tokens)
    return stream_texts(speaker, conversation, prompts, style, max_new_tokens=max_new_tokens)


def stream_texts(
    speaker: Speaker,
    conversation: Conversation,
    prompts: Sequence[Sequence[int]],
    style: Style,
    *,
    max_new_tokens: int,
) -> Iterator[Piece]:
    """The same, behind what a conversation holds already."""
    responses = Responses(
        conversation, prompts, max_new_tokens=max_new_tokens, end_tokens=speaker.ends, sampling=style.sampling
    )
    return _spell(responses, [TextStream(speaker.tokenizer, stop=style.stop) for _ in prompts])


def _spell(responses: Responses, streams: Sequence[TextStream]) -> Iterator[Piece]:
    lengths = [0] * len(streams)
    for row, token in responses:
        lengths[row] += 1
        text = streams[row].add(token)
        if streams[row].stopped:
            responses.stop(row)
        over = responses.endings[row] is not Ending.LENGTH or lengths[row] == responses.max_new_tokens
        if not over:
            if text:
                yield Piece(row, text)
            continue
        text += streams[row].finish()
        yield Piece(row, text, Ending.STOPPED if streams[row].stopped else responses.endings[row])


def check_single_turn(speaker: Speaker) -> None:
    """Raises ModelError where the model cannot chat."""
    if speaker.schedule.single_turn:
        raise ModelError(
            f"{speaker.name} has a single-turn schedule: its decode writes no K/V for layers that only prefill runs",
            hint="give one --prompt, or plan without --single-turn",
        )
