"""The task generator: deterministic, disjoint, balanced, and right when every answer is worked out again from the prompt."""

import re
from collections import Counter

import pytest

from voidprune.demo.tasks import SPLITS, TASKS, TaskItem, extract_answer, make_items


def facts_of(prompt: str) -> dict[str, str]:
    """Person -> value, read from the first line of a prompt."""
    listed = prompt.splitlines()[0].split(": ", 1)[1].rstrip(".")
    return dict(fact.split() for fact in listed.split(", "))


def answer_yes_no(item: TaskItem) -> str:
    question = re.fullmatch(r"Question: Does (\w+) \w+ (\w+)\?", item.prompt.splitlines()[1])
    assert question
    name, asked = question.groups()
    return "yes" if facts_of(item.prompt)[name] == asked else "no"


def answer_multiple_choice(item: TaskItem) -> str:
    question = re.fullmatch(r"Question: What does (\w+) \w+\? (.+)\.", item.prompt.splitlines()[1])
    assert question
    name, options = question.groups()
    letters = dict(option.split() for option in options.split(", "))
    assert list(letters.values()) == ["A", "B", "C", "D"]
    return letters[facts_of(item.prompt)[name]]


def answer_arithmetic(item: TaskItem) -> str:
    first, *changes = item.prompt.splitlines()[0].rstrip(".").split(". ")
    total = int(re.findall(r"\d+", first)[0])
    for change in changes:
        amount = int(re.findall(r"\d+", change)[0])
        total += amount if change.endswith("more") else -amount
    return str(total)


def answer_sorting(item: TaskItem) -> str:
    order, listed = re.findall(r"^Sort from (\w+) to \w+: (.+)$", item.prompt)[0]
    return ", ".join(sorted(listed.split(", "), reverse=order == "largest"))


ANSWERS = {
    "yes-no": answer_yes_no,
    "multiple-choice": answer_multiple_choice,
    "arithmetic": answer_arithmetic,
    "sorting": answer_sorting,
}


def test_the_kinds_are_these() -> None:
    assert list(TASKS) == ["yes-no", "multiple-choice", "arithmetic", "sorting"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_prompt_alone(task: str) -> None:
    for item in make_items(task, split="evaluation", num_items=500):
        assert item.task == task
        assert item.answer == ANSWERS[task](item), item
        assert item.response.endswith(f"Answer: {item.answer}")
        assert extract_answer(item.response) == item.answer


@pytest.mark.parametrize("task", ["yes-no", "multiple-choice"])
def test_the_deciding_fact_is_quoted(task: str) -> None:
    for item in make_items(task, split="training", num_items=200):
        name, value, verdict = item.response.removeprefix("Fact: ").split(".")[0].split()
        assert facts_of(item.prompt)[name] == value
        assert verdict == item.answer


def test_the_working_is_right() -> None:
    for item in make_items("arithmetic", split="training", num_items=200):
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", item.response)
        assert len(steps) in (2, 3)
        for left, sign, right, result in steps:
            assert int(left) + int(f"{sign}{right}") == int(result)
            assert 0 < int(result) < 100


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_same_items(task: str) -> None:
    items = make_items(task, split="calibration", num_items=50, seed=3)
    assert items == make_items(task, split="calibration", num_items=50, seed=3)
    assert items[:10] == make_items(task, split="calibration", num_items=10, seed=3)
    assert items != make_items(task, split="calibration", num_items=50, seed=4)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt(task: str) -> None:
    prompts = [item.prompt for split in SPLITS for item in make_items(task, split=split, num_items=500)]
    assert len(set(prompts)) == 500 * len(SPLITS)


@pytest.mark.parametrize(("task", "answers"), [("yes-no", ("yes", "no")), ("multiple-choice", ("A", "B", "C", "D"))])
def test_answers_are_balanced(task: str, answers: tuple[str, ...]) -> None:
    counts = Counter(item.answer for item in make_items(task, split="evaluation", num_items=2000))
    assert set(counts) == set(answers)
    for answer in answers:
        assert counts[answer] == pytest.approx(2000 / len(answers), rel=0.15)


def test_no_is_never_given_away_by_the_passage() -> None:
    for item in make_items("yes-no", split="evaluation", num_items=300):
        passage, question = item.prompt.splitlines()
        asked = question.rstrip("?").split()[-1]
        assert asked in passage


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: yes", "yes"),
        ("Fact: Ann tea. Answer: no", "no"),
        ("Answer: 1\nAnswer:  2 \nand so on", "2"),
        ("Answer: 10, 20, 30", "10, 20, 30"),
        ("no answer here", None),
        ("Answer:", None),
        ("Answer:\nyes", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'spelling'; choose one of yes-no, multiple-choice, arithmetic, sorting"):
        make_items("spelling", split="training", num_items=1)
    with pytest.raises(ValueError, match="'test'; choose one of training, calibration, validation, evaluation"):
        make_items("sorting", split="test", num_items=1)
    with pytest.raises(ValueError, match="negative"):
        make_items("sorting", split="training", num_items=-1)
