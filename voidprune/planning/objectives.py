"""What a search minimises: the loss of calibration responses, or the errors on tasks. These run the model.

Every value is kept by what the schedule does, in memory and in a journal, so that a search that was killed goes through what it
had done in no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from voidprune.errors import DatasetError
from voidprune.execution.reference import scheduled
from voidprune.execution.rescoring import Likelihoods, Rescorer
from voidprune.journal import Journal
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule

TIE_BREAK = 0.01
"""What a nat of loss counts beside the share of errors, so that of two schedules with equal errors the surer one wins."""

IsRight = Callable[[Sample, Sequence[int]], bool]
"""Whether generated tokens answer a sample."""


@dataclass(frozen=True)
class Grades:
    """How the samples fare under a schedule, [N] each: `nll` in nats and its `num_tokens`; `right` where answers were asked for."""

    likelihoods: Likelihoods
    right: np.ndarray[tuple[int], np.dtype[np.bool_]] | None

    def loss(self, groups: Mapping[str, Sequence[int]]) -> float:
        """Nats a token, the mean over groups, so that a group counts the same however long its responses are."""
        nll, num_tokens = self.likelihoods.nll, self.likelihoods.num_tokens
        return float(np.mean([nll[list(group)].sum() / num_tokens[list(group)].sum() for group in groups.values()]))

    def error(self, groups: Mapping[str, Sequence[int]]) -> float:
        """Share of wrong answers, the mean over groups."""
        assert self.right is not None
        return float(np.mean([1 - self.right[list(group)].mean() for group in groups.values()]))


class LossObjective:
    """Mean negative log-likelihood of the responses, nats a token (SLEB, arXiv 2402.09025)."""

    name = "loss"

    def __init__(self, rescorer: Rescorer, *, journal: Journal | None = None) -> None:
        self.rescorer = rescorer
        self.groups = group_samples(rescorer.samples)
        self._values: dict[str, float] = {}
        self._journal = Journal() if journal is None else journal
        self._base = rescorer.base

    def value(self, schedule: Schedule) -> float:
        step = f"{self.name} {describe_effect(schedule)}"
        if step not in self._values:
            known = self._journal.get(step)
            if known is None:
                self.rescorer.rebase(self._base)
                known = self._measure(schedule)
                self._journal.record(step, known)
            self._values[step] = float(known)
        return self._values[step]

    def rebase(self, schedule: Schedule) -> None:
        """From which schedule the next ones differ by little; the model is run under it once one of them has to be measured."""
        self._base = schedule

    def _measure(self, schedule: Schedule) -> float:
        return Grades(self.rescorer.measure(schedule), None).loss(self.groups)


class TaskObjective(LossObjective):
    """Share of wrong answers, the mean over tasks (TALE, arXiv 2510.22767), with a little of the loss to break ties.

    The responses of the samples have to be right answers. One that is still the most likely at every token needs no generation:
    greedy decoding would give just that.
    """

    name = "task"

    def __init__(self, rescorer: Rescorer, grader: Grader, *, journal: Journal | None = None) -> None:
        super().__init__(rescorer, journal=journal)
        self.grader = grader

    def _measure(self, schedule: Schedule) -> float:
        grades = self.grader.grade(schedule)
        return grades.error(self.groups) + TIE_BREAK * grades.loss(self.groups)


class Grader:
    """Answers of a model under a schedule, generated greedily only where the likelihoods do not tell them already."""

    def __init__(
        self,
        model: PreTrainedModel,
        rescorer: Rescorer,
        is_right: IsRight,
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int],
        batch_size: int = 64,
    ) -> None:
        for sample in rescorer.samples:
            if sample.answer is None:
                raise DatasetError(f"{sample.place} has no answer to check", hint='give items with "answer"')
        self.model = model
        self.rescorer = rescorer
        self.max_new_tokens = max_new_tokens
        self.end_tokens = tuple(end_tokens)
        self.batch_size = batch_size
        self._is_right = is_right
        self._response_is_right = np.array(
            [is_right(sample, sample.response or ()) for sample in rescorer.samples], dtype=bool
        )

    def grade(self, schedule: Schedule) -> Grades:
        likelihoods = self.rescorer.measure(schedule)
        samples = self.rescorer.samples
        right = likelihoods.greedy & self._response_is_right
        open_ones = sorted(np.flatnonzero(~likelihoods.greedy), key=lambda index: len(samples[index].prompt))
        with scheduled(self.model, schedule) as runner:
            for start in range(0, len(open_ones), self.batch_size):
                batch = open_ones[start : start + self.batch_size]
                answers = runner.generate(
                    [samples[index].prompt for index in batch],
                    max_new_tokens=self.max_new_tokens,
                    end_tokens=self.end_tokens,
                )
                for index, answer in zip(batch, answers, strict=True):
                    right[index] = self._is_right(samples[index], answer)
        return Grades(likelihoods, right)


def group_samples(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Indices of the samples of each group."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    return groups


def describe_effect(schedule: Schedule) -> str:
    """What a schedule does to the residual stream, a letter a layer and phase; K/V writes change nothing in it."""
    letters = {
        LayerAction.FULL: "f",
        LayerAction.SKIP_MLP: "a",
        LayerAction.SKIP_ATTENTION: "m",
        LayerAction.KV_MLP: "m",
        LayerAction.KV_ONLY: "-",
        LayerAction.SKIP: "-",
    }
    phases = ("".join(letters[action] for action in actions) for actions in (schedule.prefill, schedule.decode))
    return " ".join((str(schedule.boundary), *phases))
