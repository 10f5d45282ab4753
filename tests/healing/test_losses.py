"""The loss is a divergence: zero for the same distribution, and by hand what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from voidprune.errors import HealingError
from voidprune.healing.losses import DistillLoss, Prediction, divergence


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_by_hand() -> None:
    """log 2 * 1/2 of a fair coin: p = (1/2, 1/2), q = (3/4, 1/4)."""
    teacher_NV, student_NV = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert divergence(student_NV, teacher_NV).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_that_of_torch(temperature: float) -> None:
    student_NV, teacher_NV = logits(5, 11), logits(5, 11, seed=1)
    expected_N = torch.nn.functional.kl_div(
        (student_NV.double() / temperature).log_softmax(-1),
        (teacher_NV.double() / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    found_N = divergence(student_NV, teacher_NV, temperature=temperature)
    torch.testing.assert_close(found_N, (expected_N * temperature**2).float(), rtol=1e-5, atol=1e-6)
    assert (found_N > 0.1).all()


@pytest.mark.parametrize("top_k", [None, 3, 11, 50])
def test_divergence_is_least_where_both_say_the_same(top_k: int | None) -> None:
    """Of the k likeliest, that is all of the probability on these, as the teacher divides it."""
    teacher_NV = logits(4, 11)
    kept_NV = torch.full_like(teacher_NV, -1e9)
    chosen_NK = teacher_NV.topk(min(top_k or 11, 11)).indices
    kept_NV.scatter_(-1, chosen_NK, teacher_NV.gather(-1, chosen_NK))
    student_NV = kept_NV.clone().requires_grad_()
    loss_N = divergence(student_NV, teacher_NV, top_k=top_k)
    assert loss_N.abs().max() < 1e-6
    loss_N.sum().backward()
    assert student_NV.grad is not None
    assert student_NV.grad.abs().max() < 1e-6
    assert (divergence(logits(4, 11, seed=2), teacher_NV, top_k=top_k) > 0.1).all()


def test_divergence_of_bfloat16_is_computed_in_float32() -> None:
    student_NV, teacher_NV = logits(5, 11).bfloat16(), logits(5, 11, seed=1).bfloat16()
    found_N = divergence(student_NV, teacher_NV)
    assert found_N.dtype is torch.float32
    assert torch.equal(found_N, divergence(student_NV.float(), teacher_NV.float()))


def test_terms_add_up() -> None:
    student = Prediction(logits(3, 11), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
    teacher = Prediction(logits(3, 11, seed=1), torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    labels_N, is_labelled_N = torch.tensor([4, 5, 6]), torch.tensor([True, False, True])
    plain_N = DistillLoss().per_token(student, teacher, labels_N, is_labelled_N)
    assert torch.equal(plain_N, divergence(student.logits_NV, teacher.logits_NV))
    hidden_N = DistillLoss(hidden_weight=0.5).per_token(student, teacher, labels_N, is_labelled_N)
    torch.testing.assert_close(hidden_N - plain_N, torch.tensor([0.0, 0.5, 1.0]))
    labelled_N = DistillLoss(label_weight=2.0).per_token(student, teacher, labels_N, is_labelled_N)
    surprise_N = -student.logits_NV.log_softmax(-1)[torch.arange(3), labels_N]
    torch.testing.assert_close(labelled_N - plain_N, 2 * surprise_N * torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature of 0 is not above 0"),
        ({"temperature": math.nan}, "temperature of nan"),
        ({"top_k": 0}, "the 0 likeliest tokens"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1"),
        ({"prompt_weight": math.nan}, "prompt_weight is nan"),
    ],
)
def test_losses_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HealingError, match=message):
        DistillLoss(**values)
