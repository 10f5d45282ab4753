"""Sampling from logits, each row by dice of its own. numpy only.

A row's dice are thrown from the seed and its prompt alone, so what is sampled depends on neither the batch nor the run, and two
models that give the same logits say the same. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Sampling:
    """Softmax at a temperature, cut to its most likely tokens: at most `top_k` of them, and of what is then left those before
    which at most `top_p` of the probability lies."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"a temperature of {self.temperature:g} is no number above 0")
        if not 0 < self.top_p <= 1:  # NaN is outside, too
            raise ValueError(f"a top-p of {self.top_p:g} is outside of (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"a top-k of {self.top_k} leaves no token")


def row_dice(seed: int, purpose: str, prompt: Sequence[int]) -> np.random.Generator:
    """Random numbers of one row, for one purpose."""
    return np.random.default_rng([seed % 2**64, *purpose.encode(), *prompt])


def draw_scores(logits_BV: Floats, sampling: Sampling, dice: Sequence[np.random.Generator]) -> Floats:
    """Scores whose greatest is a sample: the log-probabilities that are left, plus Gumbel noise (the Gumbel-max trick).

    The tokens that are cut have -inf. Top-p as in the published code of arXiv 2505.14467 (github manishemirani/
    void_in_language_models, generation.py): the token that crosses the border stays.
    """
    with np.errstate(over="ignore"):  # next to 0, a temperature leaves the likeliest token alone
        scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
    noise_BV = np.stack([generator.gumbel(size=logits_BV.shape[-1]) for generator in dice])
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        scaled_BV = _keep_top_k(scaled_BV, sampling.top_k)
    if sampling.top_p < 1:
        scaled_BV = _keep_top_p(scaled_BV, sampling.top_p)
    scores_BV: Floats = scaled_BV + noise_BV
    return scores_BV


def _keep_top_k(scaled_BV: Floats, top_k: int) -> Floats:
    places_BK = np.argpartition(-scaled_BV, top_k - 1, axis=-1)[:, :top_k]
    kept_BV = np.full_like(scaled_BV, -np.inf)
    np.put_along_axis(kept_BV, places_BK, np.take_along_axis(scaled_BV, places_BK, -1), -1)
    return kept_BV


def _keep_top_p(scaled_BV: Floats, top_p: float) -> Floats:
    probabilities_BV = np.exp(scaled_BV) / np.exp(scaled_BV).sum(-1, keepdims=True)
    order_BV = np.argsort(-probabilities_BV, axis=-1, kind="stable")
    ranked_BV = np.take_along_axis(probabilities_BV, order_BV, -1)
    cut_BV = np.zeros_like(order_BV, dtype=bool)
    np.put_along_axis(cut_BV, order_BV, ranked_BV.cumsum(-1) - ranked_BV > top_p, -1)
    return np.where(cut_BV, -np.inf, scaled_BV)
