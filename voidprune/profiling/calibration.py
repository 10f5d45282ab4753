"""A dataset file becomes samples: token ids with a boundary between prompt and response.

Two kinds of file are read. JSONL: each line is an object of one of these shapes, other keys ignored:

    {"prompt": ..., "response": ..., "answer": ..., "task": ...}    only prompt is required
    {"messages": [{"role": "user", "content": ...}, ...]}           a closing assistant message is the response
    {"instruction": ..., "input": ..., "output": ...}               input and output may be absent
    {"text": ...}                                                   plain text, no chat template
    {"question": ..., "choices": [..., ...], "answer": ...}         multiple choice

`choices` go with a question, prompt, messages or instruction, which is asked as it stands: a prompt that should list the choices
lists them itself. Their `answer` is the right choice's text, its letter (A is the first) or its index (0 is the first).

Anything else is read as plain text, paragraph by paragraph. Text longer than the longest sample becomes
several. Prompts and messages go through the model's chat template where it
has one. Plain text is cut in the middle: the first half of its tokens is the prompt, the second half the response.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voidprune.errors import DatasetError
from voidprune.models.pretrained import Message, encode_chat, encode_choice, encode_response, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPES = "prompt, messages, instruction or text"


@dataclass(frozen=True)
class Row:
    """One sample before tokenization. Either `messages` or `text` is set; `place` says where it came from, for errors.

    Where there are `choices`, `answer` is the text of the right one.
    """

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    response: str | None = None
    answer: str | None = None
    group: str = "default"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt, and of a response where there is one. `answer` is what a right response ends with.

    A multiple choice item has the token ids of each choice as a continuation of the prompt, without an end token, and their texts;
    `answer` is the text of the right one.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...] | None
    answer: str | None
    group: str
    place: str
    choices: tuple[tuple[int, ...], ...] = ()
    choice_texts: tuple[str, ...] = ()


def read_rows(path: Path) -> list[Row]:
    """All samples of a file. Raises DatasetError naming the line."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or content.lstrip()[:1] in ("{", "["):
        lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
        rows = [_parse_line(line, group=path.stem, place=f"{path}, line {number}") for number, line in lines]
    else:
        paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", content)]
        rows = [
            Row(place=f"{path}, paragraph {number}", text=paragraph, group=path.stem)
            for number, paragraph in enumerate(paragraphs, start=1)
            if paragraph
        ]
    if not rows:
        raise DatasetError(f"{path} holds no samples", hint=f"give JSONL with {SHAPES}, or plain text")
    return rows


def default_rows() -> list[Row]:
    """The calibration prompts that ship with the package: varied instructions, without responses."""
    return _built_in_rows("prompts.jsonl", group="default", what="built-in prompts")


def capital_rows() -> list[Row]:
    """The capitals that ship with the package: "The capital of France is", to be answered with Paris."""
    return _built_in_rows("capitals.jsonl", group="capitals", what="capitals")


def _built_in_rows(file: str, *, group: str, what: str) -> list[Row]:
    content = resources.files("voidprune.profiling").joinpath(file).read_text(encoding="utf-8")
    return [
        _parse_line(line, group=group, place=f"{what}, line {number}")
        for number, line in enumerate(content.splitlines(), start=1)
    ]


def _parse_line(line: str, *, group: str, place: str) -> Row:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{place} is not a JSON object", hint=f"give an object with {SHAPES}")

    def text_of(key: str) -> str | None:
        value = document.get(key)
        if value is not None and not _is_text(value):
            raise DatasetError(f"{place}: {key} is not a text")
        return value

    choices = _parse_choices(document["choices"], place=place) if "choices" in document else ()
    answer = _right_choice(document.get("answer"), choices, place=place) if choices else text_of("answer")
    group = text_of("task") or group
    prompt = text_of("prompt")
    if prompt is None and choices:
        prompt = text_of("question")
    if "messages" in document:
        messages, response = _parse_messages(document["messages"], place=place)
    elif prompt is not None:
        messages, response = ({"role": "user", "content": prompt},), text_of("response")
    elif (instruction := text_of("instruction")) is not None:
        content = "\n\n".join(part for part in (instruction, text_of("input")) if part)
        messages, response = ({"role": "user", "content": content},), text_of("output")
    elif (text := text_of("text")) is not None:
        if choices:
            raise DatasetError(f"{place}: choices do not go with text", hint="ask with question, prompt or messages")
        if not text.strip():
            raise DatasetError(f"{place}: text is empty")
        return Row(place=place, text=text, group=group)
    else:
        raise DatasetError(f"{place} has no {SHAPES}", hint="rename the field that holds the prompt to prompt")
    if not any(message["content"].strip() for message in messages):
        raise DatasetError(f"{place}: the prompt is empty")
    return Row(
        place=place, messages=tuple(messages), response=response, answer=answer, group=group, choices=tuple(choices)
    )


def _parse_choices(value: Any, *, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise DatasetError(f"{place}: choices is not a list of two texts or more")
    for number, choice in enumerate(value, start=1):
        if not _is_text(choice) or not choice.strip():
            raise DatasetError(f"{place}: choice {number} is not a text, or empty")
        if choice in value[: number - 1]:
            raise DatasetError(f"{place}: choice {number} is there twice")
    return tuple(value)


def _right_choice(answer: Any, choices: Sequence[str], *, place: str) -> str:
    """The text of the choice that `answer` means: its text, else its letter (A is the first), or its index (0 is the first)."""
    hint = "give the right choice's text, its letter (A is the first) or its index (0 is the first)"
    if answer is None:
        raise DatasetError(f"{place} has choices but no answer", hint=hint)
    if isinstance(answer, str):
        texts = [choice.strip() for choice in choices]
        if texts.count(answer.strip()) == 1:
            return choices[texts.index(answer.strip())]
        letters = string.ascii_uppercase[: len(choices)]
        if len(answer.strip()) == 1 and answer.strip().upper() in letters:
            return choices[letters.index(answer.strip().upper())]
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    raise DatasetError(
        f"{place}: the answer {json.dumps(answer)[:60]} is none of the {len(choices)} choices", hint=hint
    )


def _is_text(value: Any) -> bool:
    """A string without lone surrogates, which JSON can write and tokenizers cannot read."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")


def _parse_messages(value: Any, *, place: str) -> tuple[Sequence[Message], str | None]:
    well_formed = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and _is_text(message.get("content"))
        for message in value
    )
    if not well_formed or not value:
        raise DatasetError(f"{place}: messages is not a list of objects with role and content")
    messages: list[Message] = [{"role": message["role"], "content": message["content"]} for message in value]
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise DatasetError(f"{place}: messages holds a response but no prompt")
    return messages[:-1], messages[-1]["content"]


def encode_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_tokens: Sequence[int],
    max_length: int,
    max_new_tokens: int = 0,
    num_samples: int | None = None,
) -> list[Sample]:
    """Tokenize the first `num_samples` rows.

    A sample has at most `max_length` tokens, and leaves `max_new_tokens` for an answer that is to be generated.
    Longer text becomes several samples. Raises DatasetError for any other row that does not fit, naming the line.
    """
    samples = []
    for row in list(rows)[:num_samples]:
        if row.text is not None:
            samples += _encode_text_row(row, tokenizer, max_length)
            continue
        try:
            prompt = encode_chat(tokenizer, row.messages)
        except DatasetError as error:
            raise DatasetError(f"{row.place}: {error.message}", hint=error.hint) from error
        response = [] if row.response is None else encode_response(tokenizer, row.response, end=end_tokens)
        choices = tuple(tuple(encode_choice(tokenizer, row.messages, choice)) for choice in row.choices)
        if not all(choices):
            raise DatasetError(f"{row.place}: a choice has no tokens")
        is_generated = row.answer is not None and not choices
        length = len(prompt) + max(len(response), max_new_tokens if is_generated else 0, *map(len, choices))
        if length > max_length:
            raise DatasetError(
                f"{row.place} needs {length} tokens with its response; the longest allowed is {max_length}",
                hint="shorten it, or ask for fewer new tokens",
            )
        samples.append(
            Sample(tuple(prompt), tuple(response) or None, row.answer, row.group, row.place, choices, row.choices)
        )
    return samples


def _encode_text_row(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sample]:
    """Plain text, in pieces of equal length of at most `max_length` tokens, each with the tokenizer's start token if it has one."""
    assert row.text is not None
    tokens = encode_text(tokenizer, row.text)
    if len(tokens) < 2:
        raise DatasetError(f"{row.place} is shorter than two tokens")
    start = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
    rest = tokens[len(start) :]
    num_pieces = math.ceil(len(rest) / (max_length - len(start)))
    samples = []
    for number in range(num_pieces):
        piece = start + rest[number * len(rest) // num_pieces : (number + 1) * len(rest) // num_pieces]
        middle = (len(piece) + 1) // 2
        samples.append(Sample(tuple(piece[:middle]), tuple(piece[middle:]) or None, row.answer, row.group, row.place))
    return samples


def require_responses(samples: Sequence[Sample]) -> None:
    """Raise DatasetError at the first sample without a response."""
    for sample in samples:
        if sample.response is None:
            raise DatasetError(
                f"{sample.place} has no response", hint="add one, or let the model answer: --responses generate"
            )


def fingerprint_samples(samples: Iterable[Sample]) -> str:
    """SHA-256 over the token ids of all samples, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.prompt, sample.response, *sample.choices]).encode())
    return "sha256:" + digest.hexdigest()
