"""What a schedule means: the identities that define the reference, against stock transformers and against a loop by hand."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tests.strategies import schedules
from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.execution import reference
from voidprune.execution.reference import align_responses, decode_mask, decoder_layers, scheduled
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.models.pretrained import load_model
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction
ALL_PREFILL, ALL_DECODE = False, True


def random_tokens(source: TinyModel, *shape: int, seed: int = 0) -> Tensor:
    vocab_size = source.checkpoint.architecture.vocab_size
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def stock(model: PreTrainedModel, tokens_BT: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens_BT, **arguments).logits
    return logits


def mask(tokens_BT: Tensor, schedule: Schedule, *, num_prompt_tokens: int) -> Tensor:
    return torch.tensor(decode_mask(num_prompt_tokens, tokens_BT.shape[1], schedule.boundary)).expand_as(tokens_BT)


# ---- all FULL is the stock model, bit for bit


@pytest.mark.parametrize("boundary", Boundary)
def test_full_is_bitwise_the_stock_model(family_model: TinyModel, boundary: Boundary) -> None:
    model, tokens_BT = family_model.model, random_tokens(family_model, 2, 11)
    ours, theirs = DynamicCache(), DynamicCache()
    expected = [stock(model, tokens_BT[:, :7], past_key_values=theirs)]
    expected += [stock(model, tokens_BT[:, step : step + 1], past_key_values=theirs) for step in range(7, 11)]
    schedule = full_schedule(family_model.identity, boundary=boundary)
    with scheduled(model, schedule) as running:
        is_decode_BT = mask(tokens_BT[:, :7], schedule, num_prompt_tokens=7)
        found = [running.forward(tokens_BT[:, :7], is_decode_BT=is_decode_BT, cache=ours)]
        for step in range(7, 11):
            token_B1 = tokens_BT[:, step : step + 1]
            found.append(running.forward(token_B1, is_decode_BT=torch.ones(2, 1, dtype=torch.bool), cache=ours))
    for wanted, got in zip(expected, found, strict=True):
        assert wanted.std() > 0.3, "the fixture's logits are large enough to tell right from wrong"
        assert torch.equal(got, wanted)


def test_full_generation_is_the_stock_model_s(family_model: TinyModel) -> None:
    prompt = random_tokens(family_model, 1, 5)
    with torch.inference_mode():
        expected = family_model.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
    with scheduled(family_model.model, full_schedule(family_model.identity)) as running:
        assert running.generate(prompt.tolist(), max_new_tokens=12) == expected[:, 5:].tolist()


# ---- dropped == skipped in both phases


@pytest.mark.parametrize("dropped", [{0}, {5}, {1, 2, 4}, {0, 1, 2, 3, 4}])
def test_dropped_is_skipped_in_both_phases(family_model: TinyModel, tmp_path: Path, dropped: set[int]) -> None:
    schedule = dropped_schedule(family_model.identity, dropped)
    write_slim_checkpoint(family_model.checkpoint, schedule.union, tmp_path)
    slim = load_model(tmp_path)
    modules = family_model.checkpoint.architecture.spec.modules
    assert len(decoder_layers(slim, modules)) == NUM_LAYERS - len(dropped)
    tokens_BT = random_tokens(family_model, 2, 12)
    with scheduled(family_model.model, schedule) as running:
        skipped = running.forward(tokens_BT, is_decode_BT=mask(tokens_BT, schedule, num_prompt_tokens=6))
    assert torch.equal(skipped, stock(slim, tokens_BT))
    assert not torch.allclose(skipped, stock(family_model.model, tokens_BT), atol=1e-2), "dropping layers must matter"


@settings(max_examples=2)
@given(kept=st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=NUM_LAYERS - 1))
def test_any_layers_kept(family_model: TinyModel, kept: set[int]) -> None:
    schedule = dropped_schedule(family_model.identity, set(range(NUM_LAYERS)) - kept)
    tokens_BT = random_tokens(family_model, 1, 11)
    with tempfile.TemporaryDirectory() as folder:
        write_slim_checkpoint(family_model.checkpoint, schedule.union, Path(folder))
        slim = stock(load_model(Path(folder)), tokens_BT)
    with scheduled(family_model.model, schedule) as running:
        skipped = running.forward(tokens_BT, is_decode_BT=mask(tokens_BT, schedule, num_prompt_tokens=6))
    torch.testing.assert_close(slim, skipped, atol=1e-5, rtol=1e-5)


# ---- the six actions, against weights of zero


@pytest.mark.parametrize("action", A)
def test_each_action_is_what_weights_of_zero_are(family_model: TinyModel, action: LayerAction) -> None:
    """A sublayer whose last matrix is zero adds nothing: the same as leaving it out, whatever the family does around it."""
    schedule = Schedule(
        model=family_model.identity,
        prefill=(A.FULL, A.FULL, action, A.FULL, A.FULL, A.FULL),
        decode=(A.FULL, A.FULL, action, A.FULL, A.FULL, A.FULL),
        single_turn=True,
    )
    modules = family_model.checkpoint.architecture.spec.modules
    attention, mlp = modules.sublayers(decoder_layers(family_model.model, modules)[2])
    tokens_BT = random_tokens(family_model, 2, 9)
    with scheduled(family_model.model, schedule) as running:
        found = running.forward(tokens_BT, is_decode_BT=mask(tokens_BT, schedule, num_prompt_tokens=5))
    silenced = [*([] if action.attends else last_matrices(attention)), *([] if action.runs_mlp else last_matrices(mlp))]
    assert len(silenced) >= (not action.attends) + (not action.runs_mlp)
    kept = [parameter.detach().clone() for parameter in silenced]
    try:
        with torch.inference_mode():
            for parameter in silenced:
                parameter.zero_()
        expected = stock(family_model.model, tokens_BT)
    finally:
        with torch.inference_mode():
            for parameter, value in zip(silenced, kept, strict=True):
                parameter.copy_(value)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, stock(family_model.model, tokens_BT)) == (action is A.FULL)


def last_matrices(sublayer: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of what a sublayer ends with; of a mixture of experts, in each expert."""
    parts = ("o_proj", "down_proj", "c_proj", "w2")
    return [
        parameter
        for name, parameter in sublayer.named_parameters()
        if any(part.removesuffix("_bias") in parts for part in name.split("."))
    ]


# ---- against a loop by hand


def by_hand(source: TinyModel, tokens_BT: Tensor, schedule: Schedule, is_decode_BT: Tensor) -> Tensor:
    """The words of the schedule, said without hooks, for one pass over Llama's own modules."""
    model = source.model.model
    with torch.inference_mode():
        hidden_BTD = model.embed_tokens(tokens_BT)
        positions_BT = torch.arange(tokens_BT.shape[1])[None].expand_as(tokens_BT)
        rotary = model.rotary_emb(hidden_BTD, positions_BT)
        for layer, prefill, decode in zip(model.layers, schedule.prefill, schedule.decode, strict=True):
            attends_BT1 = torch.where(is_decode_BT, decode.attends, prefill.attends)[..., None]
            attention_BTD = layer.self_attn(
                layer.input_layernorm(hidden_BTD), position_embeddings=rotary, attention_mask=None
            )[0]
            hidden_BTD = hidden_BTD + attends_BT1 * attention_BTD
            runs_mlp_BT1 = torch.where(is_decode_BT, decode.runs_mlp, prefill.runs_mlp)[..., None]
            hidden_BTD = hidden_BTD + runs_mlp_BT1 * layer.mlp(layer.post_attention_layernorm(hidden_BTD))
        logits_BTV: Tensor = source.model.lm_head(model.norm(hidden_BTD))
    return logits_BTV


@given(data=st.data())
def test_reference_is_the_loop_by_hand(llama: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(llama.identity))
    num_prompt_tokens = data.draw(st.integers(1, 8))
    tokens_BT = random_tokens(llama, 2, 9)
    is_decode_BT = mask(tokens_BT, schedule, num_prompt_tokens=num_prompt_tokens)
    with scheduled(llama.model, schedule) as running:
        found = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
    torch.testing.assert_close(found, by_hand(llama, tokens_BT, schedule, is_decode_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", Phase)
def test_each_phase_follows_its_own_list(llama: TinyModel, phase: Phase) -> None:
    """Changing one phase's action changes that phase's tokens, and of the other phase only those that come later."""
    full = full_schedule(llama.identity, boundary=Boundary.PREFILL)
    changed = {"prefill": list(full.prefill), "decode": list(full.decode)}
    changed[str(phase)][2] = A.KV_ONLY
    schedule = Schedule(model=llama.identity, boundary=Boundary.PREFILL, **changed)
    tokens_BT = random_tokens(llama, 1, 10)
    is_decode_BT = mask(tokens_BT, schedule, num_prompt_tokens=6)
    with scheduled(llama.model, full) as running:
        whole = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
    with scheduled(llama.model, schedule) as running:
        cut = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
    touched = (whole - cut).abs().amax(-1)[0] > 1e-3
    assert touched.tolist() == [phase is Phase.PREFILL] * 6 + [True] * 4


# ---- boundary


@pytest.mark.parametrize(
    ("num_prompt_tokens", "boundary", "expected"),
    [
        (3, Boundary.DECODE, [False, False, True, True, True]),
        (3, Boundary.PREFILL, [False, False, False, True, True]),
        (1, Boundary.DECODE, [True, True, True, True, True]),
        (1, Boundary.PREFILL, [False, True, True, True, True]),
        (5, Boundary.DECODE, [False, False, False, False, True]),
    ],
)
def test_boundary_says_whose_the_last_prompt_token_is(
    num_prompt_tokens: int, boundary: Boundary, expected: list[bool]
) -> None:
    assert decode_mask(num_prompt_tokens, 5, boundary) == expected


# ---- one teacher-forced pass == prefill, then cached decode


@settings(max_examples=3)
@given(data=st.data())
def test_one_pass_equals_prefill_then_cached_decode(family_model: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(family_model.identity))
    num_prompt_tokens = data.draw(st.sampled_from([1, 2, 9]))
    tokens_BT = random_tokens(family_model, 2, 14)
    is_decode_BT = mask(tokens_BT, schedule, num_prompt_tokens=num_prompt_tokens)
    cache, pieces = DynamicCache(), []
    with scheduled(family_model.model, schedule) as running:
        whole = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
        bounds = [0, *range(num_prompt_tokens, 15)]
        for begin, end in itertools.pairwise(bounds):
            part = slice(begin, end)
            pieces.append(running.forward(tokens_BT[:, part], is_decode_BT=is_decode_BT[:, part], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


@given(data=st.data())
def test_keys_and_values_that_are_not_written_are_not_read(llama: TinyModel, data: st.DataObject) -> None:
    """What the K/V contract is for: spoil all that no action writes, and no logit changes, in a second turn either."""
    schedule = data.draw(schedules(llama.identity))
    tokens_BT = random_tokens(llama, 1, 13)
    turns = [(0, 6), (6, 7), (7, 8), *([] if schedule.single_turn else [(8, 12), (12, 13)])]
    is_decode = decode_mask(6, 8, schedule.boundary) + decode_mask(4, 5, schedule.boundary)

    def run(*, spoil: bool) -> Tensor:
        cache, found = DynamicCache(), []
        for begin, end in turns:
            is_decode_BT = torch.tensor([is_decode[begin:end]])
            found.append(running.forward(tokens_BT[:, begin:end], is_decode_BT=is_decode_BT, cache=cache)[:, -1])
            for layer, cached in enumerate(cache.layers if spoil else []):
                for token in range(begin, end):
                    phase = Phase.DECODE if is_decode[token] else Phase.PREFILL
                    if not schedule.actions(phase)[layer].writes_kv:
                        cached.keys[:, :, token] = cached.values[:, :, token] = torch.nan
        return torch.cat(found)

    with scheduled(llama.model, schedule) as running, torch.inference_mode():
        expected = run(spoil=False)
        assert torch.equal(run(spoil=True), expected)


# ---- gradients


def test_differentiable_pass_is_the_same_with_gradients(tmp_path: Path) -> None:
    """They reach a sublayer exactly where it counts for some token."""
    source = build_model("llama", tmp_path)
    schedule = Schedule(
        model=source.identity,
        prefill=(A.FULL, A.KV_ONLY, A.FULL, A.FULL, A.FULL, A.KV_ONLY),
        decode=(A.FULL, A.SKIP_MLP, A.FULL, A.FULL, A.FULL, A.SKIP_MLP),
    )
    tokens_BT = random_tokens(source, 2, 9)
    is_decode_BT = mask(tokens_BT, schedule, num_prompt_tokens=5)
    with scheduled(source.model, schedule) as running:
        expected = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
        found = running.differentiable(tokens_BT, is_decode_BT=is_decode_BT)
        found.square().mean().backward()
    assert torch.equal(found, expected)
    gradients = [
        (float(layer.self_attn.o_proj.weight.grad.abs().max()), float(layer.mlp.down_proj.weight.grad.abs().max()))
        for layer in source.model.model.layers
    ]
    counts = [(True, number not in (1, 5)) for number in range(NUM_LAYERS)]
    assert [(attention > 0, mlp > 0) for attention, mlp in gradients] == counts


def test_responses_begin_in_one_column() -> None:
    batch = align_responses([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 9, 0], [0, 0, 8, 11, 12]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.num_logits == 3
    for boundary, first in ((Boundary.DECODE, 2), (Boundary.PREFILL, 3)):
        assert batch.is_decode_BT(boundary).tolist() == [[column >= first for column in range(5)]] * 2


# ---- hooks


def test_hooks_are_removed_afterwards(llama: TinyModel) -> None:
    tokens_BT = random_tokens(llama, 1, 5)
    before = stock(llama.model, tokens_BT)
    with scheduled(llama.model, dropped_schedule(llama.identity, {1})) as running:
        running.forward(tokens_BT, is_decode_BT=torch.ones_like(tokens_BT, dtype=torch.bool))
        assert any(module._forward_hooks for module in llama.model.modules())
    assert not any(module._forward_hooks for module in llama.model.modules())
    assert torch.equal(stock(llama.model, tokens_BT), before)


def test_hooks_are_removed_after_an_error(llama: TinyModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), scheduled(llama.model, dropped_schedule(llama.identity, {1})):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in llama.model.modules())


# ---- batches


@settings(max_examples=3)
@given(data=st.data())
def test_padded_batch_generates_what_each_row_generates(family_model: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(family_model.identity))
    prompts = [random_tokens(family_model, length, seed=length).tolist() for length in (7, 1, 3)]
    with scheduled(family_model.model, schedule) as running:
        together = running.generate(prompts, max_new_tokens=10)
        assert together == [running.generate([prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert all(len(response) == 10 for response in together)


def test_generation_stops_at_the_end_token_of_each_row(llama: TinyModel) -> None:
    prompts = [[5, 6, 7], [9]]
    with scheduled(llama.model, full_schedule(llama.identity)) as running:
        free = running.generate(prompts, max_new_tokens=12)
        end = free[0][3]
        stopped = running.generate(prompts, max_new_tokens=12, end_tokens=[end])
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)
    assert len(stopped[0]) <= 4


@settings(max_examples=3)
@given(data=st.data())
def test_score_is_the_log_softmax_of_each_row_alone(tiny_model: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(tiny_model.identity))
    prompts = [random_tokens(tiny_model, length, seed=length).tolist() for length in (1, 6)]
    responses = [random_tokens(tiny_model, length, seed=length).tolist() for length in (5, 2)]
    with scheduled(tiny_model.model, schedule) as running:
        scores = running.score(prompts, responses)
        for prompt, response, found in zip(prompts, responses, scores, strict=True):
            tokens_BT = torch.tensor([prompt + response])
            is_decode_BT = mask(tokens_BT, schedule, num_prompt_tokens=len(prompt))
            logits_TV = running.forward(tokens_BT, is_decode_BT=is_decode_BT)[0]
            expected = [
                logits_TV[len(prompt) - 1 + step].double().log_softmax(-1)[token].item()
                for step, token in enumerate(response)
            ]
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 101 * 5 * 2, 2**26])
def test_rows_scored_together_in_any_number_are_scored_alike(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Rows are padded on both sides, so that their responses begin together."""
    monkeypatch.setattr(reference, "LOGIT_VALUES", limit)
    schedule = dropped_schedule(tiny_model.identity, {2})
    prompts = [random_tokens(tiny_model, length, seed=length).tolist() for length in (1, 6, 3)]
    responses = [random_tokens(tiny_model, length, seed=length).tolist() for length in (5, 1, 2)]
    with scheduled(tiny_model.model, schedule) as running:
        scores, predictions = running.score(prompts, responses), running.predict(prompts, responses)
        for prompt, response, score, prediction in zip(prompts, responses, scores, predictions, strict=True):
            alone = running.forward(
                torch.tensor([prompt + response]),
                is_decode_BT=mask(torch.tensor([prompt + response]), schedule, num_prompt_tokens=len(prompt)),
            )[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert prediction.dtype == np.float32
            np.testing.assert_allclose(prediction, alone.numpy(), atol=1e-4)
            np.testing.assert_allclose(prediction[range(len(response)), response], score, atol=1e-5)


def test_greedy_tokens_have_the_highest_score(stories260k: TinyModel) -> None:
    schedule = full_schedule(stories260k.identity)
    with scheduled(stories260k.model, schedule) as running:
        (response,) = running.generate([[1, 400]], max_new_tokens=20)
        (score,) = running.score([[1, 400]], [response])
        (other,) = running.score([[1, 400]], [[*response[:-1], (response[-1] + 1) % 512]])
    assert score[-1] > other[-1]
    assert score.mean() > -2.5, "a trained model is sure of its own words"
