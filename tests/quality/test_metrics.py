"""What a response answers, whether it ends in a loop, which choice is likeliest."""

from __future__ import annotations

import pytest

from voidprune.quality.metrics import answer_of, best_choice, ends_in_repetition


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Fact: x. Answer: yes", "yes"),
        ("Answer: no\nAnswer:  yes \nThanks", "yes"),
        ("first line\nlast line\n", "last line"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_answer_of(response: str, answer: str) -> None:
    assert answer_of(response) == answer


@pytest.mark.parametrize(
    ("response", "loops"),
    [
        ([], False),
        ([5] * 7, False),
        ([5] * 8, True),
        ([1, 2, 3, *[5] * 8], True),
        ([*[5] * 8, 1], False),
        ([*[5] * 8, 0], True),  # an end token behind it
        ([*[5] * 8, 0, 0], True),
        ([9, 0, 0, 0, 0, 0, 0, 0, 0, 0], False),  # end tokens themselves are no phrase
        ([7, 8] * 4, True),
        ([7, 8] * 3 + [7], False),
        ([1, 2, 3] * 4, True),
        ([1, 2, 3] * 3, False),
        ([4, *list(range(20)) * 4], True),
        (list(range(100)), False),
    ],
)
def test_ends_in_repetition(response: list[int], loops: bool) -> None:
    assert ends_in_repetition(response, end_tokens=[0]) is loops


def test_best_choice() -> None:
    assert best_choice([-3.0, -2.0, -2.0]) == 1
    assert best_choice([-3.0, -2.0], ["a long choice", "no"]) == 0
    assert best_choice([-3.0, -2.0], ["\N{GREEK SMALL LETTER ALPHA}" * 3, "no"]) == 0, "characters, not bytes"
