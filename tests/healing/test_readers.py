"""Who reads a stream next: by examples, and by what really changes when a sublayer says something else."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import schedules
from tests.test_schedule import MODEL
from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.execution.reference import decode_mask, scheduled
from voidprune.healing.readers import Branch, Part, all_branches, next_reads, read_gap, read_points, runs
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction


def test_everything_is_read_at_once_in_the_whole_model() -> None:
    schedule = full_schedule(MODEL)
    for branch in all_branches(schedule):
        assert next_reads(schedule, Phase.DECODE, branch) == (branch.gives,)
        assert not read_gap(schedule, branch)


def test_a_prompt_ends_with_the_last_keys_and_values() -> None:
    last = MODEL.num_layers - 1
    for boundary, reads in ((Boundary.DECODE, ()), (Boundary.PREFILL, (2 * last + 2,))):
        schedule = full_schedule(MODEL, boundary=boundary)
        assert next_reads(schedule, Phase.PREFILL, Branch(last, Part.MLP)) == reads
        assert 2 * last in read_points(schedule, Phase.PREFILL)


def test_over_a_span_that_is_dropped() -> None:
    schedule = dropped_schedule(MODEL, {1, 2})
    assert next_reads(schedule, Phase.DECODE, Branch(0, Part.MLP)) == (6,)
    assert next_reads(schedule, Phase.DECODE, Branch(0, Part.ATTENTION)) == (1,)
    assert next_reads(schedule, Phase.DECODE, Branch(1, Part.MLP)) == ()
    assert read_gap(schedule, Branch(0, Part.MLP))
    assert not read_gap(schedule, Branch(0, Part.ATTENTION))


def test_over_a_sublayer_and_by_keys_and_values_on_the_way() -> None:
    prefill = (A.SKIP_MLP, A.KV_ONLY, A.KV_MLP, A.FULL)
    schedule = Schedule(MODEL, prefill, (A.FULL,) * 4)
    assert next_reads(schedule, Phase.PREFILL, Branch(0, Part.ATTENTION)) == (2, 4, 5)
    assert next_reads(schedule, Phase.DECODE, Branch(0, Part.ATTENTION)) == (1,)


@given(data=st.data(), boundary=st.sampled_from(Boundary))
def test_what_nobody_reads_changes_nothing_and_all_else_does(
    llama: TinyModel, data: st.DataObject, boundary: Boundary
) -> None:
    """Noise in what one sublayer gives for prompt tokens reaches the logits of the response exactly if it is read."""
    schedule = data.draw(schedules(llama.identity, boundary=boundary))
    branch = data.draw(st.builds(Branch, st.integers(0, NUM_LAYERS - 1), st.sampled_from(Part)))
    if not runs(schedule, Phase.PREFILL, branch):
        return
    tokens_BT = torch.randint(101, (1, 12), generator=torch.Generator().manual_seed(0))
    is_decode_BT = torch.tensor([decode_mask(6, 12, boundary)])

    def spoil(_module: nn.Module, _args: Any, output: Any) -> Any:
        changed = _first(output) + torch.where(is_decode_BT.unsqueeze(-1), 0.0, 1.0)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layer = llama.model.model.layers[branch.layer]
    with scheduled(llama.model, schedule) as running:
        before_BTV = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
        handle = (layer.self_attn if branch.part is Part.ATTENTION else layer.mlp).register_forward_hook(spoil)
        after_BTV = running.forward(tokens_BT, is_decode_BT=is_decode_BT)
        handle.remove()
    is_same = torch.equal(before_BTV[:, 5:], after_BTV[:, 5:])
    assert is_same == (next_reads(schedule, Phase.PREFILL, branch) == ())


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
