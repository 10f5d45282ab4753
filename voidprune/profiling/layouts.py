"""Public benchmarks of questions with options, by the layout of their records, as rows.

A layout says how a record of a data set reads; `question_rows` says how it is asked. Records come from a local file (JSONL or a
JSON list, one record as the Hub's data set has it) or from the Hub through the `datasets` library. Nothing here judges a model.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voidprune.errors import DatasetError
from voidprune.profiling.calibration import Row

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A question, its options in the order of the record, and the index of the right one. `place` is for errors."""

    place: str
    text: str
    options: tuple[str, ...]
    right: int
    passage: str | None = None


@dataclass(frozen=True)
class Layout:
    """How the records of a data set read. Lettered options may be shuffled; True and False may not."""

    name: str
    fields: str
    parse: Callable[[Record, str], Question]
    is_lettered: bool = True


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the Hugging Face Hub."""

    path: str
    split: str
    config: str | None = None


def _parse_mmlu(record: Record, place: str) -> Question:
    """A record of `cais/mmlu`; `subject` is not used."""
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise DatasetError(f"{place}: choices is not a list of two texts or more")
    options = tuple(_text(choice, f"choice {number}", place) for number, choice in enumerate(choices, start=1))
    if type(answer) is not int or not 0 <= answer < len(options):
        raise DatasetError(f"{place}: the answer is not the index of a choice")
    return Question(place, _text(record.get("question"), "question", place), options, answer)


_GPQA_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _parse_gpqa(record: Record, place: str) -> Question:
    """A record of `Idavidrein/gpqa`. The published code asks with the right answer last, always: so does this order."""
    names = (*_GPQA_WRONG, "Correct Answer")
    options = tuple(_text(record.get(name), name, place).strip() for name in names)
    return Question(place, _text(record.get("Question"), "Question", place).strip(), options, len(_GPQA_WRONG))


def _parse_boolq(record: Record, place: str) -> Question:
    """A record of `google/boolq`."""
    answer = record.get("answer")
    if not isinstance(answer, bool):
        raise DatasetError(f"{place}: the answer is not true or false")
    passage = _text(record.get("passage"), "passage", place)
    return Question(
        place, _text(record.get("question"), "question", place), ("True", "False"), int(not answer), passage
    )


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("mmlu", "question, choices (a list of texts), answer (an index)", _parse_mmlu),
        Layout("gpqa", f"Question, Correct Answer, {', '.join(_GPQA_WRONG)}", _parse_gpqa),
        Layout("boolq", "question, passage, answer (true or false)", _parse_boolq, is_lettered=False),
    )
}


def _squad_row(record: Record, place: str) -> Row:
    """A record of `rajpurkar/squad`; the first of its answers counts."""
    answers = record.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else None
    if not isinstance(texts, list) or not texts:
        raise DatasetError(f"{place}: answers has no list of texts")
    passage, question = (_text(record.get(name), name, place).strip() for name in ("context", "question"))
    asked = f"{passage}\n\nQuestion: {question}\nAnswer:"
    return Row(
        place, ({"role": "user", "content": asked},), answer=_text(texts[0], "answer", place).strip(), group="squad"
    )


def _summary_row(record: Record, place: str) -> Row:
    """A record of `abisee/cnn_dailymail`: the article is the prompt, its highlights are the response."""
    article, highlights = (_text(record.get(name), name, place).strip() for name in ("article", "highlights"))
    asked = f"{article}\n\nSummary:"
    return Row(place, ({"role": "user", "content": asked},), response=highlights, group="cnn_dailymail")


TEXT_LAYOUTS: dict[str, tuple[str, Callable[[Record, str], Row]]] = {
    "squad": ("context, question, answers (text: a list)", _squad_row),
    "cnn_dailymail": ("article, highlights", _summary_row),
}
"""Layouts whose answers are free text: the fields of a record, and the row of one."""


def find_text_rows(source: HubData | Path, layout: str, *, limit: int | None = None) -> list[Row]:
    """The first rows of a file or of a split on the Hub. Raises DatasetError."""
    fields, parse = TEXT_LAYOUTS[layout]
    placed = _read_placed(source, limit) if isinstance(source, Path) else _fetch_placed(source, limit)
    rows = []
    for where, record in placed[:limit]:
        if not isinstance(record, Mapping):
            raise DatasetError(f"{where} is not a JSON object", hint=f"a record of {layout} has {fields}")
        try:
            rows.append(parse(record, where))
        except DatasetError as error:
            raise DatasetError(error.message, hint=f"a record of {layout} has {fields}") from error
    if not rows:
        raise DatasetError("the data set holds no records", hint=f"a record of {layout} has {fields}")
    return rows


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip() or value != value.encode("utf-8", "ignore").decode("utf-8"):
        raise DatasetError(f"{place}: {name} is not a text, or empty")
    return value


def question_rows(
    questions: Sequence[Question], layout: Layout, *, group: str, scored: bool, shuffle_seed: int | None = None
) -> list[Row]:
    """Each question as a user's turn: passage, question, lettered options, how to answer.

    `scored`: the answer is asked for as a bare label, and the labels are the row's choices, to be compared by log-likelihood. Else
    it is asked for in square brackets, to be generated. The answer is the label of the right option either way. With a
    `shuffle_seed`, lettered options stand in a random order that depends on the seed and the question alone.
    """
    rows = []
    for question in questions:
        order = list(range(len(question.options)))
        if layout.is_lettered and shuffle_seed is not None:
            random.Random(f"{shuffle_seed} {question.text}").shuffle(order)
        labels = option_labels(layout, len(order))
        parts = [] if question.passage is None else [f"Passage:\n{question.passage}"]
        parts.append(f"Question:\n{question.text}")
        if layout.is_lettered:
            listed = (f"{label}. {question.options[index]}" for label, index in zip(labels, order, strict=True))
            parts.append("Options:\n" + "\n".join(listed))
        what = "the letter of the right option" if layout.is_lettered else "True or False, by what the passage says"
        parts.append(f"Output format:\n{f'only {what}' if scored else f'[{what}]'}")
        rows.append(
            Row(
                place=question.place,
                messages=({"role": "user", "content": "\n\n".join(parts)},),
                answer=labels[order.index(question.right)],
                group=group,
                choices=labels if scored else (),
            )
        )
    return rows


def option_labels(layout: Layout, num_options: int) -> tuple[str, ...]:
    return tuple(string.ascii_uppercase[:num_options]) if layout.is_lettered else ("True", "False")


def find_label(response: str, labels: Sequence[str]) -> str | None:
    """The label that a response gives: the first in square brackets, else the first that stands alone.

    A capital A before a word in small letters is an article, not an answer. Case is free where labels are words.
    """
    names = "|".join(map(re.escape, labels))
    is_word = len(labels[0]) > 1
    flags = re.IGNORECASE if is_word else 0
    alone = rf"(?<!\w)({names})(?!\w|')" + ("" if is_word else r"(?! [a-z])")
    for pattern in (rf"\[\s*({names})\b", alone):
        if found := re.search(pattern, response, flags):
            return next(label for label in labels if label.lower() == found[1].lower())
    return None


def read_questions(path: Path, layout: Layout, *, limit: int | None = None) -> list[Question]:
    """The first records of a file. Raises DatasetError naming the line or record."""
    return _parse_records(_read_placed(path, limit), layout, limit, place=str(path))


def _read_placed(path: Path, limit: int | None) -> list[tuple[str, Any]]:
    """The first records of a file, and where each is."""
    if path.suffix.lower() in (".parquet", ".csv", ".gz"):
        raise DatasetError(f"{path} is neither JSONL nor JSON", hint="write its records as JSON, one a line")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    if content.lstrip().startswith("["):
        records = _parse_json(content, str(path))
        return [(f"{path}, record {number}", record) for number, record in enumerate(records, 1)]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()][:limit]
    return [(f"{path}, line {number}", _parse_json(line, f"{path}, line {number}")) for number, line in lines]


def fetch_questions(data: HubData, layout: Layout, *, limit: int | None = None) -> list[Question]:
    """The first records of a split on the Hub, through the `datasets` library. Raises DatasetError."""
    return _parse_records(_fetch_placed(data, limit), layout, limit, place=data.path)


def _fetch_placed(data: HubData, limit: int | None) -> list[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"the data set {data.path} is read with the datasets library, which is not installed",
            hint="pip install 'voidprune[eval]', or give its records as a file: --data NAME=FILE",
        ) from error
    try:
        split: Any = datasets.load_dataset(data.path, data.config, split=data.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"cannot fetch the data set {data.path}: {reason}",
            hint="check the network, and whether the data set asks for a login (huggingface-cli login); "
            "or give its records as a file: --data NAME=FILE",
        ) from error
    chosen = split if limit is None else split.select(range(min(limit, len(split))))
    return [(f"{data.path} {data.split}, record {number}", record) for number, record in enumerate(chosen, start=1)]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{place} is not JSON: {error}", hint="give JSONL, a record a line, or a JSON list"
        ) from error


def _parse_records(
    placed: Sequence[tuple[str, Any]], layout: Layout, limit: int | None, *, place: str = "the file"
) -> list[Question]:
    questions = []
    for where, record in placed[:limit]:
        if not isinstance(record, Mapping):
            raise DatasetError(f"{where} is not a JSON object", hint=f"a record of {layout.name} has {layout.fields}")
        try:
            questions.append(layout.parse(record, where))
        except DatasetError as error:
            raise DatasetError(error.message, hint=f"a record of {layout.name} has {layout.fields}") from error
    if not questions:
        raise DatasetError(f"{place} holds no records", hint=f"a record of {layout.name} has {layout.fields}")
    return questions
