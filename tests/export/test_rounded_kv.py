"""Graphs with keys and values in 8 bits: their steps are found again, and without them they are the graphs of the same model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.conftest import MakeBundle
from tests.execution.test_session import mixed
from tests.tiny_models import TinyModel
from voidprune.execution.kv_cache import KvSteps
from voidprune.export.onnx_graph import author_decode, author_prefill, graph_slots
from voidprune.export.rounded_kv import hold_exactly, read_steps
from voidprune.models.checkpoint import open_checkpoint
from voidprune.schedule import Phase

AUTHORS = {Phase.PREFILL: author_prefill, Phase.DECODE: author_decode}


def some_steps(model: TinyModel, num_slots: int) -> list[KvSteps]:
    shape = (model.checkpoint.architecture.num_kv_heads, model.checkpoint.architecture.head_dim)
    random = np.random.default_rng(0)
    return [KvSteps(*(random.uniform(0.01, 0.1, shape).astype(np.float32) for _ in range(2))) for _ in range(num_slots)]


def outline(model: ir.Model) -> Sequence[object]:
    """Operators in order, with their attributes and how many inputs they have; inputs and outputs with their types."""
    nodes = [
        (node.op_type, len(node.inputs), sorted((name, str(one.value)) for name, one in node.attributes.items()))
        for node in model.graph
    ]
    return [nodes, *((value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs))]


@pytest.mark.parametrize("phase", list(Phase))
def test_steps_are_found_and_without_them_nothing_is_rounded(
    graph_model: TinyModel, make_bundle: MakeBundle, phase: Phase
) -> None:
    folder, author = make_bundle(graph_model, mixed(graph_model)).folder, AUTHORS[phase]
    checkpoint = open_checkpoint(folder)
    schedule = mixed(graph_model).on_slim_model(checkpoint.identity)
    steps = some_steps(graph_model, len(schedule.kv_layers))
    model = author(checkpoint, schedule, kv_steps=steps)
    cached = [value for value in (*model.graph.inputs, *model.graph.outputs) if "." in (value.name or "")]
    assert {value.dtype for value in cached} == {ir.DataType.INT8}
    found = read_steps(model)
    assert tuple(found) == graph_slots(schedule, phase)
    for slot, one in found.items():
        assert np.array_equal(one.keys_NH, steps[slot].keys_NH)
        assert np.array_equal(one.values_NH, steps[slot].values_NH)
    hold_exactly(model)
    expected = author(checkpoint, schedule)
    RemoveUnusedNodesPass()(expected)
    assert outline(model) == outline(expected)
