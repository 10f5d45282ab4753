"""How a student is to be trained. Pure values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from voidprune.errors import HealingError
from voidprune.healing.losses import DistillLoss


class Parameters(StrEnum):
    """What is trained: low-rank changes of the layers' matrices, or all weights of the layers."""

    LORA = "lora"
    FULL = "full"


PASS_TOKENS = 8192
PASS_LOGITS = 2**28
"""A GiB in float32; the loss and its gradients need about six of them at a time."""

LEARNING_RATES = {Parameters.LORA: 0.8, Parameters.FULL: 0.15}
"""Peak learning rate times hidden size: at a width of 4096, 2e-4 and 3.7e-5, as is usual. Tuned on the demo model, of width 128."""


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained. Raises HealingError where a value makes no sense.

    - `parameters`: "lora" (`rank`, `alpha`, all linear maps of the layers, merged at the end) or "full" (all weights of the
      layers, in float32 while they are trained; with `embeddings` those and the head, too).
    - `learning_rate`: the peak; by default a number over the hidden size, LEARNING_RATES, because the best step of Adam shrinks
      with the width (arXiv 2203.03466). It rises over the share `warmup` of `steps`, then falls along a cosine to zero.
    - `batch_size`: samples a step, over all processes. They go through the models in passes of at most `max_pass_tokens`, padding
      counted (by default PASS_TOKENS, or less where the vocabulary is large): gradients add up over as many passes as that takes.
    - Every `evaluate_every` steps, and at the end, the loss of the held-out samples (a share `held_out` of all) is measured and the
      state is written. Training ends early once `patience` measurements in a row were no better than the best one, or after
      `max_minutes` of training; the learning rate follows the steps, so whoever limits minutes limits `steps` to what they hold.
    - `precision`: "fp32", or "bf16" for autocast. `checkpointing` saves memory, not time: layers run again for their gradients.
    - `phase_blind`: a control. The student is trained as if both phases ran all of its layers whole, and measured under its
      schedule.
    """

    parameters: Parameters = Parameters.LORA
    rank: int = 32
    alpha: int = 32
    embeddings: bool = False
    learning_rate: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_gradient: float = 1.0
    steps: int = 1000
    batch_size: int = 32
    max_pass_tokens: int | None = None
    evaluate_every: int = 100
    patience: int = 5
    held_out: float = 0.05
    loss: DistillLoss = field(default_factory=DistillLoss)
    precision: str = "fp32"
    checkpointing: bool = False
    phase_blind: bool = False
    max_minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", Parameters(self.parameters))
        for name in ("rank", "alpha", "steps", "batch_size", "max_pass_tokens", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HealingError(f"{name} is {value}", hint="give a number from 1 up")
        for name in ("learning_rate", "max_gradient", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise HealingError(f"{name} is {value:g}", hint="give a number above 0")
        if not 0 <= self.warmup < 1 or not 0 < self.held_out < 1 or not self.weight_decay >= 0:
            raise HealingError(
                f"warm-up {self.warmup:g}, held-out share {self.held_out:g} or weight decay {self.weight_decay:g} is out of range",
                hint="give shares from 0 to 1, and a weight decay from 0 up",
            )
        if self.embeddings and self.parameters is Parameters.LORA:
            raise HealingError(
                "embeddings are not trained by adapters", hint="train full parameters, or the layers alone"
            )
        if self.precision not in ("fp32", "bf16"):
            raise HealingError(f"training in {self.precision} is not offered", hint="use fp32 or bf16")

    def learning_rate_at(self, step: int, *, hidden_size: int) -> float:
        """The learning rate of a step (0-based)."""
        peak = self.learning_rate or LEARNING_RATES[self.parameters] / hidden_size
        warmup_steps = round(self.warmup * self.steps)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (self.steps - warmup_steps)))

    def pass_tokens(self, *, vocab_size: int) -> int:
        """Tokens that go through the models together."""
        return self.max_pass_tokens or max(1, min(PASS_TOKENS, PASS_LOGITS // vocab_size))

    def to_document(self) -> dict[str, Any]:
        return asdict(self)
