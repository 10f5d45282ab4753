"""How good a model is, item by item: likelihood of given responses, choices among answers, and responses of its own.

The same items go through every runner (the stock model or one under a schedule, in torch; a bundle, in onnxruntime), so results
are paired: `quality.paired` compares them. A generated response is right when what follows its last "Answer:", or else its last
line, is the item's answer; an item with choices is right when the right choice is the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from voidprune.errors import DatasetError, ModelError, ParityError
from voidprune.profiling.calibration import Sample
from voidprune.quality.metrics import answer_of, best_choice, ends_in_repetition
from voidprune.quality.statistics import (
    Estimate,
    FloatArray,
    estimate_mean,
    estimate_ratio,
    estimate_share,
    exponential,
    wilson_interval,
)

OnProgress = Callable[[int], None]
"""Called with the number of items that were finished since the last call."""


class Runner(Protocol):
    """What can be evaluated: `execution.reference.ScheduledModel`, `execution.session.BundleSession`."""

    @property
    def vocab_size(self) -> int: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]: ...

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[FloatArray]: ...

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]: ...


@dataclass(frozen=True)
class Accuracy:
    """Right items of a task, with a 95 % Wilson interval."""

    num_right: int
    num_items: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_items

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval at 95 %."""
        return wilson_interval(self.num_right, self.num_items)

    def to_document(self) -> dict[str, Any]:
        return {
            "num_right": self.num_right,
            "num_items": self.num_items,
            "share": self.share,
            "interval": list(self.interval),
        }


@dataclass(frozen=True)
class Generation:
    """How the generated responses look, whatever they say.

    `mean_length` is in tokens, with the end token. `cut` is the share that reached the longest length without an end token,
    `looping` the share that ends in a repetition: `metrics.ends_in_repetition`.
    """

    num_items: int
    mean_length: Estimate
    cut: Estimate
    looping: Estimate

    def to_document(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "mean_length": self.mean_length.to_document(),
            "cut": self.cut.to_document(),
            "looping": self.looping.to_document(),
        }


def _no_values() -> FloatArray:
    return np.zeros(0)


def _no_marks() -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.zeros(0, np.bool_)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of one runner, item by item, in the order of the items.

    - Scored items, those with a response: `nll` [S] is the sum of negative log-likelihoods, in nats, of `num_tokens` [S] tokens.
    - Answered items, those with an answer: `right` [A], of the task `groups` [A].
    - Of these, the generated ones, which have no choices: `responses`, token ids up to and including the end token, and whether one
      ends in a repetition (`looping` [G]) or was cut off (`cut` [G]).
    - The others, which have choices: `right_normalized` [C], of the task `choice_groups` [C]: the same per character of a choice.
    """

    nll: FloatArray = field(default_factory=_no_values)
    num_tokens: FloatArray = field(default_factory=_no_values)
    right: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=_no_marks)
    groups: tuple[str, ...] = ()
    responses: tuple[tuple[int, ...], ...] = ()
    looping: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=_no_marks)
    cut: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=_no_marks)
    right_normalized: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=_no_marks)
    choice_groups: tuple[str, ...] = ()

    @property
    def num_scored(self) -> int:
        """Response tokens behind the perplexity."""
        return int(self.num_tokens.sum())

    @property
    def loss(self) -> float | None:
        """Mean negative log-likelihood of a response token, in nats; None where no item has a response."""
        return float(self.nll.sum() / self.num_tokens.sum()) if len(self.nll) else None

    @property
    def perplexity(self) -> float | None:
        """exp of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))

    @property
    def perplexity_estimate(self) -> Estimate | None:
        """Perplexity with its interval, bootstrapped over items."""
        return exponential(estimate_ratio(self.nll, self.num_tokens)) if len(self.nll) else None

    @property
    def accuracy(self) -> dict[str, Accuracy]:
        """By task, in the order in which tasks come; empty where no item has an answer."""
        return _accuracies(self.right, self.groups)

    @property
    def normalized_accuracy(self) -> dict[str, Accuracy]:
        """By task with choices: the likeliest choice by log-likelihood per character (lm-evaluation-harness: acc_norm)."""
        return _accuracies(self.right_normalized, self.choice_groups)

    @property
    def generation(self) -> Generation | None:
        if not self.responses:
            return None
        num_items = len(self.responses)
        return Generation(
            num_items=num_items,
            mean_length=estimate_mean(np.array([len(response) for response in self.responses], np.float64)),
            cut=estimate_share(int(self.cut.sum()), num_items),
            looping=estimate_share(int(self.looping.sum()), num_items),
        )

    def to_document(self) -> dict[str, Any]:
        perplexity, generation, normalized = self.perplexity_estimate, self.generation, self.normalized_accuracy
        return {
            "perplexity": self.perplexity,
            "perplexity_interval": None if perplexity is None else [perplexity.low, perplexity.high],
            "num_scored": self.num_scored,
            "accuracy": {
                task: {
                    **accuracy.to_document(),
                    "normalized": normalized[task].to_document() if task in normalized else None,
                }
                for task, accuracy in self.accuracy.items()
            },
            "generation": None if generation is None else generation.to_document(),
        }


def _accuracies(right: np.ndarray[Any, np.dtype[np.bool_]], groups: Sequence[str]) -> dict[str, Accuracy]:
    marks: dict[str, list[bool]] = {}
    for group, mark in zip(groups, right, strict=True):
        marks.setdefault(group, []).append(bool(mark))
    return {group: Accuracy(sum(found), len(found)) for group, found in marks.items()}


def count_steps(samples: Sequence[Sample]) -> int:
    """How many steps `evaluate` reports to `on_progress` in all."""
    return sum((sample.response is not None) + (len(sample.choices) or sample.answer is not None) for sample in samples)


def evaluate(
    runner: Runner,
    samples: Sequence[Sample],
    *,
    decode_text: Callable[[Sequence[int]], str],
    end_tokens: Sequence[int],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score the samples that have a response, choose where there are choices, let the runner answer the others with an answer.

    `decode_text` turns generated token ids into text without special tokens. Raises DatasetError where there is nothing to do, or
    a task mixes items with and without choices; ModelError where a likelihood is not finite.
    """
    scored = [sample for sample in samples if sample.response is not None]
    answered = [sample for sample in samples if sample.answer is not None]
    generated = [sample for sample in answered if not sample.choices]
    chosen = [sample for sample in answered if sample.choices]
    if not scored and not answered:
        raise DatasetError("no sample has a response or an answer", hint='give items with "response" or "answer"')
    if mixed := {sample.group for sample in generated} & {sample.group for sample in chosen}:
        raise DatasetError(
            f"items of the task {min(mixed)} are of two kinds, with choices and without",
            hint='name two tasks in the field "task"',
        )
    advance = on_progress or (lambda _steps: None)
    nll = _sum_scores(runner, [(sample.prompt, sample.response or ()) for sample in scored], batch_size, advance)
    responses = _generate(runner, generated, max_new_tokens, end_tokens, batch_size, advance)
    pairs = [(sample.prompt, choice) for sample in chosen for choice in sample.choices]
    likelihoods = iter(-_sum_scores(runner, pairs, batch_size, advance))
    answers = iter(responses)
    right, right_normalized = [], []
    for sample in answered:
        if sample.choices:
            values = [float(next(likelihoods)) for _ in sample.choices]
            wanted = sample.choice_texts.index(str(sample.answer))
            right.append(best_choice(values) == wanted)
            right_normalized.append(best_choice(values, sample.choice_texts) == wanted)
        else:
            right.append(answer_of(decode_text(next(answers))) == sample.answer)
    return Evaluation(
        nll=nll,
        num_tokens=np.array([len(sample.response or ()) for sample in scored], np.float64),
        right=np.array(right, np.bool_),
        groups=tuple(sample.group for sample in answered),
        responses=tuple(responses),
        looping=np.array([ends_in_repetition(response, end_tokens=end_tokens) for response in responses], np.bool_),
        cut=np.array([not response or response[-1] not in end_tokens for response in responses], np.bool_),
        right_normalized=np.array(right_normalized, np.bool_),
        choice_groups=tuple(sample.group for sample in chosen),
    )


def _sum_scores(
    runner: Runner, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, advance: OnProgress
) -> FloatArray:
    """Negative log-likelihood of each (prompt, response), in nats, [N]. Pairs of like length run together."""
    totals = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda index: (len(pairs[index][1]), len(pairs[index][0])))
    for indices in chunks(order, batch_size):
        scores = runner.score([pairs[index][0] for index in indices], [pairs[index][1] for index in indices])
        totals[indices] = [-score.sum() for score in scores]
        advance(len(indices))
    if not np.isfinite(totals).all():
        raise ModelError("the model gives logits that are not finite", hint="use a precision with more range: fp32")
    return totals


def _generate(
    runner: Runner,
    samples: Sequence[Sample],
    max_new_tokens: int,
    end_tokens: Sequence[int],
    batch_size: int,
    advance: OnProgress,
) -> list[tuple[int, ...]]:
    responses: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].prompt))
    for indices in chunks(order, batch_size):
        answers = runner.generate(
            [samples[index].prompt for index in indices], max_new_tokens=max_new_tokens, end_tokens=end_tokens
        )
        responses.update((index, tuple(answer)) for index, answer in zip(indices, answers, strict=True))
        advance(len(indices))
    return [responses[index] for index in range(len(samples))]


def count_differences(reference: Evaluation, export: Evaluation) -> int:
    """How many items two runners answered differently, token for token."""
    return sum(one != other for one, other in zip(reference.responses, export.responses, strict=True))


def require_agreement(reference: Evaluation, export: Evaluation, *, tolerance: float = 1e-3) -> None:
    """Raise ParityError where two float32 runners of the same schedule do not agree.

    Rounding can turn a near tie, so one response and one verdict in a hundred, and always one, may differ; the log-likelihood a
    token may differ by `tolerance` nats.
    """
    different = count_differences(reference, export)
    verdicts = int((reference.right != export.right).sum())
    gap = 0.0
    if reference.loss is not None and export.loss is not None:
        gap = abs(reference.loss - export.loss)
    few = max(1, len(reference.responses) // 100), max(1, len(reference.right) // 100)
    if not gap <= tolerance or different > few[0] or verdicts > few[1]:
        raise ParityError(
            f"the export and its reference disagree: {different} of {len(reference.responses)} responses differ, "
            f"{verdicts} of {len(reference.right)} answers are right for one of them alone, "
            f"log-likelihood a token by {gap:.2g} nats",
            hint="was the folder changed after it was exported? export it again",
        )


def chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
