"""The same conversation in torch and under onnxruntime, and what an interruption leaves behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.conftest import Bundle, MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import TinyModel
from voidprune.execution.generation import Conversation, Responses
from voidprune.execution.reference import scheduled
from voidprune.execution.reference_conversation import ReferenceConversation
from voidprune.execution.sampling import Sampling
from voidprune.quality.parity import TOLERANCE
from voidprune.schedule import Boundary


@pytest.fixture(params=Boundary)
def bundle(llama: TinyModel, make_bundle: MakeBundle, request: pytest.FixtureRequest) -> Bundle:
    return make_bundle(llama, mixed(llama, boundary=request.param))


def respond(conversation: Conversation, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in Responses(conversation, prompts, max_new_tokens=6, sampling=Sampling(1.0, seed=5)):
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("lengths", [[1], [5], [6, 2, 1]])
def test_responses_are_those_of_the_session(llama: TinyModel, bundle: Bundle, lengths: list[int]) -> None:
    prompts = random_prompts(llama, lengths)
    there = bundle.session.start(len(prompts), max_positions=20)
    with scheduled(llama.model, bundle.schedule) as model:
        here = ReferenceConversation(model, len(prompts), max_positions=20)
        assert respond(here, prompts) == respond(there, prompts)
        assert here.tokens == there.tokens


def test_turns_and_rewinding_are_those_of_the_session(llama: TinyModel, bundle: Bundle) -> None:
    first, second, third = random_prompts(llama, [5, 3, 1])
    there = bundle.session.start(max_positions=40)
    with scheduled(llama.model, bundle.schedule) as model:
        here = ReferenceConversation(model, max_positions=40)
        for prompt, length in ((first, 7), (second, 4), (third, 0), (second, 99), (third, 99)):
            assert respond(here, [prompt]) == respond(there, [prompt])
            here.rewind(length)
            there.rewind(length)
            assert here.tokens == there.tokens


def test_an_interrupted_step_leaves_the_conversation_as_it_was(llama: TinyModel, bundle: Bundle) -> None:
    """The interruption comes from within the model, when half of the layers have written their keys and values."""
    first, second = random_prompts(llama, [5, 3])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with scheduled(llama.model, bundle.schedule) as model:
        for turns in ([], [first]):
            undisturbed, disturbed = (ReferenceConversation(model, max_positions=40) for _ in range(2))
            for prompt in turns:
                undisturbed.prefill([prompt])
                disturbed.prefill([prompt])
            handle = llama.model.model.layers[3].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                disturbed.prefill([second])
            handle.remove()
            assert disturbed.tokens == undisturbed.tokens
            expected, found = (conversation.prefill([second]) for conversation in (undisturbed, disturbed))
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
