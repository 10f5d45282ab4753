"""A walk through a model, a few layers at a time, is the same pass, in every family."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import GetModel
from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.execution.reference import decoder_layers, scheduled
from voidprune.healing.layer_windows import (
    PhasedBatch,
    branch_factor,
    output_projection,
    phased_batches,
    run_window,
)
from voidprune.healing.readers import Branch, Part
from voidprune.profiling.calibration import Sample
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, full_schedule

A = LayerAction
LENGTHS = ((3, 6), (5, 9), (1, 4))


@pytest.fixture(scope="module")
def batch() -> PhasedBatch:
    random = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            *(tuple(torch.randint(90, (length,), generator=random).tolist()) for length in lengths), None, "x", "here"
        )
        for lengths in LENGTHS
    ]
    (batch,) = phased_batches(samples, Boundary.DECODE, batch_size=len(samples))
    return batch


@pytest.mark.parametrize("boundary", Boundary)
def test_tokens_are_counted_in_their_phase(boundary: Boundary) -> None:
    samples = [Sample((1, 2, 3), (4, 5), None, "x", "one"), Sample((6,), (7, 8, 9, 10, 11, 12), None, "x", "two")]
    (first,), (second,) = (list(phased_batches([sample], boundary, batch_size=8)) for sample in samples)
    last_is_decoded = boundary is Boundary.DECODE  # the last token of a response is not fed
    assert first.counted_BT({Phase.DECODE}).tolist() == [[False, False, last_is_decoded, True]]
    assert second.counted_BT({Phase.PREFILL}).tolist() == [[not last_is_decoded] + [False] * 5]
    (both,) = phased_batches(samples, boundary, batch_size=8)
    assert both.counted_BT(set(Phase)).tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert not both.counted_BT(set()).any()
    assert len(list(phased_batches(samples, boundary, batch_size=1))) == 2


def mixed_schedule(source: TinyModel) -> Schedule:
    prefill = (A.FULL, A.KV_ONLY, A.SKIP_MLP, A.FULL, A.SKIP, A.KV_MLP)
    decode = (A.FULL, A.FULL, A.FULL, A.SKIP_MLP, A.SKIP_ATTENTION, A.FULL)
    return Schedule(source.identity, prefill, decode)


def test_layer_by_layer_is_the_same_pass(family_model: TinyModel, batch: PhasedBatch) -> None:
    model = family_model.model
    ends = [2 * layer + 2 for layer in range(NUM_LAYERS)]
    with scheduled(model, mixed_schedule(family_model)) as running:
        at_once = run_window(running, batch, first=0, last=NUM_LAYERS, entry_BTH=None, points=ends).points_BTH
        stream_BTH = None
        for layer, end in enumerate(ends):
            seen = run_window(running, batch, first=layer, last=layer + 1, entry_BTH=stream_BTH, points=[end])
            stream_BTH = seen.points_BTH[end]
            assert torch.equal(stream_BTH, at_once[end])
    assert not any(
        "forward" in vars(layer) for layer in decoder_layers(model, family_model.checkpoint.architecture.spec.modules)
    )


def test_the_stream_at_the_end_is_what_the_head_reads(llama: TinyModel, batch: PhasedBatch) -> None:
    with scheduled(llama.model, full_schedule(llama.identity)) as running:
        seen = run_window(running, batch, first=0, last=NUM_LAYERS, entry_BTH=None, points=[2 * NUM_LAYERS])
        logits_BTV = running.forward(
            batch.padded.input_ids_BT,
            is_decode_BT=batch.is_decode_BT,
            attention_mask_BS=batch.padded.attention_mask_BT,
        )
    with torch.inference_mode():
        assert torch.equal(llama.model.lm_head(llama.model.model.norm(seen.points_BTH[2 * NUM_LAYERS])), logits_BTV)


@pytest.mark.parametrize("name", ["llama-biased", "granite", "starcoder2", "phi3"])
@pytest.mark.parametrize("part", Part)
def test_a_branch_is_its_features_through_the_projection(
    get_model: GetModel, batch: PhasedBatch, name: str, part: Part
) -> None:
    """What is seen of a sublayer explains how it changes the stream."""
    source, branch = get_model(name), Branch(2, part)
    with scheduled(source.model, full_schedule(source.identity)) as running:
        seen = run_window(running, batch, first=2, last=3, entry_BTH=None, points=[4, 5, 6], features_of=branch)
    spec, layer = source.checkpoint.architecture.spec, source.model.model.layers[2]
    projection = output_projection(layer, spec, part)
    assert seen.features_BTF is not None
    with torch.inference_mode():
        added_BTH = branch_factor(layer, spec) * projection(seen.features_BTF)
    before_BTH, after_BTH = seen.points_BTH[branch.reads], seen.points_BTH[branch.gives]
    torch.testing.assert_close(before_BTH + added_BTH, after_BTH)
