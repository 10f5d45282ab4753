"""Records of public benchmarks become questions, and questions become rows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from voidprune.errors import DatasetError
from voidprune.profiling.layouts import (
    LAYOUTS,
    HubData,
    fetch_questions,
    find_label,
    find_text_rows,
    option_labels,
    question_rows,
    read_questions,
)

MMLU = {"question": "What is 2 + 2?", "subject": "algebra", "choices": ["3", "4", "5", "6"], "answer": 1}
GPQA = {
    "Question": "Which is heaviest?\n",
    "Correct Answer": "lead\n",
    "Incorrect Answer 1": "air",
    "Incorrect Answer 2": "wood",
    "Incorrect Answer 3": "milk",
    "Subdomain": "none",
}
BOOLQ = {"question": "does ann like tea", "passage": "Ann likes tea.", "answer": True}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def only_row(tmp_path: Path, layout: str, record: Any, **how: Any) -> Any:
    questions = read_questions(write(tmp_path / "data.jsonl", record), LAYOUTS[layout])
    (row,) = question_rows(questions, LAYOUTS[layout], group=layout, **how)
    assert [message["role"] for message in row.messages] == ["user"]
    return row


def test_a_lettered_question_to_be_answered_in_brackets(tmp_path: Path) -> None:
    row = only_row(tmp_path, "mmlu", MMLU, scored=False)
    assert row.messages[0]["content"] == (
        "Question:\nWhat is 2 + 2?\n\nOptions:\nA. 3\nB. 4\nC. 5\nD. 6\n\nOutput format:\n[the letter of the right option]"
    )
    assert (row.answer, row.choices, row.group) == ("B", (), "mmlu")


def test_a_lettered_question_to_be_scored(tmp_path: Path) -> None:
    row = only_row(tmp_path, "mmlu", MMLU, scored=True)
    assert row.messages[0]["content"].endswith("Output format:\nonly the letter of the right option")
    assert (row.answer, row.choices) == ("B", ("A", "B", "C", "D"))


def test_the_right_answer_of_gpqa_is_last_in_the_file_s_order(tmp_path: Path) -> None:
    row = only_row(tmp_path, "gpqa", GPQA, scored=False)
    assert "A. air\nB. wood\nC. milk\nD. lead\n\n" in row.messages[0]["content"]
    assert row.answer == "D"


@pytest.mark.parametrize(("answer", "label"), [(True, "True"), (False, "False")])
def test_a_passage_with_a_question_of_yes_or_no(tmp_path: Path, answer: bool, label: str) -> None:
    row = only_row(tmp_path, "boolq", {**BOOLQ, "answer": answer}, scored=True, shuffle_seed=3)
    assert row.messages[0]["content"] == (
        "Passage:\nAnn likes tea.\n\nQuestion:\ndoes ann like tea\n\nOutput format:\nonly True or False, by what the passage says"
    )
    assert (row.answer, row.choices) == (label, ("True", "False"))


def test_shuffled_options_keep_their_right_answer_and_depend_on_seed_and_question_alone(tmp_path: Path) -> None:
    records = [{**GPQA, "Question": f"Question {number}?"} for number in range(200)]
    questions = read_questions(write(tmp_path / "data.jsonl", *records), LAYOUTS["gpqa"])

    def ask(seed: int, chosen: Any = questions) -> list[Any]:
        return question_rows(chosen, LAYOUTS["gpqa"], group="gpqa", scored=True, shuffle_seed=seed)

    rows = ask(0)
    for row in rows:
        assert f"{row.answer}. lead" in row.messages[0]["content"]
    counts = Counter(row.answer for row in rows)
    assert all(30 < counts[letter] < 70 for letter in "ABCD")
    assert ask(0, questions[::-1])[::-1] == rows
    assert ask(1) != rows


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("[B]", "B"),
        ("I think A, but [ C ] it is", "C"),
        ("[B. lead]", "B"),
        ("The answer is D.", "D"),
        ("A good question. The answer is C", "C"),
        ("A", "A"),
        ("A. air", "A"),
        ("B) wood", "B"),
        ("a", None),
        ("E", None),
        ("Because", None),
        ("", None),
    ],
)
def test_a_letter_is_found_in_a_response(response: str, label: str | None) -> None:
    assert find_label(response, option_labels(LAYOUTS["mmlu"], 4)) == label


@pytest.mark.parametrize(
    ("response", "label"),
    [("[True]", "True"), ("false, since", "False"), ("untrue", None), ("True or not? [False]", "False"), ("yes", None)],
)
def test_a_word_is_found_in_a_response(response: str, label: str | None) -> None:
    assert find_label(response, option_labels(LAYOUTS["boolq"], 2)) == label


def test_a_list_and_lines_are_the_same(tmp_path: Path) -> None:
    records = [{**MMLU, "question": f"{number}?"} for number in range(5)]
    lines = read_questions(write(tmp_path / "a.jsonl", *records), LAYOUTS["mmlu"], limit=3)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    listed = read_questions(tmp_path / "b.json", LAYOUTS["mmlu"], limit=3)
    assert [question.text for question in lines] == [question.text for question in listed] == ["0?", "1?", "2?"]
    assert lines[2].place.endswith("a.jsonl, line 3")
    assert listed[2].place.endswith("b.json, record 3")


@pytest.mark.parametrize(
    ("layout", "record", "message"),
    [
        ("mmlu", [MMLU], "line 1 is not a JSON object"),
        ("mmlu", {**MMLU, "choices": "ABCD"}, "line 1: choices is not a list of two texts or more"),
        ("mmlu", {**MMLU, "choices": ["4"]}, "line 1: choices is not a list"),
        ("mmlu", {**MMLU, "choices": ["3", "", "5"]}, "line 1: choice 2 is not a text, or empty"),
        ("mmlu", {**MMLU, "answer": 4}, "line 1: the answer is not the index of a choice"),
        ("mmlu", {**MMLU, "answer": -1}, "line 1: the answer is not the index"),
        ("mmlu", {**MMLU, "answer": True}, "line 1: the answer is not the index"),
        ("mmlu", {**MMLU, "answer": "B"}, "line 1: the answer is not the index"),
        ("mmlu", {**MMLU, "question": None}, "line 1: question is not a text"),
        ("mmlu", {**MMLU, "question": "\ud800"}, "line 1: question is not a text"),
        ("gpqa", {"Question": "q", "Correct Answer": "a"}, "line 1: Incorrect Answer 1 is not a text"),
        ("gpqa", BOOLQ, "line 1: Incorrect Answer 1 is not a text"),
        ("boolq", {**BOOLQ, "answer": 1}, "line 1: the answer is not true or false"),
        ("boolq", {**BOOLQ, "passage": " "}, "line 1: passage is not a text, or empty"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, layout: str, record: Any, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(record) if not isinstance(record, list) else "7", encoding="utf-8")
    expected = message.replace("line 1", "line 2") if not isinstance(record, list) else message
    with pytest.raises(DatasetError, match=expected) as caught:
        read_questions(path, LAYOUTS[layout])
    assert f"a record of {layout} has" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"{", "line 1 is not JSON"),
        (b"[1,", "is not JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_questions(tmp_path / "data.jsonl", LAYOUTS["mmlu"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        read_questions(tmp_path / "absent.jsonl", LAYOUTS["mmlu"])
    with pytest.raises(DatasetError, match="is neither JSONL nor JSON"):
        read_questions(tmp_path / "data.parquet", LAYOUTS["mmlu"])


def test_the_hub_needs_a_library_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(DatasetError, match="which is not installed") as caught:
        fetch_questions(HubData("cais/mmlu", "test", "all"), LAYOUTS["mmlu"])
    assert "pip install 'voidprune[eval]'" in str(caught.value.hint)


def test_what_the_hub_cannot_give_is_named(tmp_path: Path) -> None:
    """With the library itself, where it is there: from a local folder, and offline."""
    pytest.importorskip("datasets", reason="the datasets library comes with the extra [eval]")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test.jsonl", MMLU, MMLU)
    (question,) = fetch_questions(HubData(str(tmp_path / "data"), "test"), LAYOUTS["mmlu"], limit=1)
    assert (question.text, question.options, question.right) == ("What is 2 + 2?", ("3", "4", "5", "6"), 1)
    with pytest.raises(DatasetError, match="cannot fetch the data set"):
        fetch_questions(HubData(str(tmp_path / "data"), "nosuch"), LAYOUTS["mmlu"])
    with pytest.raises(DatasetError, match="cannot fetch the data set"):
        fetch_questions(HubData("cais/mmlu", "test", "all"), LAYOUTS["mmlu"])


def test_text_records_become_rows(tmp_path: Path) -> None:
    (tmp_path / "squad.jsonl").write_text(
        json.dumps({"context": "Ann likes tea. ", "question": "What does Ann like?", "answers": {"text": ["tea", "a"]}})
    )
    (row,) = find_text_rows(tmp_path / "squad.jsonl", "squad")
    assert row.messages[0]["content"] == "Ann likes tea.\n\nQuestion: What does Ann like?\nAnswer:"
    assert (row.answer, row.response, row.group) == ("tea", None, "squad")
    records = [{"article": f"Long {number}.", "highlights": "Short."} for number in range(3)]
    (tmp_path / "news.json").write_text(json.dumps(records))
    rows = find_text_rows(tmp_path / "news.json", "cnn_dailymail", limit=2)
    assert [(row.messages[0]["content"], row.response) for row in rows] == [
        ("Long 0.\n\nSummary:", "Short."),
        ("Long 1.\n\nSummary:", "Short."),
    ]
    for content in ("[3]", "[]", '[{"article": "x"}]'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DatasetError) as caught:
            find_text_rows(tmp_path / "bad.json", "cnn_dailymail")
        assert caught.value.hint == "a record of cnn_dailymail has article, highlights"
