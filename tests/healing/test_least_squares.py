"""Sums instead of tokens: the same weights, the same errors, and the ridge that other tokens ask for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voidprune.healing.least_squares import Fit, NormalEquations, fit_weights


def tokens(seed: int, *, num_tokens: int = 400, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets that are linear in them but for noise, and the weights."""
    random = torch.Generator().manual_seed(seed)
    weights_FH = torch.randn(8, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    features_NF = torch.randn(num_tokens, 8, generator=random, dtype=torch.float64)
    noise_NH = torch.randn(num_tokens, 3, generator=random, dtype=torch.float64)
    return features_NF, features_NF @ weights_FH + noise * noise_NH, weights_FH


def sums(features_NF: Tensor, targets_NH: Tensor, *, piece: int = 1000) -> NormalEquations:
    found = NormalEquations(features_NF.shape[1], targets_NH.shape[1])
    for start in range(0, len(features_NF), piece):
        found.add(features_NF[start : start + piece], targets_NH[start : start + piece])
    return found


def test_it_is_the_least_squares_solution() -> None:
    features_NF, targets_NH, _ = tokens(1, noise=0.5)
    held_out = tokens(2, noise=0.5)
    fit = fit_weights(sums(features_NF, targets_NH, piece=7), sums(*held_out[:2]), torch.zeros(8, 3), ridges=(1e-12,))
    expected_FH = torch.linalg.lstsq(features_NF, targets_NH).solution
    torch.testing.assert_close(fit.weights_FH, expected_FH)
    direct = (held_out[1] - held_out[0] @ expected_FH).square().sum()
    assert fit.error == pytest.approx(float(direct))
    assert fit.start_error == pytest.approx(float(held_out[1].square().sum()))


def test_the_ridge_draws_to_the_start_and_held_out_tokens_choose_it() -> None:
    """With fewer tokens than features and much noise, a strong ridge is best; with many and none, the weakest."""
    few, clean = tokens(3, num_tokens=6, noise=3.0), tokens(4)
    truth_FH = clean[2]
    held_out = sums(*clean[:2])
    near_FH = truth_FH + 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cautious = fit_weights(sums(*few[:2]), held_out, near_FH)
    assert cautious.ridge is None or cautious.ridge >= 1e-2
    bold = fit_weights(sums(*tokens(5)[:2]), held_out, near_FH)
    assert bold.ridge == 1e-6
    assert bold.error < cautious.error <= cautious.start_error


def test_what_is_right_already_stays() -> None:
    features_NF, targets_NH, weights_FH = tokens(6)
    fit = fit_weights(sums(features_NF, targets_NH), sums(*tokens(7)[:2]), weights_FH)
    assert isinstance(fit, Fit)
    assert fit.error == fit.start_error
    assert fit.ridge is None
    assert torch.equal(fit.weights_FH, weights_FH)


def test_nothing_to_fit_by_changes_nothing() -> None:
    _, _, weights_FH = tokens(8)
    assert fit_weights(NormalEquations(8, 3), NormalEquations(8, 3), weights_FH).ridge is None
