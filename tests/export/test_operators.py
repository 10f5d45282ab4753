"""Both operator sets: equal to the reference, and the standard one in any runtime that knows the standard."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from tests.conftest import Bundle, MakeBundle
from tests.export.test_onnx_graph import (
    MIXED_DECODE,
    MIXED_PREFILL,
    assert_equal_to_reference,
    make_schedule,
    verified_parity,
)
from tests.strategies import schedules
from tests.tiny_models import TinyModel
from voidprune.schedule import Phase, full_schedule

PROMPT = [5, 9, 17, 3, 44, 21, 8, 80, 33, 2, 11, 60, 7]


def test_whole_model_equals_reference(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(graph_model, full_schedule(graph_model.identity), operators="standard")
    assert_equal_to_reference(bundle.parity)


def test_mixed_schedule_equals_reference(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = make_schedule(graph_model.identity, MIXED_PREFILL, MIXED_DECODE)
    assert_equal_to_reference(make_bundle(graph_model, schedule, operators="standard").parity)


@settings(max_examples=1)
@given(data=st.data())
def test_random_schedules_equal_reference(graph_model: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(graph_model.identity))
    assert_equal_to_reference(verified_parity(graph_model, schedule, operators="standard"))


def test_each_set_keeps_to_its_domains(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = make_schedule(graph_model.identity, MIXED_PREFILL, MIXED_DECODE)
    for operators, domains in (("standard", {""}), ("ort", {"", "com.microsoft"})):
        bundle = make_bundle(graph_model, schedule, operators=operators)
        assert bundle.manifest.operators == operators
        for phase in Phase:
            model = onnx.load(bundle.folder / f"{phase}.onnx", load_external_data=False)
            assert {node.domain for node in model.graph.node} == domains
            assert {opset.domain for opset in model.opset_import} == domains
            if operators == "standard":
                onnx.checker.check_model(bundle.folder / f"{phase}.onnx", full_check=True)


def run_by_the_onnx_reference(bundle: Bundle, prompt: list[int], steps: list[int]) -> list[np.ndarray[Any, Any]]:
    """Logits of the last token of a prompt and after each step, by the evaluator that comes with onnx."""
    graphs = {phase: ReferenceEvaluator(onnx.load(bundle.folder / f"{phase}.onnx")) for phase in Phase}
    num_positions = len(prompt) + len(steps)
    shapes = {
        value.name: [1, *(dim.dim_value or num_positions for dim in value.type.tensor_type.shape.dim[1:])]
        for evaluator in graphs.values()
        for value in evaluator.proto_.graph.input
        if value.name.startswith("past_key_values")
    }
    cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    logits = []

    def run(phase: Phase, tokens: list[int], length: int) -> None:
        names = [name for name in graphs[phase].input_names if name in cache]
        feeds = {name: cache[name] for name in names}
        feeds |= {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, length), np.int64)}
        found, *present = graphs[phase].run(None, feeds)
        for name, value in zip(graphs[phase].output_names[1:], present, strict=True):
            cache[name.replace("present", "past_key_values")] = value
        logits.append(found[:, -1])

    run(Phase.PREFILL, prompt, len(prompt))
    for number, token in enumerate(steps, start=1):
        run(Phase.DECODE, [token], len(prompt) + number)
    return logits


def test_the_reference_evaluator_of_onnx_agrees(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(
        graph_model, make_schedule(graph_model.identity, MIXED_PREFILL, MIXED_DECODE), operators="standard"
    )
    steps = [12, 70]
    conversation = bundle.session.start(max_positions=len(PROMPT) + len(steps))
    expected = [conversation.prefill([PROMPT]), *(conversation.decode(np.array([[token]]))[:, -1] for token in steps)]
    found = run_by_the_onnx_reference(bundle, PROMPT, steps)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("operators", ["ort", "standard"])
def test_graphs_stay_small(graph_model: TinyModel, make_bundle: MakeBundle, operators: str) -> None:
    bundle = make_bundle(graph_model, full_schedule(graph_model.identity), operators=operators)
    assert sum((bundle.folder / f"{phase}.onnx").stat().st_size for phase in Phase) < 200_000
