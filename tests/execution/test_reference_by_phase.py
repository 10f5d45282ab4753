"""Two models under one schedule: prompts run the one, generated tokens the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.execution.reference import scheduled
from voidprune.execution.reference_by_phase import scheduled_by_phase
from voidprune.models.pretrained import load_model
from voidprune.schedule import Boundary, full_schedule
from voidprune.schedule import LayerAction as A

PROMPTS, RESPONSES = [[5, 6, 7, 8], [9], [10, 11]], [[12, 13, 14], [15], [16, 17]]


def other_model(source: TinyModel) -> PreTrainedModel:
    model = load_model(source.folder)
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 0.5
    return model


@pytest.mark.parametrize("boundary", list(Boundary))
def test_twice_the_same_model_is_that_model(llama: TinyModel, boundary: Boundary) -> None:
    model = load_model(llama.folder)
    full = full_schedule(llama.identity, boundary=boundary)
    schedule = replace(full, prefill=(A.FULL,) * 4 + (A.KV_ONLY,) * (NUM_LAYERS - 4))
    with scheduled(model, schedule) as plain:
        scores = plain.score(PROMPTS, RESPONSES)
        generated = plain.generate(PROMPTS, max_new_tokens=6)
    with scheduled_by_phase(model, load_model(llama.folder), schedule) as phased:
        for found, expected in zip(phased.score(PROMPTS, RESPONSES), scores, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert phased.generate(PROMPTS, max_new_tokens=6) == generated
        assert phased.vocab_size == plain.vocab_size


def test_prompts_run_the_one_and_responses_the_other(llama: TinyModel) -> None:
    first, later = load_model(llama.folder), other_model(llama)
    schedule = full_schedule(llama.identity)
    with scheduled(first, schedule) as of_prefill, scheduled(later, schedule) as of_decode:
        prompt_scores = of_prefill.score([[5, 6, 7]], [[8]])[0]
        token_scores = of_decode.score([[5]], [[8]])[0]
    with scheduled_by_phase(first, later, schedule) as phased:
        longer = phased.score([[5, 6, 7]], [[8, 9]])[0]
        np.testing.assert_allclose(longer[0], prompt_scores[0], atol=1e-5)
        np.testing.assert_allclose(phased.score([[5]], [[8]])[0], token_scores, atol=1e-5)
    with scheduled_by_phase(first, first, schedule) as alike:
        assert abs(alike.score([[5, 6, 7]], [[8, 9]])[0][1] - longer[1]) > 1e-3


def test_a_token_alone_runs_prefill_under_the_boundary_prefill(llama: TinyModel) -> None:
    first, later = load_model(llama.folder), other_model(llama)
    schedule = full_schedule(llama.identity, boundary=Boundary.PREFILL)
    with scheduled(first, schedule) as of_prefill:
        expected = of_prefill.score([[5]], [[8]])[0]
    with scheduled_by_phase(first, later, schedule) as phased:
        np.testing.assert_allclose(phased.score([[5]], [[8]])[0], expected, atol=1e-5)
