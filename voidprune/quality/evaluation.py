"""How good a model is: perplexity of given responses, and accuracy of its own.

The same items go through every runner (the stock model or one under a schedule, in torch; a bundle, in onnxruntime), so results
are paired. A response is right when what follows its last "Answer:", or else its last line, is the item's answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from voidprune.errors import DatasetError, ParityError
from voidprune.profiling.calibration import Sample

OnProgress = Callable[[int], None]
"""Called with the number of items that were finished since the last call."""


class Runner(Protocol):
    """What can be evaluated: `execution.reference.ScheduledModel`, `execution.session.BundleSession`."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]: ...

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]: ...


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
        z, n, p = 1.959964, self.num_items, self.share
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Evaluation:
    """Results of one runner. `perplexity` is exp of the mean negative log-likelihood over `num_scored` response tokens.

    `accuracy` is by task; empty where no item has an answer. `responses` are the generated token ids of the items with an
    answer, in order, so that runners can be compared item by item.
    """

    perplexity: float | None
    num_scored: int
    accuracy: Mapping[str, Accuracy]
    responses: tuple[tuple[int, ...], ...]

    def to_document(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "num_scored": self.num_scored,
            "accuracy": {
                task: {
                    "num_right": result.num_right,
                    "num_items": result.num_items,
                    "share": result.share,
                    "interval": list(result.interval),
                }
                for task, result in self.accuracy.items()
            },
        }


def answer_of(response: str) -> str:
    """What a response answers: the text behind its last "Answer:" up to the end of the line, else its last line."""
    lines = response.strip().splitlines() or [""]
    _, marker, answer = response.rpartition("Answer:")
    return (answer.strip().splitlines() or [""])[0].strip() if marker else lines[-1].strip()


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
    """Score the samples that have a response; let the runner answer those that have an answer.

    `decode_text` turns generated token ids into text without special tokens. Raises DatasetError where neither is there.
    """
    scored = [sample for sample in samples if sample.response is not None]
    asked = [sample for sample in samples if sample.answer is not None]
    if not scored and not asked:
        raise DatasetError("no sample has a response or an answer", hint='give items with "response" or "answer"')
    log_likelihood, num_scored = 0.0, 0
    for batch in _chunks(scored, batch_size):
        scores = runner.score([sample.prompt for sample in batch], [sample.response or () for sample in batch])
        log_likelihood += sum(float(score.sum()) for score in scores)
        num_scored += sum(map(len, scores))
        if on_progress is not None:
            on_progress(len(batch))
    responses: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].prompt))
    for indices in _chunks(order, batch_size):
        answers = runner.generate(
            [asked[index].prompt for index in indices], max_new_tokens=max_new_tokens, end_tokens=end_tokens
        )
        responses.update((index, tuple(answer)) for index, answer in zip(indices, answers, strict=True))
        if on_progress is not None:
            on_progress(len(indices))
    right: dict[str, list[bool]] = {}
    for index, sample in enumerate(asked):
        right.setdefault(sample.group, []).append(answer_of(decode_text(responses[index])) == sample.answer)
    return Evaluation(
        perplexity=math.exp(-log_likelihood / num_scored) if num_scored else None,
        num_scored=num_scored,
        accuracy={task: Accuracy(sum(marks), len(marks)) for task, marks in right.items()},
        responses=tuple(responses[index] for index in range(len(asked))),
    )


def count_differences(reference: Evaluation, export: Evaluation) -> int:
    """How many items two runners answered differently, token for token."""
    return sum(one != other for one, other in zip(reference.responses, export.responses, strict=True))


def require_agreement(reference: Evaluation, export: Evaluation, *, tolerance: float = 1e-3) -> None:
    """Raise ParityError where two float32 runners of the same schedule do not agree.

    Rounding can turn a near tie, so one response in a hundred, and always one, may differ; the log-likelihood a token may differ
    by `tolerance` nats.
    """
    different = count_differences(reference, export)
    gap = 0.0
    if reference.perplexity is not None and export.perplexity is not None:
        gap = abs(math.log(reference.perplexity) - math.log(export.perplexity))
    if not gap <= tolerance or different > max(1, len(reference.responses) // 100):
        raise ParityError(
            f"the export and its reference disagree: {different} of {len(reference.responses)} responses differ, "
            f"log-likelihood a token by {gap:.2g} nats",
            hint="was the folder changed after it was exported? export it again",
        )


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
