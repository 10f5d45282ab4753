"""What a search minimises, against the reference and against plain generation; and nothing asked of the model twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.execution.test_rescoring import make_samples, reference_nll
from tests.tiny_models import TinyModel
from voidprune.errors import DatasetError
from voidprune.execution.reference import scheduled
from voidprune.execution.rescoring import Likelihoods, Rescorer
from voidprune.journal import Journal
from voidprune.planning.budgets import Budget
from voidprune.planning.objectives import (
    TIE_BREAK,
    Grader,
    Grades,
    LossObjective,
    TaskObjective,
    describe_effect,
    group_samples,
)
from voidprune.planning.search import Search, search_schedule
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule, dropped_schedule, full_schedule

GROUPS = ("easy", "hard", "easy", "easy", "hard")


def grouped(source: TinyModel, *, answer: str | None = None) -> list[Sample]:
    return [
        Sample(sample.prompt, sample.response, answer, group, sample.place)
        for sample, group in zip(make_samples(source), GROUPS, strict=True)
    ]


def test_groups_count_the_same_however_long_they_are() -> None:
    likelihoods = Likelihoods(np.array([1.0, 8.0, 5.0]), np.array([1, 4, 2]), np.array([True, True, False]))
    grades = Grades(likelihoods, np.array([True, False, False]))
    groups = {"one": [0, 2], "other": [1]}
    assert grades.loss(groups) == pytest.approx((6 / 3 + 8 / 4) / 2)
    assert grades.error(groups) == pytest.approx((1 / 2 + 1) / 2)
    assert group_samples([Sample((1,), (2,), None, group, "") for group in "aba"]) == {"a": [0, 2], "b": [1]}


def test_the_loss_is_the_reference_s(llama: TinyModel) -> None:
    samples = grouped(llama)
    objective = LossObjective(Rescorer(llama.model, samples, full_schedule(llama.identity)))
    schedule = dropped_schedule(llama.identity, [1, 4])
    nll = reference_nll(llama, samples, schedule)
    easy = (nll[0] + nll[2] + nll[3]) / (5 + 4 + 6)
    hard = (nll[1] + nll[4]) / (1 + 2)
    assert objective.value(schedule) == pytest.approx((easy + hard) / 2, rel=1e-5)


def last_is_even(_sample: Sample, tokens: Sequence[int]) -> bool:
    return bool(tokens) and tokens[-1] % 2 == 0


@pytest.mark.parametrize("dropped", [[], [2], [0, 3]])
def test_grades_are_those_of_plain_generation(llama: TinyModel, dropped: list[int]) -> None:
    """Half of the responses are what the whole model says, so that some need no generation."""
    with scheduled(llama.model, full_schedule(llama.identity)) as runner:
        said = runner.generate([sample.prompt for sample in make_samples(llama)], max_new_tokens=4)
    samples = [
        Sample(sample.prompt, tuple(response) if number % 2 else sample.response, "even", group, "here")
        for number, (sample, response, group) in enumerate(zip(make_samples(llama), said, GROUPS, strict=True))
    ]
    rescorer = Rescorer(llama.model, samples, full_schedule(llama.identity))
    grader = Grader(llama.model, rescorer, last_is_even, max_new_tokens=4, end_tokens=(), batch_size=2)
    schedule = dropped_schedule(llama.identity, dropped)
    with scheduled(llama.model, schedule) as runner:
        answers = [runner.generate([sample.prompt], max_new_tokens=4)[0] for sample in samples]
    expected = [last_is_even(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    grades = grader.grade(schedule)
    assert grades.right is not None
    assert grades.right.tolist() == expected
    objective = TaskObjective(rescorer, grader)
    groups = group_samples(samples)
    assert objective.value(schedule) == grades.error(groups) + TIE_BREAK * grades.loss(groups)


def test_items_without_answers_cannot_be_graded(llama: TinyModel) -> None:
    rescorer = Rescorer(llama.model, grouped(llama), full_schedule(llama.identity))
    with pytest.raises(DatasetError, match="sample 0 has no answer to check"):
        Grader(llama.model, rescorer, last_is_even, max_new_tokens=4, end_tokens=())


def test_effects_tell_apart_what_differs_in_the_stream_and_nothing_else(llama: TinyModel) -> None:
    plain = dropped_schedule(llama.identity, [2])
    writing = tuple(LayerAction.KV_ONLY if layer == 2 else action for layer, action in enumerate(plain.prefill))
    assert (
        describe_effect(plain) == describe_effect(Schedule(llama.identity, writing, writing)) == "decode ff-fff ff-fff"
    )
    others = [dropped_schedule(llama.identity, [layer]) for layer in range(6)]
    assert len({describe_effect(schedule) for schedule in others}) == 6


class Counting(Rescorer):
    """A rescorer that counts how often the model is run, and how often something is measured."""

    num_runs = 0
    num_measured = 0

    def _run(self, schedule: Schedule, start: int, *, keep_states: bool) -> Likelihoods:
        self.num_runs += 1
        return super()._run(schedule, start, keep_states=keep_states)

    def measure(self, schedule: Schedule) -> Likelihoods:
        self.num_measured += 1
        return super().measure(schedule)


def search(llama: TinyModel, journal: Journal | None) -> tuple[Schedule, float, int]:
    rescorer = Counting(llama.model, grouped(llama), full_schedule(llama.identity))
    objective = LossObjective(rescorer, journal=journal)
    found = search_schedule(
        Search(objective, Budget(keep_prefill=0.5, keep_decode=0.7)), rescorer.base, max_evaluations=30
    )
    assert rescorer.num_measured or rescorer.num_runs == 1, "nothing but the whole model, to begin with"
    return found.schedule, found.value, rescorer.num_measured


def test_a_search_that_is_resumed_asks_the_model_nothing_again(llama: TinyModel, tmp_path: Path) -> None:
    output = tmp_path / "schedule.json"
    plain = search(llama, None)
    with Journal(output, key={"run": 1}) as journal:
        first = search(llama, journal)
    assert first == plain
    with Journal(output, key={"run": 1}) as journal:
        again = search(llama, journal)
    assert again == (plain[0], plain[1], 0)


@pytest.mark.parametrize("num_lines", [2, 9, 20])
def test_a_search_that_was_killed_goes_on_to_the_same_end(llama: TinyModel, tmp_path: Path, num_lines: int) -> None:
    output = tmp_path / "schedule.json"
    with Journal(output, key={"run": 1}) as journal:
        whole = search(llama, journal)
        path = journal.path
    assert path is not None
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:num_lines]) + lines[num_lines][:7])  # torn
    with Journal(output, key={"run": 1}) as journal:
        resumed = search(llama, journal)
    assert resumed == (whole[0], whole[1], whole[2] - (num_lines - 1))
    assert path.read_bytes() == b"".join(lines)
