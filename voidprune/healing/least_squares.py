"""Linear least squares from sums over tokens that never have to be in memory together, with a ridge chosen on other tokens.

Shapes: N tokens, F features, H outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths that are tried, as multiples of the mean square of a feature."""


class NormalEquations:
    """The sums that a least-squares fit of targets by features needs, in float64 whatever goes in: F x F and F x H numbers."""

    def __init__(self, num_features: int, num_outputs: int, *, device: torch.device | str = "cpu") -> None:
        self.gram_FF = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross_FH = torch.zeros(num_features, num_outputs, dtype=torch.float64, device=device)
        self.square = 0.0
        self.num_tokens = 0

    @property
    def device(self) -> torch.device:
        return self.gram_FF.device

    def add(self, features_NF: Tensor, targets_NH: Tensor) -> None:
        features_NF, targets_NH = features_NF.to(self.gram_FF), targets_NH.to(self.gram_FF)
        self.gram_FF.addmm_(features_NF.mT, features_NF)
        self.cross_FH.addmm_(features_NF.mT, targets_NH)
        self.square += float(targets_NH.square().sum())
        self.num_tokens += len(features_NF)

    def error(self, weights_FH: Tensor) -> float:
        """Sum of squares of targets - features @ weights, over all tokens."""
        explained = (weights_FH * (2 * self.cross_FH - self.gram_FF @ weights_FH)).sum()
        return max(self.square - float(explained), 0.0)


@dataclass(frozen=True)
class Fit:
    """Weights, [F, H] in float64, and what they leave on held-out tokens, as a sum of squares, beside the start's.

    `ridge` is None where no fit was better than the start, which `weights_FH` then is.
    """

    weights_FH: Tensor
    ridge: float | None
    error: float
    start_error: float


def fit_weights(
    fitting: NormalEquations, held_out: NormalEquations, start_FH: Tensor, *, ridges: Sequence[float] = RIDGES
) -> Fit:
    """The least-squares weights, drawn towards `start_FH` by the ridge that leaves least on the held-out tokens.

    Minimises |targets - features W|^2 + ridge * mean(diag(gram)) * |W - start|^2.
    """
    start_FH = start_FH.to(fitting.gram_FF)
    start_error = held_out.error(start_FH)
    best = Fit(start_FH, None, start_error, start_error)
    scale = fitting.gram_FF.diagonal().mean()
    if not scale > 0:
        return best
    gradient_FH = fitting.cross_FH - fitting.gram_FF @ start_FH
    for ridge in ridges:
        system_FF = fitting.gram_FF.clone()
        system_FF.diagonal().add_(ridge * scale)
        factor_FF, failed = torch.linalg.cholesky_ex(system_FF)
        if failed:
            continue
        weights_FH = start_FH + torch.cholesky_solve(gradient_FH, factor_FF)
        error = held_out.error(weights_FH)
        if error < best.error:
            best = Fit(weights_FH, ridge, error, start_error)
    return best
