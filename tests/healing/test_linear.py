"""What the closed form can make up for it makes up for exactly, and it never touches anything else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tests.conftest import GetModel
from tests.strategies import schedules
from tests.tiny_models import SHAPES, TinyModel
from voidprune.errors import HealingError, ModelError
from voidprune.execution.reference import scheduled
from voidprune.healing.linear import Fitted, check_foldable, fit_projections
from voidprune.healing.readers import Part
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule, dropped_schedule, full_schedule

A = LayerAction
# Every shape whose sublayers end in a projection, and none else.


def shapes_of(*model_types: str) -> set[str]:
    return {name for name, (model_type, _) in SHAPES.items() if model_type in model_types}


SANDWICHED = shapes_of("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4")
SIDE_BY_SIDE = {"stablelm-parallel"} | shapes_of("cohere", "cohere2")
EXPERTS = shapes_of("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
FOLDABLE = sorted(set(SHAPES) - SANDWICHED - SIDE_BY_SIDE - EXPERTS)


def samples(seed: int, *, num_samples: int = 30) -> list[Sample]:
    random = torch.Generator().manual_seed(seed)
    return [
        Sample(
            prompt=tuple(torch.randint(100, (5,), generator=random).tolist()),
            response=tuple(torch.randint(100, (9,), generator=random).tolist()),
            answer=None,
            group="x",
            place="here",
        )
        for _ in range(num_samples)
    ]


def heal(source: TinyModel, schedule: Schedule, model: PreTrainedModel | None = None) -> tuple[PreTrainedModel, Fitted]:
    healed = copy.deepcopy(source.model if model is None else model)
    return healed, fit_projections(healed, schedule, samples(1), samples(2, num_samples=6))


def loss_gap(one: PreTrainedModel, other: PreTrainedModel, first: Schedule, second: Schedule) -> float:
    """How far the likelihoods of unseen responses are apart, at most, in nats a token."""
    items = samples(3, num_samples=8)
    scores = []
    for model, schedule in ((one, first), (other, second)):
        with scheduled(model, schedule) as running:
            scores.append(running.score([item.prompt for item in items], [item.response or () for item in items]))
    return max(float(abs(left - right).max()) for left, right in zip(*scores, strict=True))


def test_a_layer_that_only_adds_a_constant_is_folded_exactly(get_model: GetModel) -> None:
    source = get_model("llama-biased")
    model = copy.deepcopy(source.model)
    layer = model.model.layers[3]
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias, layer.mlp.down_proj.weight):
            weight.zero_()
    schedule = dropped_schedule(source.identity, {3})
    whole = full_schedule(source.identity)
    healed, fitted = heal(source, schedule, model)
    assert loss_gap(model, model, whole, schedule) > 0.1
    assert loss_gap(model, healed, whole, schedule) < 2e-3
    assert "model.layers.2.mlp.down_proj.bias" in fitted.state
    first = fitted.branches[0]
    assert (first.layer, first.part) == (2, Part.MLP)
    assert first.error_after < 1e-6 * first.error_before


def test_a_layer_that_does_nothing_is_not_missed(llama: TinyModel) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    _, fitted = heal(llama, dropped_schedule(llama.identity, {3}), model)
    assert fitted.state == {}
    assert {found.ridge for found in fitted.branches} == {None}


def test_each_phase_has_its_own_target(llama: TinyModel) -> None:
    """Where decode leaves out layers that prefill runs, their projections are fitted to prefill tokens alone."""
    prefill, decode = (A.FULL,) * 6, (A.FULL,) * 2 + (A.KV_ONLY,) * 2 + (A.FULL,) * 2
    _, split = heal(llama, Schedule(llama.identity, prefill, decode))
    _, shared = heal(llama, dropped_schedule(llama.identity, {2, 3}))
    tokens = {(found.layer, found.part): found.num_tokens for found in split.branches}
    # 30 samples of 5 prompt tokens and 8 that are fed back; the last prompt token is of decode.
    assert tokens[1, Part.MLP] == 30 * 13
    assert tokens[3, Part.ATTENTION] == tokens[3, Part.MLP] == 30 * 4
    assert tokens[5, Part.MLP] == 30 * 9
    assert {(found.layer, found.part) for found in shared.branches} == {
        (1, Part.MLP), (4, Part.ATTENTION), (4, Part.MLP), (5, Part.ATTENTION), (5, Part.MLP),
    }  # fmt: skip


@settings(max_examples=8)
@given(data=st.data())
def test_of_any_schedule_only_projections_that_run_are_touched_and_none_gets_worse(
    llama: TinyModel, data: st.DataObject
) -> None:
    schedule = data.draw(schedules(llama.identity))
    healed, fitted = heal(llama, schedule)
    before, after = llama.model.state_dict(), healed.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(fitted.state)
    assert all(torch.equal(after[name], tensor) for name, tensor in fitted.state.items())
    for found in fitted.branches:
        assert found.error_after <= found.error_before
        actions = (schedule.prefill[found.layer], schedule.decode[found.layer])
        assert any(action.attends if found.part is Part.ATTENTION else action.runs_mlp for action in actions)
    allowed = {
        f"model.layers.{found.layer}.{'self_attn.o_proj' if found.part is Part.ATTENTION else 'mlp.down_proj'}.weight"
        for found in fitted.branches
        if found.ridge is not None
    }
    assert changed == allowed


@pytest.mark.parametrize("name", FOLDABLE)
def test_every_family_that_can_be_folded(get_model: GetModel, name: str) -> None:
    source = get_model(name)
    check_foldable(source.checkpoint)
    _, fitted = heal(source, dropped_schedule(source.identity, {2, 3}))
    assert {name: source.checkpoint.tensors[name].shape for name in fitted.state} == {
        name: tuple(tensor.shape) for name, tensor in fitted.state.items()
    }
    first = fitted.branches[0]
    assert (first.layer, first.part) == (1, Part.MLP)
    assert first.error_after < first.error_before


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (SANDWICHED, "a norm stands between"),
        (SIDE_BY_SIDE, "read the same stream side by side"),
        (EXPERTS, "a mixture of experts"),
    ],
)
def test_all_other_families_are_refused_with_the_reason(get_model: GetModel, names: set[str], reason: str) -> None:
    for name in sorted(names):
        with pytest.raises(HealingError, match=reason) as caught:
            check_foldable(get_model(name).checkpoint)
        assert caught.value.hint == "heal it with --method distill"


def test_streams_that_overflow_are_named(llama: TinyModel) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.inf)
    with pytest.raises(ModelError, match="hidden states overflow"):
        heal(llama, dropped_schedule(llama.identity, {3}), model)
