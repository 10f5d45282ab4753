"""Which samples are trained on, which are held out, and which step sees which. No torch.

Everything here is a function of the tokens, a seed and the number of a step: nothing has to be remembered to go on where a run
stopped, and what was trained on can be told from what is evaluated by hashes alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from voidprune.errors import HealingError
from voidprune.profiling.calibration import Sample

_HASH_DIGITS = 16
_POOL = 16
"""Batches whose samples are sorted by length together: enough for little padding, few enough to mix."""


def prompt_hash(prompt: Sequence[int]) -> str:
    """What a prompt is told by: the first 64 bits of the SHA-256 of its token ids, in hexadecimal."""
    content = json.dumps([int(token) for token in prompt]).encode()
    return hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]


def check_disjoint(trained: Collection[str], prompts: Sequence[Sequence[int]], *, what: str) -> None:
    """Raise HealingError where a prompt of `what` is among those that a model was trained on, given by their hashes."""
    trained = frozenset(trained)
    both = sum(prompt_hash(prompt) in trained for prompt in prompts)
    if both:
        raise HealingError(
            f"{both} of the {len(prompts)} prompts of {what} were trained on when this model was healed or rounded",
            hint="evaluate on other items, or heal and round with others",
        )


def hold_out(samples: Sequence[Sample], *, share: float) -> tuple[list[Sample], list[Sample]]:
    """(samples to fit to, samples held out), a matter of a prompt's hash alone: no prompt can be on both sides.

    `share`, in (0, 1), is what is held out in expectation. Raises HealingError where either side would be empty.
    """
    limit = round(share * 16**_HASH_DIGITS)
    sides: tuple[list[Sample], list[Sample]] = [], []
    for sample in samples:
        sides[int(prompt_hash(sample.prompt), 16) < limit].append(sample)
    if not sides[0] or not sides[1]:
        raise HealingError(
            f"{len(samples)} samples are too few to fit to some and hold others out",
            hint="give more with --num-samples or --dataset",
        )
    return sides


def sample_length(sample: Sample) -> int:
    """Tokens that are fed: the last one of a response is not."""
    return len(sample.prompt) + len(sample.response or ()) - 1


@dataclass(frozen=True)
class BatchOrder:
    """Which samples each step sees, by the lengths of all samples.

    Every sample once an epoch, but for a rest that fills no batch; another order every epoch. The samples of a batch are of
    similar length.
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.lengths) // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The samples of a step (0-based), shortest first."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return _epoch_batches(self, epoch)[position]

    def num_tokens(self, steps: range) -> int:
        return sum(self.lengths[index] for step in steps for index in self.indices(step))


@functools.lru_cache(maxsize=2)
def _epoch_batches(order: BatchOrder, epoch: int) -> list[list[int]]:
    rng = random.Random(f"{order.seed}/{epoch}")
    shuffled = list(range(len(order.lengths)))
    rng.shuffle(shuffled)
    batches = []
    for start in range(0, len(shuffled), _POOL * order.batch_size):
        pool = sorted(shuffled[start : start + _POOL * order.batch_size], key=lambda index: order.lengths[index])
        batches += [pool[begin : begin + order.batch_size] for begin in range(0, len(pool), order.batch_size)]
    if len(batches) > order.steps_per_epoch:
        batches.pop()
    rng.shuffle(batches)
    return batches


def cut_passes(indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Samples that go through the model together: rows times the longest stay within `max_tokens`, unless one alone is longer."""
    rows: list[int] = []
    for index in sorted(indices, key=lambda index: (lengths[index], index)):
        if rows and (len(rows) + 1) * lengths[index] > max_tokens:
            yield rows
            rows = []
        rows.append(index)
    if rows:
        yield rows
