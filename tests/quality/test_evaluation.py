"""Accuracy and perplexity, and the agreement that runners of one schedule owe each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from voidprune.errors import DatasetError, ParityError
from voidprune.profiling.calibration import Sample
from voidprune.quality.evaluation import Accuracy, Evaluation, answer_of, count_differences, evaluate, require_agreement


class Parrot:
    """A runner whose every answer is known: it repeats the last token of the prompt, and finds each token half likely."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        return [[prompt[-1]] for prompt in prompts]

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        return [np.full(len(response), math.log(0.5)) for response in responses]


def sample(last: int, answer: str | None, *, response: tuple[int, ...] | None = (1, 2), group: str = "task") -> Sample:
    return Sample(prompt=(9,) * (last + 1) + (last,), response=response, answer=answer, group=group, place="here")


def run(samples: Sequence[Sample]) -> Evaluation:
    return evaluate(
        Parrot(), samples, decode_text=lambda tokens: f"I say. Answer: {tokens[0]}", end_tokens=(0,), batch_size=2
    )


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


def test_accuracy_by_task_in_the_order_of_the_items() -> None:
    result = run([sample(5, "5"), sample(3, "4"), sample(1, "1", group="other"), sample(2, None)])
    assert {task: (found.num_right, found.num_items) for task, found in result.accuracy.items()} == {
        "task": (1, 2),
        "other": (1, 1),
    }
    assert result.responses == ((5,), (3,), (1,))
    assert result.perplexity == pytest.approx(2.0)
    assert result.num_scored == 8


def test_items_without_responses_have_no_perplexity() -> None:
    assert run([sample(5, "5", response=None)]).perplexity is None


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(DatasetError, match="no sample has a response or an answer"):
        run([sample(5, None, response=None)])


def test_wilson_interval() -> None:
    """Against the value of R's prop.test(81, 263, correct = FALSE), as in Newcombe (1998)."""
    low, high = Accuracy(81, 263).interval
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert Accuracy(10, 10).interval[1] == pytest.approx(1.0)


def test_agreement() -> None:
    one = Evaluation(perplexity=2.0, num_scored=10, accuracy={}, responses=tuple((number,) for number in range(200)))
    near = replace(one, perplexity=2.0001, responses=((7,), *one.responses[1:]))
    require_agreement(one, near)
    assert count_differences(one, near) == 1
    with pytest.raises(ParityError, match="disagree"):
        require_agreement(one, replace(one, perplexity=2.01))
    with pytest.raises(ParityError, match="3 of 200 responses differ"):
        require_agreement(one, replace(one, responses=((7,), (8,), (9,), *one.responses[3:])))
    with pytest.raises(ParityError):
        require_agreement(one, replace(one, perplexity=math.nan))
