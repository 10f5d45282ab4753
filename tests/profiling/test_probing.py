"""Interventions on stock models: what they change, what they leave alone, and the schedules that they are the same as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import GetModel
from tests.tiny_models import NUM_LAYERS, SHAPES, TinyModel
from voidprune.execution.reference import decoder_layers, scheduled
from voidprune.models.families import find_family
from voidprune.profiling.calibration import Sample
from voidprune.profiling.probing import Donation, Intervention, Probe, Scope, find_donations, probed, with_norms_of
from voidprune.schedule import LayerAction, Schedule, full_schedule

PROMPTS = [[5, 9, 33, 60, 7], [8, 3], [70, 12, 90, 41, 6, 88, 17]]
RESPONSES = [[11, 4, 50], [22], [31, 32, 33, 34]]
DONATIONS = {
    (5, 9, 33, 60, 7): Donation(2, (5, 9, 99, 98, 60, 7), 3),
    (70, 12, 90, 41, 6, 88, 17): Donation(4, (1,), 0),
}
SHARED = [
    name for name in sorted(SHAPES) if name in ("llama", "qwen2", "gemma2", "stablelm-parallel", "mistral-window")
]


def probe_of(intervention: Intervention, depth: int, scope: Scope = Scope.PROMPT, seed: int = 0) -> Probe:
    return Probe(intervention, depth, scope, seed, DONATIONS)


def upper_layers(tiny: TinyModel, depth: int, prefill: LayerAction, decode: LayerAction) -> Schedule:
    whole = full_schedule(tiny.identity)
    return Schedule(
        tiny.identity,
        whole.prefill[:depth] + (prefill,) * (NUM_LAYERS - depth),
        whole.decode[:depth] + (decode,) * (NUM_LAYERS - depth),
    )


@contextmanager
def entering_states(tiny: TinyModel, layer: int) -> Iterator[list[Tensor]]:
    """What enters a layer, pass by pass, after the hooks that are there already."""
    seen: list[Tensor] = []
    module = decoder_layers(tiny.model, find_family(tiny.model.config.to_dict()).modules)[layer]

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def changed_states(tiny: TinyModel, intervention: Intervention, depth: int, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """The states that enter layer `depth` without and with an intervention there, [T, D]."""
    with probed(tiny.model, probe_of(intervention, depth)) as runner, entering_states(tiny, depth) as seen:
        runner.score([prompt], [[1]])
        after = seen[-1][0]
    with entering_states(tiny, depth) as seen, torch.inference_mode():
        tiny.model(input_ids=torch.tensor([prompt]), use_cache=False)
    return seen[-1][0], after


# ---- identities


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("intervention", Intervention)
def test_at_full_depth_it_is_bitwise_the_whole_model(
    llama: TinyModel, intervention: Intervention, scope: Scope
) -> None:
    prompt, response = [70, 12, 90, 41, 6, 88, 17], [31, 32, 33]
    with torch.inference_mode():
        logits = tiny_logits(llama, [*prompt, *response[:-1]], num_logits=3)
    with probed(llama.model, probe_of(intervention, NUM_LAYERS, scope)) as runner:
        (found,) = runner.predict([prompt], [response])
        stock = llama.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=6,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert runner.generate([prompt], max_new_tokens=6) == [stock[0, len(prompt) :].tolist()]
    assert torch.equal(torch.from_numpy(found), logits.log_softmax(-1))


def tiny_logits(tiny: TinyModel, tokens: list[int], *, num_logits: int = 0) -> Tensor:
    ids = torch.tensor([tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": num_logits}
    return tiny.model(**inputs, use_cache=False).logits[0]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("depth", [1, 3, NUM_LAYERS - 1])
def test_freeze_in_the_prompt_is_kv_only_in_prefill(get_model: GetModel, name: str, depth: int) -> None:
    tiny = get_model(name)
    schedule = upper_layers(tiny, depth, LayerAction.KV_ONLY, LayerAction.FULL)
    with probed(tiny.model, probe_of(Intervention.FREEZE, depth)) as frozen:
        found = frozen.predict(PROMPTS, RESPONSES), frozen.generate(PROMPTS, max_new_tokens=6)
    with scheduled(tiny.model, schedule) as runner:
        expected = runner.predict(PROMPTS, RESPONSES), runner.generate(PROMPTS, max_new_tokens=6)
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("depth", [0, 3])
def test_skip_attention_is_the_schedule_of_its_name(get_model: GetModel, name: str, scope: Scope, depth: int) -> None:
    tiny = get_model(name)
    schedule = upper_layers(tiny, depth, LayerAction.SKIP_ATTENTION, LayerAction.SKIP_ATTENTION)
    with probed(tiny.model, probe_of(Intervention.SKIP_ATTENTION, depth, scope)) as skipping:
        found = skipping.predict(PROMPTS, RESPONSES), skipping.generate(PROMPTS, max_new_tokens=6)
    with scheduled(tiny.model, schedule) as runner:
        expected = runner.predict(PROMPTS, RESPONSES), runner.generate(PROMPTS, max_new_tokens=6)
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert found[1] == expected[1]


def test_a_freeze_at_the_last_layer_changes_nothing(llama: TinyModel) -> None:
    """What earlier tokens become behind the last layer is not read by anyone."""
    with probed(llama.model, probe_of(Intervention.FREEZE, NUM_LAYERS - 1, Scope.PUBLISHED)) as frozen:
        found = frozen.predict(PROMPTS, RESPONSES)
    with probed(llama.model, probe_of(Intervention.FREEZE, NUM_LAYERS)) as whole:
        for one, other in zip(found, whole.predict(PROMPTS, RESPONSES), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


# ---- what is changed


@pytest.mark.parametrize("depth", [0, 3])
def test_random_keeps_norms_and_nothing_else(llama: TinyModel, depth: int) -> None:
    before, after = changed_states(llama, Intervention.RANDOM, depth, PROMPTS[2])
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5, atol=0)
    assert torch.equal(after[-1], before[-1])
    cosines = torch.cosine_similarity(before[:-1], after[:-1], dim=-1)
    assert cosines.abs().max() < 0.6


def test_norms_of_half_precision_do_not_overflow() -> None:
    states = torch.full((1, 1, 1024), 3000.0, dtype=torch.float16)
    found = with_norms_of(states, torch.eye(1, 1024).unsqueeze(0) + 1)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float().norm(), states.float().norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("depth", [0, 3])
def test_shuffle_is_a_permutation_of_each_token_s_own(llama: TinyModel, depth: int) -> None:
    before, after = changed_states(llama, Intervention.SHUFFLE, depth, PROMPTS[2])
    assert torch.equal(after.sort(dim=-1).values, before.sort(dim=-1).values)
    assert torch.equal(after[-1], before[-1])
    assert not (after[:-1] == before[:-1]).all(dim=-1).any()


@pytest.mark.parametrize("depth", [0, 3])
def test_switch_changes_one_position_to_the_donor_s_state(llama: TinyModel, depth: int) -> None:
    before, after = changed_states(llama, Intervention.SWITCH, depth, PROMPTS[0])
    donation = DONATIONS[tuple(PROMPTS[0])]
    assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    with entering_states(llama, depth) as seen, torch.inference_mode():
        llama.model(input_ids=torch.tensor([donation.donor]), use_cache=False)
    torch.testing.assert_close(after[2], seen[0][0, donation.donor_position], rtol=1e-4, atol=1e-5)


def test_a_prompt_without_a_donation_is_not_switched(llama: TinyModel) -> None:
    before, after = changed_states(llama, Intervention.SWITCH, 2, PROMPTS[1])
    assert torch.equal(before, after)


def test_a_freeze_shows_every_upper_layer_the_same_earlier_states(llama: TinyModel) -> None:
    with (
        probed(llama.model, probe_of(Intervention.FREEZE, 2)) as runner,
        entering_states(llama, 2) as at_depth,
        entering_states(llama, 5) as above,
    ):
        runner.score([PROMPTS[0]], [[1]])
    assert torch.equal(at_depth[0][0, :-1], above[0][0, :-1])
    assert not torch.equal(at_depth[0][0, -1], above[0][0, -1])


def test_what_is_below_the_depth_is_as_ever(llama: TinyModel) -> None:
    with probed(llama.model, probe_of(Intervention.RANDOM, 3)) as runner, entering_states(llama, 2) as seen:
        runner.score([PROMPTS[0]], [[1]])
    with entering_states(llama, 2) as stock, torch.inference_mode():
        tiny_logits(llama, PROMPTS[0])
    assert torch.equal(seen[0], stock[0])


# ---- the published scope


@pytest.mark.parametrize("intervention", [one for one in Intervention if one.has_scope])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_published_scope_is_that_of_running_all_tokens_again(
    get_model: GetModel, name: str, intervention: Intervention
) -> None:
    """For every new token one pass over all that is before it, without a cache: each is the first token of a longer prompt."""
    tiny, prompt = get_model(name), PROMPTS[2]
    probe = probe_of(intervention, 2, Scope.PUBLISHED)
    with probed(tiny.model, probe) as runner:
        (generated,) = runner.generate([prompt], max_new_tokens=5)
        (scored,) = runner.predict([prompt], [generated])
        slow = []
        for length in range(len(generated)):
            runner._begin([prompt], len(generated))  # what is drawn is drawn for the prompt
            ids = torch.tensor([[*prompt, *generated[:length]]])
            flags = [True] * (ids.shape[1] - 1) + [False]
            slow.append(runner._forward(ids, torch.ones_like(ids), flags, cache=None, num_logits=1)[0, 0])
    expected = torch.stack(slow)
    np.testing.assert_allclose(scored, expected.log_softmax(-1).numpy(), atol=2e-4)
    assert expected.argmax(-1).tolist() == generated


def test_the_scopes_differ_behind_the_first_token(llama: TinyModel) -> None:
    found = []
    for scope in Scope:
        with probed(llama.model, probe_of(Intervention.RANDOM, 1, scope)) as runner:
            found.append(runner.predict([PROMPTS[2]], [[31, 32, 33]])[0])
    np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-4)
    assert np.abs(found[0][2] - found[1][2]).max() > 1e-2


def test_a_prompt_of_one_token_has_no_earlier_ones(llama: TinyModel) -> None:
    with probed(llama.model, probe_of(Intervention.RANDOM, 1, Scope.PUBLISHED)) as runner:
        first, second = runner.generate([[7], [8, 9]], max_new_tokens=3)
        assert (len(first), len(second)) == (3, 3)
    with probed(llama.model, probe_of(Intervention.RANDOM, NUM_LAYERS)) as whole:
        assert whole.generate([[7]], max_new_tokens=1)[0] == first[:1]


# ---- batches, seeds, hooks


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("intervention", Intervention)
def test_a_batch_changes_nothing(llama: TinyModel, intervention: Intervention, scope: Scope) -> None:
    with probed(llama.model, probe_of(intervention, 2, scope)) as runner:
        together = runner.predict(PROMPTS, RESPONSES)
        answers = runner.generate(PROMPTS, max_new_tokens=4)
        for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            np.testing.assert_allclose(runner.predict([prompt], [response])[0], together[index], atol=2e-4)
            assert runner.generate([prompt], max_new_tokens=4)[0] == answers[index]


@pytest.mark.parametrize("intervention", [Intervention.RANDOM, Intervention.SHUFFLE])
def test_a_seed_is_a_draw(llama: TinyModel, intervention: Intervention) -> None:
    found = []
    for seed in (0, 0, 1):
        with probed(llama.model, probe_of(intervention, 2, seed=seed)) as runner:
            found.append(runner.score(PROMPTS, RESPONSES)[0])
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


@pytest.mark.parametrize("scope", Scope)
def test_judge_knows_what_would_be_generated(llama: TinyModel, scope: Scope) -> None:
    with probed(llama.model, probe_of(Intervention.SHUFFLE, 3, scope)) as runner:
        generated = runner.generate(PROMPTS, max_new_tokens=4)
        assert [greedy for _, greedy in runner.judge(PROMPTS, generated)] == [True] * 3
        generated[1][2] = (generated[1][2] + 1) % 101
        assert [greedy for _, greedy in runner.judge(PROMPTS, generated)] == [True, False, True]


def test_hooks_are_taken_away(llama: TinyModel) -> None:
    before = tiny_logits(llama, PROMPTS[0])
    with pytest.raises(RuntimeError, match="stop"), probed(llama.model, probe_of(Intervention.RANDOM, 0)):
        raise RuntimeError("stop")
    assert torch.equal(before, tiny_logits(llama, PROMPTS[0]))


@pytest.mark.parametrize("intervention", Intervention)
def test_every_family(family_model: TinyModel, intervention: Intervention) -> None:
    """It runs, it changes something low down, and one pass is what decoding is."""
    probe = Probe(intervention, 1, Scope.PUBLISHED, donations={tuple(PROMPTS[2]): Donation(3, (9, 9, 9), 2)})
    with probed(family_model.model, probe) as runner:
        generated = runner.generate([PROMPTS[2]], max_new_tokens=3)
        assert runner.judge([PROMPTS[2]], generated)[0][1]
        changed = runner.score([PROMPTS[2]], [[31, 32]])[0]
    with probed(family_model.model, Probe(intervention, NUM_LAYERS)) as whole:
        assert np.abs(whole.score([PROMPTS[2]], [[31, 32]])[0] - changed).max() > 1e-4


# ---- donors


def sample(prompt: tuple[int, ...], group: str = "a") -> Sample:
    return Sample(prompt, None, None, group, "here")


def test_donors_are_the_next_of_a_group_at_the_last_token_that_differs() -> None:
    samples = [sample((1, 2, 30, 4)), sample((1, 2, 31, 32, 4)), sample((9, 9), "b"), sample((1, 2, 33, 4))]
    found = find_donations(samples)
    assert found[0] == (1, Donation(2, (1, 2, 31, 32, 4), 3))
    assert found[1] == (3, Donation(3, (1, 2, 33, 4), 2))
    assert found[3] == (0, Donation(2, (1, 2, 30, 4), 2))
    assert 2 not in found  # alone in its group


def test_the_last_token_is_never_given_and_prompts_may_contain_each_other() -> None:
    found = find_donations([sample((1, 2, 3)), sample((1, 2, 4)), sample((3, 1, 2, 4))])
    assert found[0][1] == Donation(1, (1, 2, 4), 1)
    assert found[1][1] == Donation(0, (3, 1, 2, 4), 1)
    assert find_donations([sample((1,)), sample((2, 3))]) == {}
