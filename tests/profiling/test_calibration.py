"""Dataset files: the shapes that are read, the boundary between prompt and response, and errors that name the line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from voidprune.errors import DatasetError
from voidprune.models.pretrained import end_tokens, load_tokenizer
from voidprune.pipeline.models import demo_folder
from voidprune.profiling.calibration import (
    default_rows,
    encode_rows,
    fingerprint_samples,
    read_rows,
    require_responses,
)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_shape_is_read(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path / "data.jsonl",
            '{"prompt": "p", "response": "r", "answer": "a", "task": "t", "id": 7}',
            '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}',
            '{"messages": [{"role": "user", "content": "p"}]}',
            "",
            '{"instruction": "do", "input": "this", "output": "r"}',
            '{"text": "plain words"}',
        )
    )
    assert [row.response for row in rows] == ["r", "r", None, "r", None]
    assert (rows[0].answer, rows[0].group) == ("a", "t")
    assert rows[3].messages == ({"role": "user", "content": "do\n\nthis"},)
    assert rows[4].text == "plain words"
    assert rows[4].group == "data"
    assert rows[4].place.endswith("line 6")


def test_a_text_file_is_cut_at_empty_lines(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "data.txt", "one", "still one", "", " ", "two"))
    assert [row.text for row in rows] == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"question": "p"}', "line 2 has no prompt, messages, instruction or text"),
        ('{"prompt": 3}', "line 2: prompt is not a text"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"text": ""}', "line 2: text is empty"),
        ('{"prompt": "\\ud800"}', "line 2: prompt is not a text"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"messages": []}', "line 2: messages is not a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages is not a list"),
        ('{"messages": [{"role": "assistant", "content": "r"}]}', "line 2: messages holds a response but no prompt"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "line 2: choices is not a list of two texts or more"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 2: choices is not a list of two texts or more"),
        ('{"question": "q", "choices": ["a", 3], "answer": 0}', "line 2: choice 2 is not a text, or empty"),
        ('{"question": "q", "choices": ["a", "\\ud800"], "answer": 0}', "line 2: choice 2 is not a text, or empty"),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', "line 2: choice 2 is not a text, or empty"),
        ('{"question": "q", "choices": ["a", "b", "a"], "answer": 1}', "line 2: choice 3 is there twice"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 2 has choices but no answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 2: the answer 2 is none of the 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "line 2: the answer -1 is none of the 2 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "line 2: the answer true is none of the 2"),
        ('{"question": "q", "choices": ["x", "y"], "answer": "C"}', 'line 2: the answer "C" is none of the 2 choices'),
        ('{"question": "q", "choices": ["x", "y"], "answer": ["x"]}', "line 2: the answer .* is none of the 2 choices"),
        ('{"question": 3, "choices": ["x", "y"], "answer": 0}', "line 2: question is not a text"),
        ('{"choices": ["x", "y"], "answer": 0}', "line 2 has no prompt, messages, instruction or text"),
        ('{"text": "t", "choices": ["x", "y"], "answer": 0}', "line 2: choices do not go with text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_rows(write(tmp_path / "data.jsonl", '{"prompt": "fine"}', line))


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ('["yes", "no"]', '"no"', "no"),
        ('["yes", "no"]', '"B"', "no"),
        ('["yes", "no"]', '"b"', "no"),
        ('["yes", "no"]', "1", "no"),
        ('["B", "A"]', '"A"', "A"),  # a text goes before a letter
        ('["1", "0"]', '"0"', "0"),
        ('["1", "0"]', "0", "1"),
        ('[" yes", " no"]', '"no"', " no"),
    ],
)
def test_the_right_choice_is_a_text_a_letter_or_an_index(tmp_path: Path, choices: str, answer: str, right: str) -> None:
    line = f'{{"question": "q", "choices": {choices}, "answer": {answer}}}'
    (row,) = read_rows(write(tmp_path / "data.jsonl", line))
    assert row.answer == right
    assert row.messages == ({"role": "user", "content": "q"},)
    assert right in row.choices


def test_choices_continue_the_prompt(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path / "data.jsonl",
            '{"prompt": "Food: Ann tea. What does Ann like?", "choices": ["tea", "green plums"], "answer": "A"}',
        )
    )
    tokenizer = load_tokenizer(demo_folder())
    (sample,) = encode_rows(rows, tokenizer, end_tokens=end_tokens(demo_folder()), max_length=60, max_new_tokens=1000)
    assert [tokenizer.decode(list(choice)) for choice in sample.choices] == ["tea", "green plums"]
    assert (sample.answer, sample.response, sample.choice_texts) == ("tea", None, ("tea", "green plums"))
    longest = len(sample.prompt) + max(map(len, sample.choices))
    encode_rows(rows, tokenizer, end_tokens=(), max_length=longest)
    with pytest.raises(DatasetError, match=f"line 1 needs {longest} tokens"):
        encode_rows(rows, tokenizer, end_tokens=(), max_length=longest - 1)
    other = encode_rows([replace(rows[0], choices=("tea", "rice"))], tokenizer, end_tokens=(), max_length=60)
    assert fingerprint_samples([sample]) != fingerprint_samples(other)


def test_without_a_chat_template_choices_follow_a_space(tmp_path: Path) -> None:
    line = '{"question": "Food: Ann tea. Answer:", "choices": ["tea", " rice"], "answer": 0}'
    tokenizer = load_tokenizer(demo_folder())
    tokenizer.chat_template = None
    (sample,) = encode_rows(read_rows(write(tmp_path / "data.jsonl", line)), tokenizer, end_tokens=(), max_length=60)
    for choice, text in zip(sample.choices, ("tea", "rice"), strict=True):
        assert list(sample.prompt + choice) == tokenizer(f"Food: Ann tea. Answer: {text}")["input_ids"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="holds no samples"):
        read_rows(write(tmp_path / name, ""))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_rows(tmp_path / "data.jsonl")


def test_chat_template_and_boundary(tmp_path: Path) -> None:
    tokenizer, ends = load_tokenizer(demo_folder()), end_tokens(demo_folder())
    rows = read_rows(write(tmp_path / "data.jsonl", '{"prompt": "Sort: 3, 1", "response": "Answer: 1, 3"}'))
    (sample,) = encode_rows(rows, tokenizer, end_tokens=ends, max_length=128)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Sort: 3, 1"}, {"role": "assistant", "content": "Answer: 1, 3"}], tokenize=False
    )
    assert sample.response is not None
    assert tokenizer.decode(list(sample.prompt + sample.response)) == whole.strip()
    assert sample.prompt.count(tokenizer.bos_token_id) == 1
    assert sample.response[-1] == ends[0]
    assert tokenizer.decode(list(sample.response[:-1])) == "Answer: 1, 3"


def test_plain_text_is_cut_in_the_middle(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder())
    rows = read_rows(write(tmp_path / "data.jsonl", '{"text": "Jack visits Oslo. Ben visits Dublin."}'))
    whole = tokenizer("Jack visits Oslo. Ben visits Dublin.")["input_ids"]
    (sample,) = encode_rows(rows, tokenizer, end_tokens=(), max_length=128)
    assert sample.response is not None
    assert list(sample.prompt + sample.response) == whole
    assert 0 <= len(sample.prompt) - len(sample.response) <= 1
    pieces = encode_rows(rows, tokenizer, end_tokens=(), max_length=4)
    lengths = [len(piece.prompt) + len(piece.response or ()) for piece in pieces]
    assert [token for piece in pieces for token in (*piece.prompt, *(piece.response or ()))] == whole
    assert max(lengths) <= 4
    assert max(lengths) - min(lengths) <= 1


def test_what_is_too_long_or_without_response_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder())
    rows = read_rows(write(tmp_path / "data.jsonl", '{"prompt": "Sort: 3, 1"}'))
    with pytest.raises(DatasetError, match=r"line 1 needs .* tokens with its response; the longest allowed is 3"):
        encode_rows(rows, tokenizer, end_tokens=(), max_length=3)
    samples = encode_rows(rows, tokenizer, end_tokens=(), max_length=100)
    with pytest.raises(DatasetError, match="line 1 has no response"):
        require_responses(samples)


def test_json_under_another_name_is_not_taken_for_prose(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "data.txt", '{"prompt": "a"}'))[0].messages
    with pytest.raises(DatasetError, match="line 1 is not a JSON object"):
        read_rows(write(tmp_path / "data.json", '[{"prompt": "a"}]'))


def test_room_is_kept_for_answers_only(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder())
    rows = read_rows(
        write(tmp_path / "data.jsonl", '{"prompt": "Sort: 3, 1", "answer": "1, 3"}', '{"prompt": "Sort: 3, 1"}')
    )
    assert len(encode_rows(rows[1:], tokenizer, end_tokens=(), max_length=40, max_new_tokens=39)) == 1
    with pytest.raises(DatasetError, match="line 1 needs"):
        encode_rows(rows, tokenizer, end_tokens=(), max_length=40, max_new_tokens=39)


def test_a_template_that_refuses_names_the_line(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "data.jsonl", '{"messages": [{"role": "system", "content": "be brief"}]}'))
    with pytest.raises(DatasetError, match="line 1: the model's chat template refuses"):
        encode_rows(rows, load_tokenizer(demo_folder()), end_tokens=(), max_length=100)


def test_the_built_in_prompts_differ() -> None:
    rows = default_rows()
    assert len({row.messages[0]["content"] for row in rows}) == len(rows) >= 64


def test_the_fingerprint_sees_tokens_and_boundary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder())
    rows = read_rows(write(tmp_path / "data.jsonl", '{"text": "Jack visits Oslo."}', '{"text": "Ben visits Dublin."}'))
    samples = encode_rows(rows, tokenizer, end_tokens=(), max_length=100)
    assert fingerprint_samples(samples) == fingerprint_samples(list(samples))
    assert fingerprint_samples(samples) != fingerprint_samples(samples[::-1])
