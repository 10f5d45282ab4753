"""Does a pruned model still say what the whole model says? Agreement of their predictions on given responses.

Teacher-forced, token by token over the whole vocabulary: the share of tokens on which both find the same token likeliest, and
KL(whole || other) = sum over v of p_whole(v) (ln p_whole(v) - ln p_other(v)), in nats. It needs no right answers, and it sees
damage long before accuracy does. Predictions are compared batch by batch and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from voidprune.errors import ModelError
from voidprune.profiling.calibration import Sample
from voidprune.quality.evaluation import OnProgress, Runner
from voidprune.quality.statistics import Estimate, FloatArray, estimate_ratio

OpenRunner = Callable[[], AbstractContextManager[Runner]]
"""Makes a runner ready. One torch model can only be under one schedule at a time, so runners take turns, batch by batch."""

PREDICTED_VALUES = 2**25
"""Log-probabilities of one batch and runner at most, unless a single item needs more: 128 MiB."""
_COMPARED_VALUES = 2**22


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of one runner with the whole model, item by item: `same` [N] and `divergence` [N] are sums over `num_tokens` [N] tokens."""

    same: FloatArray
    divergence: FloatArray
    num_tokens: FloatArray

    @property
    def top1(self) -> Estimate:
        """Share of tokens on which both find the same token likeliest; interval bootstrapped over items."""
        return estimate_ratio(self.same, self.num_tokens)

    @property
    def kl(self) -> Estimate:
        """Mean KL(whole || this) a token, in nats; interval bootstrapped over items."""
        return estimate_ratio(self.divergence, self.num_tokens)

    def to_document(self) -> dict[str, Any]:
        return {"top1": self.top1.to_document(), "kl": self.kl.to_document(), "num_tokens": int(self.num_tokens.sum())}


def measure_agreement(
    whole: OpenRunner,
    others: Mapping[str, OpenRunner],
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> dict[str, Agreement]:
    """Agreement of each of `others` with the whole model on the samples that have a response; {} where none has.

    Raises ModelError where the vocabularies differ, or a divergence is not finite.
    """
    scored = [sample for sample in samples if sample.response is not None]
    if not scored:
        return {}
    lengths = [len(sample.response or ()) for sample in scored]
    sums = {name: np.zeros((len(scored), 2)) for name in others}
    with whole() as runner:
        vocab_size = runner.vocab_size
    for indices in batches(lengths, batch_size=batch_size, max_tokens=max(1, PREDICTED_VALUES // vocab_size)):
        prompts = [scored[index].prompt for index in indices]
        responses = [scored[index].response or () for index in indices]
        with whole() as runner:
            expected = runner.predict(prompts, responses)
        for name, other in others.items():
            with other() as runner:
                found = runner.predict(prompts, responses)
            for index, whole_TV, other_TV in zip(indices, expected, found, strict=True):
                if whole_TV.shape != other_TV.shape:
                    raise ModelError(
                        f"the vocabulary of {name} has {other_TV.shape[1]} tokens, that of the whole model {whole_TV.shape[1]}",
                        hint="compare with the model that it was made from",
                    )
                sums[name][index] = _compare(whole_TV, other_TV)
        if on_progress is not None:
            on_progress(len(indices))
    if not all(np.isfinite(found).all() for found in sums.values()):
        raise ModelError("the model gives logits that are not finite", hint="use a precision with more range: fp32")
    num_tokens = np.array(lengths, np.float64)
    return {name: Agreement(found[:, 0], found[:, 1], num_tokens) for name, found in sums.items()}


def batches(lengths: Sequence[int], *, batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices of items of like length, at most `max_tokens` tokens together, and always one item."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or lengths[index] * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _compare(
    whole_TV: np.ndarray[Any, np.dtype[np.float32]], other_TV: np.ndarray[Any, np.dtype[np.float32]]
) -> tuple[int, float]:
    """On how many tokens the likeliest token is the same, and the sum of KL(whole || other) over tokens, in nats."""
    same = int((whole_TV.argmax(-1) == other_TV.argmax(-1)).sum())
    total = 0.0
    size = max(1, _COMPARED_VALUES // whole_TV.shape[1])
    for start in range(0, len(whole_TV), size):
        whole, other = (part[start : start + size].astype(np.float64) for part in (whole_TV, other_TV))
        ratio = np.zeros_like(whole)
        np.subtract(whole, other, out=ratio, where=whole != -np.inf)  # what the whole model rules out adds nothing
        total += float(np.maximum((np.exp(whole) * ratio).sum(-1), 0.0).sum())  # below zero only by rounding
    return same, total
