"""What is left out changes nothing: every result is that of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import GetModel
from tests.strategies import schedules
from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.errors import DatasetError
from voidprune.execution import rescoring
from voidprune.execution.reference import scheduled
from voidprune.execution.rescoring import Likelihoods, Rescorer, first_difference
from voidprune.pipeline.models import demo_folder
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Boundary, LayerAction, Schedule, dropped_schedule, full_schedule, satisfy_kv_contract

LENGTHS = ((3, 5), (9, 1), (1, 4), (6, 6), (2, 2))  # of prompts and responses
SHAPES = ("llama", "mistral-window", "qwen2-windows", "llama-biased")


def make_samples(source: TinyModel, lengths: Sequence[tuple[int, int]] = LENGTHS, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = source.checkpoint.architecture.vocab_size

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=generator).tolist())

    return [
        Sample(draw(prompt), draw(response), None, "default", f"sample {number}")
        for number, (prompt, response) in enumerate(lengths)
    ]


def reference_nll(source: TinyModel, samples: Sequence[Sample], schedule: Schedule) -> list[float]:
    with scheduled(source.model, schedule) as runner:
        scores = runner.score([sample.prompt for sample in samples], [sample.response or () for sample in samples])
    return [-float(score.sum()) for score in scores]


def assert_same(found: Likelihoods, expected: Likelihoods) -> None:
    np.testing.assert_allclose(found.nll, expected.nll, atol=2e-4)
    np.testing.assert_array_equal(found.greedy, expected.greedy)
    np.testing.assert_array_equal(found.num_tokens, expected.num_tokens)


def is_clean(source: TinyModel) -> bool:
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in source.model.modules()
    )


# ---- equal to the reference


@settings(max_examples=6)
@given(data=st.data())
def test_measuring_is_scoring_under_the_reference(tiny_model: TinyModel, data: st.DataObject) -> None:
    base = data.draw(schedules(tiny_model.identity))
    schedule = data.draw(schedules(tiny_model.identity, boundary=base.boundary))
    samples = make_samples(tiny_model)
    rescorer = Rescorer(tiny_model.model, samples, base, batch_size=data.draw(st.sampled_from([1, 2, 8])))
    found = rescorer.measure(schedule)
    np.testing.assert_allclose(found.nll, reference_nll(tiny_model, samples, schedule), atol=2e-4, rtol=1e-5)
    assert found.num_tokens.tolist() == [response for _, response in LENGTHS]
    assert is_clean(tiny_model)


@settings(max_examples=10)
@given(data=st.data())
def test_what_is_reused_changes_nothing(llama: TinyModel, data: st.DataObject) -> None:
    """Through a chain of bases, with the states of every layer, of some, of one or of none."""
    boundary = data.draw(st.sampled_from(Boundary))
    chain = data.draw(st.lists(schedules(llama.identity, boundary=boundary), min_size=2, max_size=4))
    # From one to the next only the upper layers change, so that there is something to reuse.
    cut = data.draw(st.integers(0, NUM_LAYERS - 1))
    samples = make_samples(llama)
    rescorer = Rescorer(
        llama.model,
        samples,
        full_schedule(llama.identity, boundary=boundary),
        batch_size=data.draw(st.sampled_from([1, 8])),
        max_cache_bytes=data.draw(st.sampled_from([1, 10_000, 20_000, 40_000, 1 << 30])),
    )
    for base in chain:
        rescorer.rebase(base)
        upper = data.draw(schedules(llama.identity, boundary=boundary))
        for schedule in (base, upper, joined(base, upper, cut)):
            expected = reference_nll(llama, samples, schedule)
            np.testing.assert_allclose(rescorer.measure(schedule).nll, expected, atol=2e-4, rtol=1e-5)
    assert rescorer.base is chain[-1]


def joined(lower: Schedule, upper: Schedule, cut: int) -> Schedule:
    def strip(action: LayerAction) -> LayerAction:
        plain = {LayerAction.KV_ONLY: LayerAction.SKIP, LayerAction.KV_MLP: LayerAction.SKIP_ATTENTION}
        return plain.get(action, action)

    phases = [
        [strip(action) for action in (*one[:cut], *other[cut:])]
        for one, other in ((lower.prefill, upper.prefill), (lower.decode, upper.decode))
    ]
    if not all(any(action.executes for action in phase) for phase in phases):
        return lower
    prefill, decode = satisfy_kv_contract(*phases, single_turn=False)
    return Schedule(lower.model, prefill, decode, boundary=lower.boundary)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("max_cache_bytes", [1, 20_000, 1 << 30])
def test_greedy_steps_of_a_search(get_model: GetModel, name: str, max_cache_bytes: int) -> None:
    source = get_model(name)
    samples = make_samples(source)
    rescorer = Rescorer(source.model, samples, full_schedule(source.identity), max_cache_bytes=max_cache_bytes)
    dropped: list[int] = []
    for layer in (3, 5, 0, 4):
        rescorer.rebase(dropped_schedule(source.identity, dropped))
        dropped.append(layer)
        found = rescorer.measure(dropped_schedule(source.identity, dropped))
        expected = reference_nll(source, samples, dropped_schedule(source.identity, dropped))
        np.testing.assert_allclose(found.nll, expected, atol=2e-4, rtol=1e-5)


def test_states_are_kept_as_far_as_they_fit(llama: TinyModel) -> None:
    samples, whole = make_samples(llama), full_schedule(llama.identity)
    # Rows of 7, 9, 4, 11 and 3 tokens in one batch: 5 x 11 tokens of 64 floats, for each of six layers.
    one_layer = 5 * 11 * 64 * 4
    for limit, kept in ((6 * one_layer, {1, 2, 3, 4, 5}), (3 * one_layer, {2, 4}), (one_layer, set()), (1, set())):
        rescorer = Rescorer(llama.model, samples, whole, max_cache_bytes=limit)
        (batch,) = rescorer._batches
        assert set(batch.states) == kept
        assert sum(state.numel() * 4 for state in batch.states.values()) <= limit


def test_layers_below_the_first_change_and_idle_ones_are_not_run(llama: TinyModel) -> None:
    """What the module is for: counted on the model itself."""
    ran: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(llama.model.model.layers)
    ]
    try:
        rescorer = Rescorer(llama.model, make_samples(llama), dropped_schedule(llama.identity, [4]))
        ran.clear()
        rescorer.measure(dropped_schedule(llama.identity, [3, 4]))
        assert ran == [5]
        ran.clear()
        rescorer.measure(dropped_schedule(llama.identity, [4]))
        assert ran == []
        rescorer.rebase(dropped_schedule(llama.identity, [2, 4]))
        assert ran == [3, 5]
    finally:
        for handle in handles:
            handle.remove()


# ---- greedy


@pytest.mark.parametrize("batch_size", [1, 8])
@settings(max_examples=8)
@given(data=st.data())
def test_greedy_is_what_greedy_generation_reproduces(llama: TinyModel, batch_size: int, data: st.DataObject) -> None:
    schedule = data.draw(schedules(llama.identity))
    prompts = [sample.prompt for sample in make_samples(llama)]
    with scheduled(llama.model, schedule) as runner:
        responses = [tuple(response) for response in runner.generate(prompts, max_new_tokens=4)]
    wrong = data.draw(st.integers(0, 3))
    responses[1] = (*responses[1][:wrong], (responses[1][wrong] + 1) % 101, *responses[1][wrong + 1 :])
    responses[3] = responses[3][:2]
    samples = [
        Sample(prompt, response, None, "default", "here") for prompt, response in zip(prompts, responses, strict=True)
    ]
    whole = full_schedule(llama.identity, boundary=schedule.boundary)
    rescorer = Rescorer(llama.model, samples, whole, batch_size=batch_size)
    assert rescorer.measure(schedule).greedy.tolist() == [True, False, True, True, True]


def test_the_demo_model_says_what_it_is_scored_to_say() -> None:
    source = TinyModel("demo", demo_folder())
    samples = make_samples(source, ((12, 3), (5, 3), (8, 3)))
    for schedule in (full_schedule(source.identity), dropped_schedule(source.identity, [2, 9])):
        with scheduled(source.model, schedule) as runner:
            responses = runner.generate([sample.prompt for sample in samples], max_new_tokens=3)
        told = [
            Sample(sample.prompt, tuple(response), None, "default", "here")
            for sample, response in zip(samples, responses, strict=True)
        ]
        both = Rescorer(source.model, [*told, *samples], full_schedule(source.identity), batch_size=4).measure(schedule)
        assert both.greedy.tolist() == [True, True, True, False, False, False]
        np.testing.assert_allclose(both.nll, reference_nll(source, [*told, *samples], schedule), atol=1e-3, rtol=1e-5)


# ---- the model afterwards


def test_nothing_is_left_on_the_model(llama: TinyModel) -> None:
    tokens_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = llama.model(tokens_BT).logits
    rescorer = Rescorer(llama.model, make_samples(llama), full_schedule(llama.identity))
    rescorer.rebase(dropped_schedule(llama.identity, [1]))
    rescorer.measure(dropped_schedule(llama.identity, [1, 4]))
    assert is_clean(llama)
    with torch.inference_mode():
        assert torch.equal(llama.model(tokens_BT).logits, before)


def test_nothing_is_left_after_an_error_and_the_next_base_is_right(tmp_path: Path) -> None:
    source = build_model("llama", tmp_path / "model")
    samples, whole = make_samples(source), full_schedule(source.identity)
    rescorer = Rescorer(source.model, samples, whole, batch_size=2)
    calls = 0

    def stop(*_args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # in the second batch: the states of the first are new, those of the others are old
            raise RuntimeError("stop")

    schedule = dropped_schedule(source.identity, [2])
    for run in (rescorer.measure, rescorer.rebase):
        calls = 0
        handle = source.model.model.layers[4].mlp.register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            run(schedule)
        handle.remove()
        assert is_clean(source)
    rescorer.rebase(whole)
    expected = reference_nll(source, samples, dropped_schedule(source.identity, [5]))
    found = rescorer.measure(dropped_schedule(source.identity, [5])).nll
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-5)


# ---- bounds


@pytest.mark.parametrize("response", [None, ()])
def test_samples_without_a_response_are_refused(llama: TinyModel, response: tuple[int, ...] | None) -> None:
    sample = Sample((1, 2), response, None, "default", "items.jsonl, line 3")
    with pytest.raises(DatasetError, match=r"items.jsonl, line 3 has no response"):
        Rescorer(llama.model, [sample], full_schedule(llama.identity))


def test_keys_and_values_that_are_only_written_are_no_difference(llama: TinyModel) -> None:
    plain = dropped_schedule(llama.identity, [2])
    actions = tuple(LayerAction.KV_ONLY if layer == 2 else action for layer, action in enumerate(plain.prefill))
    writing = Schedule(llama.identity, actions, actions)
    assert first_difference(plain, writing) == NUM_LAYERS
    assert first_difference(plain, full_schedule(llama.identity)) == 2
    assert rescoring.first_difference(writing, dropped_schedule(llama.identity, [2, 4])) == 4


def test_layers_that_return_tuples_are_bypassed_all_the_same(tmp_path: Path) -> None:
    """As some do under transformers 4; here the stack takes the first of what a layer returns."""
    source = build_model("llama", tmp_path / "model")
    samples = make_samples(source)
    layer = source.model.model.layers[0]
    with rescoring._bypassed(layer, in_tuple=True):
        (state,) = layer(torch.ones(1, 2, 64))
    assert torch.equal(state, torch.ones(1, 2, 64))
    assert is_clean(source)
    assert Rescorer(source.model, samples, full_schedule(source.identity))._in_tuple is False
