"""The loop of generation over real bundles: streams, endings, samples, limits that are known before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.conftest import Bundle, MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import TinyModel
from voidprune.errors import ContextLengthError, ModelError
from voidprune.execution.generation import Ending, Responses, common_prefix
from voidprune.execution.sampling import Sampling


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle) -> Bundle:
    return make_bundle(llama, mixed(llama))


def rows_of(responses: Responses) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in responses.prompts]
    for row, token in responses:
        rows[row].append(token)
    return rows


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 12])
@pytest.mark.parametrize("lengths", [[4], [1], [5, 1, 5]])
def test_a_stream_is_generation_token_by_token(
    llama: TinyModel, bundle: Bundle, lengths: Sequence[int], max_new_tokens: int
) -> None:
    prompts = random_prompts(llama, lengths)
    expected = bundle.session.generate(prompts, max_new_tokens=max_new_tokens)
    assert [len(row) for row in expected] == [max_new_tokens] * len(lengths)
    responses = bundle.session.stream(prompts, max_new_tokens=max_new_tokens)
    assert rows_of(responses) == expected
    assert responses.endings == [Ending.LENGTH] * len(lengths)
    for end in expected[0]:
        stopped = bundle.session.stream(prompts, max_new_tokens=max_new_tokens, end_tokens=[end])
        found = rows_of(stopped)
        assert found == bundle.session.generate(prompts, max_new_tokens=max_new_tokens, end_tokens=[end])
        for row, free in enumerate(expected):
            assert found[row] == (free[: free.index(end) + 1] if end in free else free)
            assert stopped.endings[row] == (Ending.END_TOKEN if end in free else Ending.LENGTH)


def test_rows_come_in_turns(llama: TinyModel, bundle: Bundle) -> None:
    stream = bundle.session.stream(random_prompts(llama, [3, 6]), max_new_tokens=3)
    assert [row for row, _ in stream] == [0, 1, 0, 1, 0, 1]


def test_a_row_that_is_stopped_says_no_more_and_the_others_go_on(llama: TinyModel, bundle: Bundle) -> None:
    prompts = random_prompts(llama, [3, 6])
    expected = bundle.session.generate(prompts, max_new_tokens=6)
    stream = bundle.session.stream(prompts, max_new_tokens=6)
    said: list[list[int]] = [[], []]
    for row, token in stream:
        said[row].append(token)
        if row == 0 and len(said[0]) == 2:
            stream.stop(0)
    assert said == [expected[0][:2], expected[1]]
    assert stream.endings == [Ending.STOPPED, Ending.LENGTH]
    alone = bundle.session.stream(prompts, max_new_tokens=6)
    for row, _ in alone:
        alone.stop(row)
    assert alone.conversation.tokens == prompts, "nobody is left, so no step was run"


def test_samples_depend_on_seed_and_prompt_alone(llama: TinyModel, bundle: Bundle) -> None:
    prompts = random_prompts(llama, [3, 6])
    sampling = Sampling(1.5, 0.9, seed=3, top_k=50)
    together = bundle.session.generate(prompts, max_new_tokens=16, sampling=sampling)
    for prompt, response in zip(prompts, together, strict=True):
        assert bundle.session.generate([prompt], max_new_tokens=16, sampling=sampling) == [response]
    assert bundle.session.generate(prompts, max_new_tokens=16, sampling=Sampling(1.5, seed=4)) != together
    greedy = bundle.session.generate(prompts, max_new_tokens=16)
    assert together != greedy
    for certain in (Sampling(5.0, top_k=1), Sampling(1e-4), Sampling(1.0, 1e-6)):
        assert bundle.session.generate(prompts, max_new_tokens=16, sampling=certain) == greedy


def test_a_response_that_would_not_fit_is_refused_before_anything_runs(llama: TinyModel, bundle: Bundle) -> None:
    conversation = bundle.session.start(2, max_positions=10)
    prompts = random_prompts(llama, [2, 6])
    with pytest.raises(ContextLengthError, match="11 tokens do not fit into K/V buffers of 10 positions"):
        Responses(conversation, prompts, max_new_tokens=5)
    with pytest.raises(ModelError, match="a prompt has no tokens"):
        Responses(conversation, [[], [3]], max_new_tokens=5)
    assert conversation.tokens == [[], []]
    list(Responses(conversation, prompts, max_new_tokens=4))
    assert [len(row) for row in conversation.tokens] == [5, 9], "the last token is not processed"
    with pytest.raises(ContextLengthError, match="11 tokens"):
        Responses(conversation, [[5], [5]], max_new_tokens=1)


def test_a_rewound_conversation_goes_on_as_if_nothing_had_been_said(llama: TinyModel, bundle: Bundle) -> None:
    first, second, other = random_prompts(llama, [5, 4, 7])
    conversation = bundle.session.start(max_positions=40)
    (expected,) = rows_of(Responses(conversation, [first], max_new_tokens=6))
    before = conversation.tokens[0].copy()
    assert before == [*first, *expected[:5]]
    (answer,) = rows_of(Responses(conversation, [second], max_new_tokens=6))
    for _ in range(2):
        conversation.rewind(len(before))
        assert rows_of(Responses(conversation, [other], max_new_tokens=6)) != [answer]
        conversation.rewind(len(before))
        assert conversation.tokens == [before]
        assert rows_of(Responses(conversation, [second], max_new_tokens=6)) == [answer]
    conversation.rewind(0)
    assert rows_of(Responses(conversation, [first], max_new_tokens=6)) == [expected]


def test_common_prefix() -> None:
    assert [common_prefix(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 4, 3]), ([5], [6]))] == [
        0,
        2,
        1,
        0,
    ]
