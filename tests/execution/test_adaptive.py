"""LAC at run time: the golden vectors through the real hooks of a stock model, and what each rule promises of logits and counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.execution.adaptive import (
    AdaptiveModel,
    FixedReadout,
    Mask,
    RandomMask,
    Readout,
    Rule,
    Usage,
    Whole,
    adaptive,
)
from voidprune.execution.reference import scheduled
from voidprune.execution.sampling import Sampling
from voidprune.profiling.profile import LacSettings
from voidprune.profiling.tracing import lac_activity
from voidprune.schedule import full_schedule

V1 = [1, 3, 4, 4.5, 10, 10.5, 9.5, 20, 30]
V2 = [*V1[:-1], 25]
V3 = [1, 900, 905, 903, 910, 912, 915, 920, 300]
V4 = [5, 4, 3, 6, 6, 12, 11, 30, 24]
V6 = [300, 301.4, 302.5, 303.1, 303.8]
V6_BF16 = [300, 302, 302, 304, 304]  # what bfloat16 makes of V6: there it holds even numbers only

PROMPTS = [[5, 17, 40, 8, 77, 3, 61], [9], [12, 55, 23, 90]]
RESPONSES = [[7, 81], [30, 31, 32, 33], [99]]
RULES: list[Rule] = [
    Readout(LacSettings(0.6)),
    Mask(LacSettings(0.6)),
    FixedReadout(3),
    RandomMask(LacSettings(0.6), seed=4),
]


def norm_model(norms: Sequence[float], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A stock Llama whose residual stream has the given norms: its layers add a constant along one direction and no more."""
    config = AutoConfig.for_model(
        "llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=len(norms) - 1,
        num_attention_heads=2, num_key_value_heads=1, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, 0] = norms[0]
        for layer, (before, after) in zip(model.model.layers, itertools.pairwise(norms), strict=True):
            layer.mlp.down_proj.bias[0] = after - before
    return model.to(dtype)


def run_norms(model: PreTrainedModel, rule: Rule) -> tuple[str, float]:
    """LAC's mask of a one-token prompt as a text, and the norm of the state that reaches the final norm."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with adaptive(model, rule) as running:
        running.score([[3]], [[1]])
        usage = running.take_usage()
    handle.remove()
    (state,) = seen
    assert usage.prefill.num_tokens == usage.read.num_tokens == 1
    assert usage.decode.num_tokens == 0
    return "".join(map(str, usage.prefill.active)), float(torch.linalg.vector_norm(state[0, 0].float()))


GOLDEN = [
    (V1, [0.8], "11010011", 30),
    (V1, [0.0], "11111011", 30),
    (V1, [0.2, 0.5], "11110011", 30),
    (V1, [1.0], "11010010", 20),
    (V2, [0.8], "11010010", 20),
    (V3, [0.2, 0.5, 0.8, 1.0], "11000000", 905),
    (V3, [0.0], "11011110", 920),
    (V4, [0.0], "00111010", 30),
    (V4, [0.2, 0.5, 0.8, 1.0], "00101010", 30),
]


@pytest.mark.parametrize(("norms", "alphas", "active", "read"), GOLDEN)
def test_readout_reads_the_golden_state(norms: list[float], alphas: list[float], active: str, read: float) -> None:
    """Masks and states made by running the published hook (github manishemirani/void_in_language_models)."""
    model = norm_model(norms)
    for alpha in alphas:
        assert run_norms(model, Readout(LacSettings(alpha))) == (active, read)


def test_readout_in_both_arithmetics() -> None:
    active, read = run_norms(norm_model(V6), Readout(LacSettings(0.8)))
    assert (active, read) == ("1111", pytest.approx(303.8))
    model = norm_model(V6_BF16, torch.bfloat16)
    assert run_norms(model, Readout(LacSettings(0.8, "model"))) == ("1110", 304)


@pytest.mark.parametrize(("norms", "alphas", "active"), [row[:3] for row in GOLDEN if row[0] in (V1, V2)])
def test_mask_leaves_out_what_is_void(norms: list[float], alphas: list[float], active: str) -> None:
    """These layers would change any state by the same amount, so the mask is the golden one while the stream is another: what is
    left are the changes of the active layers. (Elsewhere a change of -620 meets a short state, turns it round and lengthens it.)"""
    changes = [after - before for before, after in itertools.pairwise(norms)]
    left = norms[0] + sum(change for change, flag in zip(changes, active, strict=True) if flag == "1")
    for alpha in alphas:
        assert run_norms(norm_model(norms), Mask(LacSettings(alpha))) == (active, left)


def test_the_change_of_a_void_layer_counts_in_the_range_of_mask() -> None:
    """Changes 1, -3 (void), 2: the range before layer 2 is 4 with the void, 0 without it. Layer 2 sees the state after layer 0."""
    model = norm_model([10, 11, 8, 10])
    assert run_norms(model, Mask(LacSettings(0.4))) == ("101", 13)
    assert run_norms(model, Mask(LacSettings(0.6))) == ("100", 11)


# ---- readout


def stock_states(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The dense residual stream, [L + 1, T, D]: the embedding, then after every layer."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens]))
        embedding = model.model.embed_tokens(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack([embedding, *states])[:, 0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8])
def test_readout_is_the_head_on_the_last_active_state(tiny_model: TinyModel, alpha: float) -> None:
    model, tokens = tiny_model.model, [*PROMPTS[0], 9, 14]
    states = stock_states(model, tokens)
    active_LT = lac_activity(torch.linalg.vector_norm(states, dim=-1), alpha)
    depths = [
        max((layer + 1 for layer in range(NUM_LAYERS) if active_LT[layer, token]), default=0) for token in range(9)
    ]
    with torch.inference_mode():
        logits_TV = model.lm_head(
            model.model.norm(torch.stack([states[depth, token] for token, depth in enumerate(depths)]))
        )
    expected = logits_TV[6:9].double().log_softmax(-1)[torch.arange(3), torch.tensor([9, 14, 33])]
    with adaptive(model, Readout(LacSettings(alpha))) as running:
        (found,) = running.score([PROMPTS[0]], [[9, 14, 33]])
        usage = running.take_usage()
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)
    assert usage.prefill == usage_of(active_LT[:, :7])
    assert usage.decode == usage_of(active_LT[:, 7:])
    assert usage.read == usage_of(active_LT[:, 6:])


def usage_of(active_LT: Tensor) -> Usage:
    depths = [0] * (len(active_LT) + 1)
    for column in active_LT.T.tolist():
        depths[max((layer + 1 for layer, flag in enumerate(column) if flag), default=0)] += 1
    return Usage(active_LT.shape[1], tuple(active_LT.sum(1).tolist()), tuple(depths))


def test_where_the_last_layer_is_active_readout_is_the_whole_model_bit_for_bit(tiny_model: TinyModel) -> None:
    tokens, seen = torch.randint(101, (1, 60), generator=torch.Generator().manual_seed(1)), []
    logits = {}
    for rule in (Whole(), Readout(LacSettings(0.6))):
        with adaptive(tiny_model.model, rule) as running, torch.inference_mode():
            running._pass = running._lac_pass(rule)
            logits[type(rule)] = tiny_model.model(tokens).logits[0]
            seen.append(running._pass.active[-1][0])
    with torch.inference_mode():
        assert torch.equal(logits[Whole], tiny_model.model(tokens).logits[0]), "Whole is the stock model"
    last = seen[1]
    assert 0 < int(last.sum()) < 60, "some tokens of each kind, or this test says nothing"
    same_T = (logits[Whole] == logits[Readout]).all(-1)
    assert torch.equal(same_T, last)


def test_readout_leaves_keys_and_values_dense(llama: TinyModel) -> None:
    """So the next token's layers run as in the whole model: only the heads of both differ."""
    tokens = torch.tensor([PROMPTS[0]])
    caches = {}
    for rule in (Whole(), Readout(LacSettings(0.8)), Mask(LacSettings(0.8))):
        caches[type(rule)] = DynamicCache()
        with adaptive(llama.model, rule) as running, torch.inference_mode():
            running._pass = running._lac_pass(rule)
            llama.model(tokens, past_key_values=caches[type(rule)], use_cache=True)
    pairs = [[layer.keys for layer in caches[kind].layers] for kind in (Whole, Readout, Mask)]
    assert all(torch.equal(one, two) for one, two in zip(pairs[0], pairs[1], strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(pairs[0], pairs[2], strict=True))


# ---- mask, by hand


def by_hand(source: TinyModel, tokens: Sequence[int], alpha: float) -> tuple[Tensor, Tensor]:
    """Logits and activity of `Mask` for one text, said without hooks, token by token where it counts, over Llama's own modules."""
    model = source.model.model
    changes: list[list[float]] = [[] for _ in tokens]
    active_LT = torch.zeros(NUM_LAYERS, len(tokens), dtype=torch.bool)
    with torch.inference_mode():
        hidden_BTD = model.embed_tokens(torch.tensor([tokens]))
        rotary = model.rotary_emb(hidden_BTD, torch.arange(len(tokens))[None])
        for number, layer in enumerate(model.layers):
            attended = (
                hidden_BTD
                + layer.self_attn(layer.input_layernorm(hidden_BTD), position_embeddings=rotary, attention_mask=None)[0]
            )
            output_BTD = attended + layer.mlp(layer.post_attention_layernorm(attended))
            for token in range(len(tokens)):
                change = float(output_BTD[0, token].norm() - hidden_BTD[0, token].norm())
                past = changes[token]
                threshold = alpha * (max(past) - min(past)) if past else 0.0
                past.append(change)
                if change >= threshold:
                    active_LT[number, token] = True
                else:
                    output_BTD[0, token] = hidden_BTD[0, token]
            hidden_BTD = output_BTD
        return source.model.lm_head(model.norm(hidden_BTD))[0], active_LT


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.2])
def test_mask_is_the_loop_by_hand(llama: TinyModel, alpha: float) -> None:
    tokens = [*PROMPTS[0], 9, 14, 33, 2, 80]
    logits_TV, active_LT = by_hand(llama, tokens, alpha)
    assert 0.2 < active_LT.float().mean() < 0.9
    with adaptive(llama.model, Mask(LacSettings(alpha))) as running:
        (found,) = running.score([tokens[:7]], [tokens[7:]])
        usage = running.take_usage()
    expected = logits_TV[6:-1].double().log_softmax(-1)[torch.arange(5), torch.tensor(tokens[7:])]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert (usage.prefill, usage.decode) == (usage_of(active_LT[:, :7]), usage_of(active_LT[:, 7:-1]))


# ---- every rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_one_pass_is_prefill_and_decode_with_a_cache(tiny_model: TinyModel, rule: Rule) -> None:
    """The response that is generated is, token by token, the likeliest under teacher forcing, and the counts are the same."""
    with adaptive(tiny_model.model, rule) as running:
        responses = running.generate(PROMPTS, max_new_tokens=5)
        generated = running.take_usage()
        scores = running.score(PROMPTS, responses)
        assert running.take_usage() == generated
        for other in range(0, 101, 10):
            changed = [[*response[:-1], other] for response in responses]
            for best, less in zip(scores, running.score(PROMPTS, changed), strict=True):
                assert less[-1] <= best[-1] + 1e-4
    assert generated.prefill.num_tokens == sum(map(len, PROMPTS))
    assert generated.decode.num_tokens == 3 * 4
    assert generated.read.num_tokens == 3 * 5


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_neither_results_nor_counts_depend_on_the_batch(tiny_model: TinyModel, rule: Rule) -> None:
    def everything(running: AdaptiveModel, prompts: Any, responses: Any, ends: Sequence[int]) -> Any:
        texts = running.generate(prompts, max_new_tokens=6, end_tokens=ends)
        return texts, [score.tolist() for score in running.score(prompts, responses)]

    with adaptive(tiny_model.model, rule, sampling=Sampling(0.6, 0.9, seed=3)) as running:
        first = running.generate(PROMPTS, max_new_tokens=6)
        ends = [first[0][1]]  # so that one row ends while others go on
        running.take_usage()
        together = everything(running, PROMPTS, RESPONSES, ends)
        usage = running.take_usage()
        alone = [everything(running, [p], [r], ends) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        assert running.take_usage() == usage
    assert len(together[0][0]) <= 2
    assert together[0] == [texts[0] for texts, _ in alone]
    for score, (_, (other,)) in zip(together[1], alone, strict=True):
        assert score == pytest.approx(other, abs=1e-4)


def test_whole_is_the_reference_s_full_schedule(tiny_model: TinyModel) -> None:
    with scheduled(tiny_model.model, full_schedule(tiny_model.identity)) as reference:
        expected = reference.generate(PROMPTS, max_new_tokens=6), reference.score(PROMPTS, RESPONSES)
    with adaptive(tiny_model.model, Whole()) as running:
        assert running.generate(PROMPTS, max_new_tokens=6) == expected[0]
        for found, wanted in zip(running.score(PROMPTS, RESPONSES), expected[1], strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)
        assert running.take_usage().read.last_layer_share == 1


@pytest.mark.parametrize("rule", [Whole(), *RULES], ids=lambda rule: type(rule).__name__)
def test_predictions_are_what_is_scored(llama: TinyModel, rule: Rule) -> None:
    with adaptive(llama.model, rule) as running:
        predicted = running.predict(PROMPTS, RESPONSES)
        scores = running.score(PROMPTS, RESPONSES)
    for response, found_TV, score in zip(RESPONSES, predicted, scores, strict=True):
        assert found_TV.shape == (len(response), running.vocab_size)
        assert [float(row[token]) for row, token in zip(found_TV, response, strict=True)] == pytest.approx(
            score.tolist(), abs=1e-5
        )


def test_hooks_are_taken_away(llama: TinyModel) -> None:
    with adaptive(llama.model, Whole()):
        assert any(layer._forward_hooks for layer in llama.model.model.layers)
    with pytest.raises(RuntimeError, match="on purpose"), adaptive(llama.model, Whole()):
        raise RuntimeError("on purpose")
    assert not any(module._forward_hooks for module in llama.model.modules())


# ---- controls


def test_a_fixed_readout_after_all_layers_is_the_whole_model(llama: TinyModel) -> None:
    with adaptive(llama.model, Whole()) as running:
        expected = running.score(PROMPTS, RESPONSES)
    for depth, same in ((NUM_LAYERS, True), (NUM_LAYERS - 1, False), (0, False)):
        with adaptive(llama.model, FixedReadout(depth)) as running:
            found = running.score(PROMPTS, RESPONSES)
            usage = running.take_usage()
        assert all((one == two).all() for one, two in zip(found, expected, strict=True)) is same
        assert usage.prefill.mean_depth == usage.decode.mean_depth == depth
        assert usage.prefill.mean_use == pytest.approx(depth / NUM_LAYERS)


def test_a_fixed_readout_is_the_head_on_that_state(llama: TinyModel) -> None:
    states = stock_states(llama.model, PROMPTS[0])
    for depth in range(NUM_LAYERS + 1):
        with torch.inference_mode():
            expected = llama.model.lm_head(llama.model.model.norm(states[depth, -1])).double().log_softmax(-1)[44]
        with adaptive(llama.model, FixedReadout(depth)) as running:
            ((found,),) = running.score([PROMPTS[0]], [[44]])
        assert found == pytest.approx(float(expected), abs=1e-5)


def test_random_layers_are_as_many_as_those_of_the_mask(llama: TinyModel) -> None:
    """Token by token: a text is scored with one token more each time, and both counts grow by the same number."""
    lac = LacSettings(0.6)
    totals: dict[type, list[int]] = {}
    drawn: dict[int, Usage] = {}
    for rule in (Mask(lac), RandomMask(lac, 1), RandomMask(lac, 2)):
        with adaptive(llama.model, rule) as running:
            for length in range(1, 8):
                running.score([PROMPTS[0][:1]], [[*PROMPTS[0][1:length], 5]])
                usage = running.take_usage()
                whole = usage.prefill + usage.decode
                totals.setdefault(type(rule), []).append(sum(whole.active))
                if isinstance(rule, RandomMask):
                    drawn[rule.seed] = whole
    assert totals[RandomMask] == totals[Mask] * 2
    assert drawn[1].active != drawn[2].active


def test_random_layers_are_spread_over_all(llama: TinyModel) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(101, (20, 50), generator=generator).tolist()
    with adaptive(llama.model, RandomMask(LacSettings(0.6))) as running:
        running.score(texts, [[1]] * 20)
        usage = running.take_usage().prefill
    expected = usage.mean_use * usage.num_tokens
    assert all(abs(count - expected) < 0.15 * usage.num_tokens for count in usage.active)


# ---- usage


def test_usage_in_figures() -> None:
    usage = Usage(4, (4, 2, 1), (0, 2, 1, 1))
    assert usage.mean_use == pytest.approx(7 / 12)
    assert usage.mean_depth == pytest.approx(7 / 4)
    assert usage.last_layer_share == 0.25
    assert usage + usage == Usage(8, (8, 4, 2), (0, 4, 2, 2))
    assert Usage(0, (0,), (0, 0)).mean_use == Usage(0, (0,), (0, 0)).mean_depth == 0
