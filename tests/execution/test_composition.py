"""Both graphs as one model compute what they compute apart, from weights that are there once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from tests.conftest import MakeBundle
from tests.execution.test_session import continue_greedily, mixed, random_prompts
from tests.tiny_models import TinyModel
from voidprune.execution.composition import PHASE_INPUT, compose_graphs
from voidprune.execution.session import BundleSession
from voidprune.schedule import Boundary, dropped_schedule, full_schedule


def places(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Where the weights of a graph lie: file, offset, length."""
    return [
        tuple(entry.value for entry in weight.external_data)
        for weight in model.graph.initializer
        if weight.data_location == onnx.TensorProto.EXTERNAL
    ]


def test_nothing_is_lost_and_weights_are_named_once(llama: TinyModel, make_bundle: MakeBundle) -> None:
    folder = make_bundle(llama, mixed(llama)).folder
    apart = [onnx.load(folder / f"{phase}.onnx", load_external_data=False) for phase in ("prefill", "decode")]
    both = compose_graphs(folder / "prefill.onnx", folder / "decode.onnx", as_exported=True).model
    assert set(places(both)) == {place for model in apart for place in places(model)}
    assert len(places(both)) == len(set(places(both))) < sum(len(places(model)) for model in apart)
    inputs = {value.name for model in apart for value in model.graph.input}
    assert {value.name for value in both.graph.input} == inputs | {PHASE_INPUT}
    outputs = [value.name for value in both.graph.output]
    assert set(outputs) == {value.name for model in apart for value in model.graph.output}
    *constants, choose = both.graph.node
    branches = {attribute.name: attribute.g for attribute in choose.attribute}
    for model, branch, phase in zip(
        apart, (branches["then_branch"], branches["else_branch"]), ("prefill", "decode"), strict=True
    ):
        assert [value.name for value in branch.output] == [f"{phase}/{name}" for name in outputs]
        passed_through = set(outputs) - {value.name for value in model.graph.output}
        kinds = Counter(node.op_type for node in model.graph.node) + Counter({"Identity": len(passed_through)})
        assert Counter(node.op_type for node in (*branch.node, *constants)) == kinds
    assert {"Cos", "Sin"} <= {node.op_type for node in constants}, "tables are computed once, when the model is loaded"


@pytest.mark.parametrize("operators", ["ort", "standard"])
@pytest.mark.parametrize("boundary", list(Boundary))
def test_conversations_are_the_same(
    tiny_model: TinyModel, make_bundle: MakeBundle, boundary: Boundary, operators: str
) -> None:
    """Two turns of two rows of unequal length, every logit."""
    bundle = make_bundle(tiny_model, mixed(tiny_model, boundary=boundary), operators=operators)
    turns = [random_prompts(tiny_model, (5, 3), seed=seed) for seed in (1, 2)]
    found = []
    for prepack in (True, False):
        conversation = BundleSession(bundle.folder, prepack=prepack).start(2, max_positions=24)
        logits = []
        for prompts in turns:
            logits.append(conversation.prefill(prompts))
            logits += list(conversation.decode(np.array([[7, 8, 9], [10, 11, 12]])).transpose(1, 0, 2))
        found.append(np.stack(logits))
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)


def test_slots_that_a_phase_leaves_alone_keep_what_they_hold(llama: TinyModel, make_bundle: MakeBundle) -> None:
    """Prefill runs fewer layers than decode reads: every later step finds the K/V of the earlier ones."""
    schedules = [full_schedule(llama.identity), dropped_schedule(llama.identity, [1])]
    for schedule in [mixed(llama), mixed(llama, single_turn=True), *schedules]:
        folder = make_bundle(llama, schedule).folder
        said = [
            continue_greedily(
                BundleSession(folder, prepack=prepack).start(max_positions=64), [[5, 6, 7, 8]], num_tokens=40
            )
            for prepack in (True, False)
        ]
        np.testing.assert_array_equal(*said)
