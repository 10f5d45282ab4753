"""Accuracy and perplexity, item by item, and the agreement that runners of one schedule owe each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from voidprune.errors import DatasetError, ModelError, ParityError
from voidprune.profiling.calibration import Sample
from voidprune.quality.evaluation import (
    Accuracy,
    Evaluation,
    count_differences,
    count_steps,
    evaluate,
    require_agreement,
)

VOCAB_SIZE = 16


def uniform(_token: int) -> float:
    return math.log(1 / VOCAB_SIZE)


@dataclass
class Parrot:
    """A runner whose every answer is known: it repeats the last token of the prompt, and finds a token as likely as it is told."""

    likelihood: Callable[[int], float] = uniform
    num_repeats: int = 1
    vocab_size: int = VOCAB_SIZE

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        return [[prompt[-1]] * self.num_repeats for prompt in prompts]

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        return [np.array([self.likelihood(token) for token in response]) for response in responses]

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        row = np.array([self.likelihood(token) for token in range(self.vocab_size)], np.float32)
        return [np.tile(row, (len(response), 1)) for response in responses]


def sample(last: int, answer: str | None, *, response: tuple[int, ...] | None = (1, 2), group: str = "task") -> Sample:
    return Sample(prompt=(9,) * (last + 1) + (last,), response=response, answer=answer, group=group, place="here")


def choice_item(right: str, *, group: str = "choices") -> Sample:
    """The choices "a" (token 1) and "long" (tokens 2, 3)."""
    return Sample((9, 9), None, right, group, "here", choices=((1,), (2, 3)), choice_texts=("a", "long"))


def run(samples: Sequence[Sample], runner: Parrot | None = None) -> Evaluation:
    return evaluate(
        runner or Parrot(),
        samples,
        decode_text=lambda tokens: f"I say. Answer: {tokens[0]}",
        end_tokens=(0,),
        batch_size=2,
    )


def test_accuracy_by_task_in_the_order_of_the_items() -> None:
    result = run([sample(5, "5"), sample(3, "4"), sample(1, "1", group="other"), sample(2, None)])
    assert result.accuracy == {"task": Accuracy(1, 2), "other": Accuracy(1, 1)}
    assert result.responses == ((5,), (3,), (1,))
    assert result.right.tolist() == [True, False, True]
    assert result.groups == ("task", "task", "other")
    assert result.normalized_accuracy == {}


def test_likelihood_item_by_item() -> None:
    """Items of other lengths run in another order; results do not."""
    lengths = (3, 1, 2)
    result = run(
        [sample(5, None, response=tuple(range(1, length + 1))) for length in lengths],
        Parrot(likelihood=lambda token: -float(token)),
    )
    assert result.nll.tolist() == [6.0, 1.0, 3.0]
    assert result.num_tokens.tolist() == [3, 1, 2]
    assert result.num_scored == 6
    assert result.perplexity == pytest.approx(math.exp(10 / 6))
    estimate = result.perplexity_estimate
    assert estimate is not None
    assert math.exp(1) <= estimate.low < estimate.value < estimate.high <= math.exp(2) + 1e-9


def test_a_choice_is_right_by_likelihood_and_by_likelihood_a_character() -> None:
    """Token 1 costs 2 nats, tokens 2 and 3 cost 2 each: "a" is likeliest, "long" is likeliest a character."""
    result = run([choice_item("a"), choice_item("long"), choice_item("a")], Parrot(likelihood=lambda _token: -2.0))
    assert result.accuracy == {"choices": Accuracy(2, 3)}
    assert result.normalized_accuracy == {"choices": Accuracy(1, 3)}
    assert result.right.tolist() == [True, False, True]
    assert result.responses == ()
    assert result.generation is None
    assert result.to_document()["accuracy"]["choices"]["normalized"]["num_right"] == 1


def test_choices_and_questions_keep_the_order_of_the_items() -> None:
    items = [choice_item("long"), sample(5, "5", response=None), choice_item("a"), sample(3, "4", response=None)]
    result = run(items, Parrot(likelihood=lambda _token: -2.0))
    assert result.right.tolist() == [False, True, True, False]
    assert result.groups == ("choices", "task", "choices", "task")
    assert list(result.accuracy) == ["choices", "task"]
    assert count_steps(items) == 2 + 1 + 2 + 1


def test_how_generated_responses_look() -> None:
    """Nine times token 5, of which none ends a response: cut off and in a loop. Nine end tokens are no loop."""
    result = run([sample(5, "5"), sample(0, "0")], Parrot(num_repeats=9))
    assert result.generation is not None
    assert result.generation.mean_length.value == 9
    assert (result.generation.cut.value, result.generation.looping.value) == (0.5, 0.5)


def test_progress_is_told_to_the_end() -> None:
    steps: list[int] = []
    items = [choice_item("a"), sample(5, "5"), sample(5, None)]
    evaluate(
        Parrot(), items, decode_text=str, end_tokens=(), on_progress=steps.append, batch_size=1
    )  # fmt: skip
    assert sum(steps) == count_steps(items) == 5


def test_items_without_responses_have_no_perplexity() -> None:
    result = run([sample(5, "5", response=None)])
    assert (result.perplexity, result.perplexity_estimate, result.loss) == (None, None, None)


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(DatasetError, match="no sample has a response or an answer"):
        run([sample(5, None, response=None)])


def test_a_task_of_two_kinds_is_refused() -> None:
    with pytest.raises(DatasetError, match="items of the task task are of two kinds"):
        run([sample(5, "5"), choice_item("a", group="task")])


def test_likelihoods_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        run([sample(5, "5")], Parrot(likelihood=lambda _token: math.nan))


def test_agreement() -> None:
    number = 200
    one = Evaluation(
        nll=np.array([7.0]),
        num_tokens=np.array([10.0]),
        right=np.ones(number, np.bool_),
        groups=("task",) * number,
        responses=tuple((number,) for number in range(number)),
    )
    near = replace(one, nll=np.array([7.001]), responses=((7,), *one.responses[1:]))
    require_agreement(one, near)
    assert count_differences(one, near) == 1
    with pytest.raises(ParityError, match="disagree"):
        require_agreement(one, replace(one, nll=np.array([7.02])))
    with pytest.raises(ParityError, match="3 of 200 responses differ"):
        require_agreement(one, replace(one, responses=((7,), (8,), (9,), *one.responses[3:])))
    with pytest.raises(ParityError, match="3 of 200 answers are right for one of them alone"):
        require_agreement(one, replace(one, right=np.arange(number) >= 3))
    with pytest.raises(ParityError):
        require_agreement(one, replace(one, nll=np.array([math.nan])))
