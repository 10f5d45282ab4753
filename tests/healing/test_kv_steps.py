"""How large keys and values get: of the tokens that write them, at any position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.conftest import GetModel
from tests.healing.test_rounding import samples
from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.execution.reference import decode_mask, scheduled
from voidprune.healing.kv_steps import HEADROOM, measure_kv_steps, reach_anywhere
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.pretrained import load_model
from voidprune.models.rope import Rope
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule, full_schedule

A = LayerAction


@pytest.mark.parametrize("shape", ["llama", "cohere", "phi3-partly-rotated", "smollm3", "mistral-window"])
def test_steps_are_those_of_every_sample_by_itself(get_model: GetModel, shape: str) -> None:
    """Layer 1 is written by prompts alone, layer 2 by responses alone; nothing is padded here."""
    source = get_model(shape)
    prefill = (A.FULL, A.FULL, A.SKIP, A.FULL, A.KV_ONLY, A.FULL)
    decode = (A.FULL, A.SKIP, A.KV_ONLY, A.SKIP_MLP, A.FULL, A.FULL)
    schedule = Schedule(model=source.identity, prefill=prefill, decode=decode, single_turn=True)
    model, given = load_model(source.folder), samples(3, num_samples=9)
    ropes = describe_graph_architecture(source.checkpoint.config, source.checkpoint.architecture.spec).ropes
    context = source.checkpoint.architecture.context_length
    keys: dict[int, list[torch.Tensor]] = {layer: [] for layer in schedule.kv_layers}
    values: dict[int, list[torch.Tensor]] = {layer: [] for layer in schedule.kv_layers}
    with scheduled(model, schedule) as running:
        for sample in given:
            row, cache = [*sample.prompt, *(sample.response or ())[:-1]], DynamicCache()
            flags = decode_mask(len(sample.prompt), len(row), schedule.boundary)
            running.forward(torch.tensor([row]), is_decode_BT=torch.tensor([flags]), cache=cache)
            for layer in schedule.kv_layers:
                writes = [(decode if flag else prefill)[layer].writes_kv for flag in flags]
                kept = cache.layers[layer]
                keys[layer].append(reach_anywhere(kept.keys, ropes[layer], context_length=context)[0][:, writes])  # type: ignore[union-attr]
                values[layer].append(kept.values[0][:, writes].abs())  # type: ignore[union-attr]
    steps = measure_kv_steps(model, source.checkpoint, schedule, given, batch_size=4)
    assert len(steps) == len(schedule.kv_layers)
    for one, layer in zip(steps, schedule.kv_layers, strict=True):
        for found, seen in ((one.keys_NH, keys[layer]), (one.values_NH, values[layer])):
            np.testing.assert_allclose(found * 127 / HEADROOM, torch.cat(seen, dim=1).amax(1).numpy(), rtol=1e-5)


def turn(keys: torch.Tensor, rope: Rope, position: float) -> torch.Tensor:
    """As a rotary embedding turns them, from position 0."""
    width, turned = rope.width, keys.clone()
    for pair, frequency in enumerate(rope.frequencies):
        one, other = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + width // 2)
        angle = frequency * position
        turned[..., one] = keys[..., one] * math.cos(angle) - keys[..., other] * math.sin(angle)
        turned[..., other] = keys[..., other] * math.cos(angle) + keys[..., one] * math.sin(angle)
    return turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("context_length", [6, 40])
def test_keys_reach_what_they_would_at_any_position(interleaved: bool, context_length: int) -> None:
    """Fast pairs turn round and round, slow ones hardly; the last two channels are not turned."""
    rope = Rope(frequencies=(2.0, 0.3, 0.02), interleaved=interleaved)
    unturned = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = torch.stack([turn(unturned[:, :, position], rope, position) for position in range(6)], dim=2)
    reached = reach_anywhere(keys, rope, context_length=context_length)
    places = np.linspace(0, context_length - 1, 40 * context_length)
    expected = torch.stack([turn(unturned, rope, place).abs() for place in places]).amax(0)
    assert (expected <= reached + 1e-9).all()
    torch.testing.assert_close(reached, expected, rtol=0.002, atol=1e-3)
    assert torch.equal(reached[..., 6:], keys[..., 6:].abs())
    assert torch.equal(reach_anywhere(keys, None, context_length=context_length), keys.abs())


def test_angles_that_depend_on_the_length_of_a_sequence_may_be_any() -> None:
    rope = Rope(frequencies=(0.001,), long_frequencies=(0.0005,), long_from=100)
    reached = reach_anywhere(torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), rope, context_length=4)
    assert reached.flatten().tolist() == [5.0, 5.0]


def test_a_slot_that_no_token_writes_is_named(llama: TinyModel) -> None:
    """The only token of a prompt runs the decode schedule."""
    prefill, decode = (A.FULL,) * 6, (A.FULL,) * 3 + (A.SKIP,) + (A.FULL,) * 2
    schedule = Schedule(model=llama.identity, prefill=prefill, decode=decode, single_turn=True)
    longer, short = (Sample(prompt, (4, 5), None, "x", "here") for prompt in ((1, 2, 3), (1,)))
    model = load_model(llama.folder)
    assert len(measure_kv_steps(model, llama.checkpoint, schedule, [short, longer])) == 6
    with pytest.raises(ModelError, match="no token of the samples writes keys and values of layer 3"):
        measure_kv_steps(model, llama.checkpoint, schedule, [short])


def test_where_nothing_attends_nothing_is_rounded(llama: TinyModel) -> None:
    schedule = Schedule(model=llama.identity, prefill=(A.SKIP_ATTENTION,) * 6, decode=(A.SKIP_ATTENTION,) * 6)
    with pytest.raises(ModelError, match="no layer writes keys and values"):
        measure_kv_steps(load_model(llama.folder), llama.checkpoint, schedule, samples(1, num_samples=2))


def test_what_overflows_is_named(llama: TinyModel) -> None:
    model = load_model(llama.folder)
    with torch.no_grad():
        model.get_submodule("model.layers.2.self_attn.v_proj").weight.fill_(math.inf)  # type: ignore[union-attr, operator]
    with pytest.raises(ModelError, match="keys or values of layer 2 overflow"):
        measure_kv_steps(model, llama.checkpoint, full_schedule(llama.identity), samples(1, num_samples=2))
