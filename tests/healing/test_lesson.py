"""A lesson is the reference, token by token: what it measures and the gradients it leaves, however rows are cut into passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.healing.students import load_student, make_samples, split_schedule
from tests.strategies import schedules
from tests.tiny_models import TinyModel
from voidprune.execution.reference import decode_mask, scheduled
from voidprune.healing.lesson import Lesson
from voidprune.healing.losses import DistillLoss, divergence
from voidprune.healing.training import checkpointed
from voidprune.models.pretrained import load_model
from voidprune.schedule import Boundary, Schedule, full_schedule

SAMPLES = make_samples(12)
ALL_TERMS = DistillLoss(prompt_weight=0.3, hidden_weight=1.0, label_weight=0.1)


@contextmanager
def lesson_of(
    source: TinyModel,
    student: PreTrainedModel,
    *,
    boundary: Boundary = Boundary.DECODE,
    loss: DistillLoss = DistillLoss(),  # noqa: B008  a frozen value
    max_tokens: int = 10_000,
) -> Iterator[Lesson]:
    with Lesson(
        Accelerator(cpu=True),
        teacher=(load_model(source.folder), full_schedule(source.identity, boundary=boundary)),
        student=student,
        loss=loss,
        max_tokens=max_tokens,
        precision="fp32",
    ) as lesson:
        yield lesson


def slim(schedule: Schedule) -> Schedule:
    return schedule.on_slim_model(replace(schedule.model, num_layers=len(schedule.union)))


def say(model: PreTrainedModel, schedule: Schedule, tokens: tuple[int, ...], *, num_prompt_tokens: int) -> Tensor:
    """Logits of one row, [T, V], without padding."""
    is_decode_BT = torch.tensor([decode_mask(num_prompt_tokens, len(tokens), schedule.boundary)])
    with scheduled(model, schedule) as running:
        return running.forward(torch.tensor([tokens]), is_decode_BT=is_decode_BT)[0]


@settings(max_examples=8)
@given(data=st.data())
def test_measure_is_the_mean_of_each_row_alone(llama: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(llama.identity))
    prompt_weight = data.draw(st.sampled_from([0.0, 0.5]))
    whole = full_schedule(llama.identity, boundary=schedule.boundary)
    total, count = 0.0, 0.0
    for sample in SAMPLES:
        tokens = (*sample.prompt, *(sample.response or ())[:-1])
        student_TV = say(llama.model, schedule, tokens, num_prompt_tokens=len(sample.prompt))
        teacher_TV = say(llama.model, whole, tokens, num_prompt_tokens=len(sample.prompt))
        weights_T = torch.full((len(tokens),), prompt_weight)
        weights_T[len(sample.prompt) - 1 :] = 1.0
        total += float((divergence(student_TV.double(), teacher_TV.double()) * weights_T).sum())
        count += float(weights_T.sum())
    student = load_model(llama.folder)
    loss = DistillLoss(prompt_weight=prompt_weight)
    with lesson_of(llama, student, boundary=schedule.boundary, loss=loss, max_tokens=40) as lesson:
        assert lesson.measure(SAMPLES, schedule) == pytest.approx(total / count, rel=1e-4, abs=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(llama: TinyModel) -> None:
    with lesson_of(llama, load_model(llama.folder), loss=DistillLoss(hidden_weight=1.0)) as lesson:
        assert lesson.measure(SAMPLES, full_schedule(llama.identity)) == pytest.approx(0.0, abs=1e-5)


def gradients(source: TinyModel, folder: Path, *, checkpointing: bool = False, **options: Any) -> dict[str, Tensor]:
    schedule = split_schedule(source)
    student = load_student(source, schedule, folder)
    with lesson_of(source, student, loss=ALL_TERMS, **options) as lesson, lesson.student_under(slim(schedule)):
        if checkpointing:
            with checkpointed(student):
                assert any(module.training for module in student.modules())
                lesson.accumulate_gradients(SAMPLES)
        else:
            lesson.accumulate_gradients(SAMPLES)
    assert not any(module.training for module in student.modules())
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def test_gradients_do_not_depend_on_how_rows_are_cut(llama: TinyModel, tmp_path: Path) -> None:
    together, apart = gradients(llama, tmp_path / "slim"), gradients(llama, tmp_path / "slim", max_tokens=1)
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-3, atol=1e-5)


def test_checkpointed_layers_have_the_same_gradients(family_model: TinyModel, tmp_path: Path) -> None:
    """Layers run again in the backward pass under the hooks of the schedule, and in evaluation mode inside."""
    plain = gradients(family_model, tmp_path / "slim", max_tokens=60)
    again = gradients(family_model, tmp_path / "slim", max_tokens=60, checkpointing=True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(bool(gradient.isfinite().all()) for gradient in plain.values())
    assert sum(float(gradient.abs().max()) > 1e-4 for gradient in plain.values()) > 20


def test_gradients_follow_what_counts(llama: TinyModel, tmp_path: Path) -> None:
    """A finite difference along the gradient; and none where a sublayer runs in neither phase."""
    found = gradients(llama, tmp_path / "slim")
    assert found["model.layers.2.mlp.down_proj.weight"].abs().max() > 1e-4, "the MLP of layer 3 runs in prefill"
    schedule = split_schedule(llama)
    student = load_student(llama, schedule, tmp_path / "slim")
    length = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    step = 1e-3
    with lesson_of(llama, student, loss=ALL_TERMS) as lesson:
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    parameter.add_(sign * step / length * found[name])
            losses.append(lesson.measure(SAMPLES, slim(schedule)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(length), rel=0.02)
