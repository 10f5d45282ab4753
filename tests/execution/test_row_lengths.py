"""Graphs that are told lengths count as those with a mask do; what is bound once is read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import TinyModel
from voidprune.execution.bindings import HostBinding
from voidprune.execution.node_writer import small_model
from voidprune.execution.providers import open_session
from voidprune.execution.row_lengths import LENGTHS, MASK, take_lengths
from voidprune.execution.session import BundleSession
from voidprune.schedule import Phase, full_schedule


def test_our_runner_tells_lengths_and_others_a_mask(llama: TinyModel, make_bundle: MakeBundle) -> None:
    folder = make_bundle(llama, mixed(llama)).folder
    ours, exported = BundleSession(folder), BundleSession(folder, as_exported=True)
    for session, name, other in ((ours, LENGTHS, MASK), (exported, MASK, LENGTHS)):
        for phase in Phase:
            inputs = {value.name for value in session.sessions[phase].get_inputs()}
            assert name in inputs
            assert other not in inputs
    prompts = random_prompts(llama, (7, 2, 4))
    found = []
    for session in (ours, exported):
        conversation = session.start(3, max_positions=40)
        logits = [conversation.prefill(prompts)]
        logits += [conversation.decode(np.full((3, 1), token))[:, -1] for token in (5, 6, 7)]
        logits.append(conversation.decode(np.full((3, 4), 8))[:, -1])
        logits.append(conversation.decode(np.full((3, 1), 9))[:, -1])
        found.append(np.stack(logits))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_what_is_counted_is_the_same(tmp_path: Path) -> None:
    """Tokens of each row, and of the longest."""
    nodes = [
        onnx.helper.make_node("ReduceSum", [MASK, "one"], ["counted"], keepdims=0),
        onnx.helper.make_node("Identity", ["counted"], ["ones"]),
        onnx.helper.make_node("Shape", [MASK], ["columns"], start=1, end=2),
    ]
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.INT64
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    outputs = [info("ones", kind, ["batch"]), info("columns", kind, [1])]
    graph = onnx.helper.make_graph(nodes, "counts", [info(MASK, kind, ["batch", "total"])], outputs, [one])
    mask_BS = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    counted = open_session(small_model(graph), tmp_path).run(None, {MASK: mask_BS})
    take_lengths([graph])
    told = open_session(small_model(graph), tmp_path).run(None, {LENGTHS: mask_BS.sum(-1)})
    assert [value.tolist() for value in told] == [value.tolist() for value in counted] == [[3, 5, 1], [5]]


def test_a_mask_that_is_more_than_counted_stays(llama: TinyModel, make_bundle: MakeBundle) -> None:
    folder = make_bundle(llama, full_schedule(llama.identity)).folder
    graphs = [onnx.load(folder / f"{phase}.onnx", load_external_data=False).graph for phase in ("prefill", "decode")]
    graphs[1].node.append(onnx.helper.make_node("Cast", [MASK], ["looked at"], to=onnx.TensorProto.FLOAT))
    before = [graph.SerializeToString(deterministic=True) for graph in graphs]
    take_lengths(graphs)
    assert [graph.SerializeToString(deterministic=True) for graph in graphs] == before
    del graphs[1].node[-1]
    take_lengths(graphs)
    assert all(LENGTHS in {value.name for value in graph.input} for graph in graphs)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_what_is_fed_in_place_is_what_is_read(llama: TinyModel, make_bundle: MakeBundle, on_cpu: bool) -> None:
    """Three times: as it was bound, changed in place, and of another shape; what the caller does with its array is its business."""
    session = make_bundle(llama, full_schedule(llama.identity)).session
    conversation = session.start(max_positions=20)
    conversation.prefill([[5, 6, 7]])
    binding = HostBinding(session.sessions[Phase.DECODE], on_cpu=on_cpu)
    for name, value in session.choices[Phase.DECODE].items():
        binding.bound.bind_cpu_input(name, value)
    for name, buffer in conversation.buffers.items():
        place = ("cpu", 0, np.float32, buffer.shape(), buffer.data_ptr())
        binding.bound.bind_input(name, *place)
        binding.bound.bind_output(name.replace("past_key_values", "present"), *place)
    results = []
    for tokens in ([[9]], [[11]], [[9, 11]]):
        expected = session.start(max_positions=20)
        expected.prefill([[5, 6, 7]])
        tokens_BT = np.array(tokens)
        binding.feed("input_ids", tokens_BT)
        binding.feed(LENGTHS, np.array([3 + len(tokens[0])]))
        shape = (1, len(tokens[0]), session.vocab_size)
        results.append(binding.bind_result("logits", shape, session.dtype, reuse=True))
        logits_BTV = expected.decode(tokens_BT)
        tokens_BT[...] = 0
        binding.run()
        np.testing.assert_array_equal(results[-1], logits_BTV)
    assert results[0] is results[1]
    assert results[2] is not results[1]
    assert binding.bind_result("logits", shape, session.dtype, reuse=False) is not results[2]
