"""How far a student is from its teacher, token by token.

Shapes: N tokens, V vocabulary, H hidden size. Everything is computed in float32, whatever the models run in.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from voidprune.errors import HealingError


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says at N tokens: logits, and the state that its head read."""

    logits_NV: Tensor
    hidden_NH: Tensor


@dataclass(frozen=True)
class DistillLoss:
    """KL(teacher || student) of the next token, with two optional terms beside it.

    `temperature` softens both distributions, and the divergence is multiplied by its square, so that gradients keep their size
    (Hinton et al., arXiv 1503.02531, section 2). With `top_k`, the teacher's distribution is its k likeliest tokens, renormalized;
    the student's stays whole, so that the smallest loss is still that of the same distribution. `hidden_weight`: of the cosine
    distance between the states that the heads read. `label_weight`: of the cross-entropy of the response's own tokens.
    `prompt_weight`: what a token of the prompt counts beside one of the response; the labels are those of responses only.
    """

    temperature: float = 1.0
    top_k: int | None = None
    hidden_weight: float = 0.0
    label_weight: float = 0.0
    prompt_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise HealingError(f"a temperature of {self.temperature:g} is not above 0", hint="give 1, or up to 4 or so")
        if self.top_k is not None and self.top_k < 1:
            raise HealingError(f"the {self.top_k} likeliest tokens are none", hint="give a number from 1 up")
        for name in ("hidden_weight", "label_weight", "prompt_weight"):
            if not getattr(self, name) >= 0:
                raise HealingError(f"{name} is {getattr(self, name):g}, below 0", hint="give 0 to leave the term out")

    def per_token(self, student: Prediction, teacher: Prediction, labels_N: Tensor, is_labelled_N: Tensor) -> Tensor:
        """The loss of each token, [N]. `labels_N` counts where `is_labelled_N`."""
        loss_N = divergence(student.logits_NV, teacher.logits_NV, temperature=self.temperature, top_k=self.top_k)
        if self.hidden_weight:
            cosine_N = functional.cosine_similarity(student.hidden_NH.float(), teacher.hidden_NH.float(), dim=-1)
            loss_N = loss_N + self.hidden_weight * (1 - cosine_N)
        if self.label_weight:
            surprise_N = functional.cross_entropy(student.logits_NV.float(), labels_N, reduction="none")
            loss_N = loss_N + self.label_weight * is_labelled_N * surprise_N
        return loss_N


def divergence(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """KL(teacher || student) of the distributions that logits say, in nats times `temperature` squared, [N]."""
    student_NV = (student_NV.float() / temperature).log_softmax(-1)
    teacher_NV = teacher_NV.float() / temperature
    if top_k is not None and top_k < teacher_NV.shape[-1]:
        teacher_NV, chosen_NK = teacher_NV.topk(top_k, dim=-1)
        student_NV = student_NV.gather(-1, chosen_NK)
    teacher_NV = teacher_NV.log_softmax(-1)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1) * temperature**2
