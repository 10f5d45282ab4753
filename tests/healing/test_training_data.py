"""What is held out, what was trained on, and what a step sees are functions of the tokens and a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune.errors import HealingError
from voidprune.healing.training_data import (
    BatchOrder,
    check_disjoint,
    cut_passes,
    hold_out,
    prompt_hash,
    sample_length,
)
from voidprune.profiling.calibration import Sample


def make_sample(*prompt: int, response: tuple[int, ...] = (1,)) -> Sample:
    return Sample(prompt, response, None, "default", "here")


SAMPLES = [make_sample(number, number + 1) for number in range(200)]


def test_hash_of_a_prompt_stays_what_it_is() -> None:
    """Folders that were healed hold it."""
    assert prompt_hash((1, 23)) == "0cece80dadc07c46"
    assert prompt_hash([1, 23]) == prompt_hash((1, 23))
    assert len({prompt_hash(prompt) for prompt in ((1, 23), (12, 3), (123,), (23, 1), ())}) == 5


def test_items_that_were_trained_on_are_refused() -> None:
    trained = [prompt_hash(sample.prompt) for sample in SAMPLES]
    check_disjoint(trained, [(0, 2), (1,)], what="other.jsonl")
    with pytest.raises(HealingError, match=r"2 of the 3 prompts of items\.jsonl were trained on") as caught:
        check_disjoint(trained, [(0, 1), (7, 7), (199, 200)], what="items.jsonl")
    assert caught.value.hint == "evaluate on other items, or heal and round with others"


def test_side_of_a_prompt_is_a_matter_of_the_prompt_alone() -> None:
    training, held_out = hold_out(SAMPLES, share=0.2)
    assert 20 <= len(held_out) <= 60
    assert len(training) + len(held_out) == 200
    assert not {sample.prompt for sample in training} & {sample.prompt for sample in held_out}
    assert hold_out(SAMPLES[::-1], share=0.2) == (training[::-1], held_out[::-1])
    fewer = hold_out(SAMPLES[:50], share=0.2)
    assert fewer == ([s for s in training if s in SAMPLES[:50]], [s for s in held_out if s in SAMPLES[:50]])


def test_prompt_that_comes_twice_is_on_one_side() -> None:
    twice = [*SAMPLES, *(make_sample(*sample.prompt, response=(7,)) for sample in SAMPLES)]
    training, held_out = hold_out(twice, share=0.3)
    assert not {sample.prompt for sample in training} & {sample.prompt for sample in held_out}


@pytest.mark.parametrize("samples", [[], SAMPLES[:1]])
def test_too_few_samples_are_refused(samples: list[Sample]) -> None:
    with pytest.raises(HealingError, match=f"{len(samples)} samples are too few"):
        hold_out(samples, share=0.5)


def test_length_is_what_is_fed() -> None:
    assert sample_length(make_sample(1, 2, 3, response=(4, 5))) == 4


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=90),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_every_sample_at_most_once_an_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    order = BatchOrder(tuple(lengths), batch_size, seed)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = [index for step in steps for index in order.indices(step)]
        assert len(seen) == len(set(seen))
        assert len(lengths) - len(seen) < batch_size
        assert all(len(order.indices(step)) == min(batch_size, len(lengths)) for step in steps)
        assert order.num_tokens(steps) == sum(lengths[index] for index in seen)


def test_order_is_a_function_of_seed_and_step() -> None:
    lengths = tuple(range(1, 101))
    one, again, other = (BatchOrder(lengths, 5, seed) for seed in (0, 0, 1))
    assert again.indices(33) == one.indices(33), "whatever was asked before"
    assert [one.indices(step) for step in range(60)] == [again.indices(step) for step in range(60)]
    assert [one.indices(step) for step in range(20)] != [other.indices(step) for step in range(20)]
    assert [one.indices(step) for step in range(20)] != [one.indices(step) for step in range(20, 40)]


def test_samples_of_a_batch_are_of_similar_length() -> None:
    lengths = tuple(1 + (37 * index) % 128 for index in range(128))
    order = BatchOrder(lengths, 8, 0)
    spreads = [max(found) - min(found) for found in ([lengths[i] for i in order.indices(step)] for step in range(16))]
    assert max(spreads) == 7


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), max_tokens=st.integers(1, 200))
def test_passes_hold_all_samples_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    passes = list(cut_passes(range(len(lengths)), lengths, max_tokens=max_tokens))
    assert sorted(index for rows in passes for index in rows) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) == 1 or len(rows) * max(lengths[index] for index in rows) <= max_tokens
