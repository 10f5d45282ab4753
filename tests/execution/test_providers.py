"""Sessions are opened on what was asked for, with the weights in memory once, or not at all."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.conftest import Bundle, MakeBundle
from tests.execution.test_session import mixed
from tests.tiny_models import TinyModel, build_model
from voidprune.execution.providers import PROVIDERS, open_sessions, stray_operators
from voidprune.execution.session import element_type
from voidprune.export.bundle import export_bundle
from voidprune.schedule import Phase, full_schedule

MEMORY = """
import re, sys
from pathlib import Path
from voidprune.execution.session import BundleSession

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tiny, large = map(Path, sys.argv[1:])
for folder in (tiny, large):  # the first brings what onnxruntime takes for any model
    before = anonymous_bytes()
    session = BundleSession(folder)
    assert session.weight_copies == 1
    session.generate([[5, 6, 7, 8]], max_new_tokens=3)
print(anonymous_bytes() - before)
"""


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle) -> Bundle:
    return make_bundle(llama, mixed(llama))


def test_what_runs_elsewhere_is_named(bundle: Bundle) -> None:
    for session in bundle.session.sessions.values():
        assert stray_operators(session, wanted=PROVIDERS["cpu"]) == []
        strays = stray_operators(session, wanted=PROVIDERS["cuda"])
        assert {"FusedMatMul", "GroupQueryAttention"} <= set(strays)
        assert not {"Shape", "Squeeze", "ReduceSum"} & set(strays), "counting tokens is fine anywhere"


def test_one_graph_for_both_phases_is_one_session(bundle: Bundle) -> None:
    decode = bundle.manifest.graphs[Phase.DECODE]
    single = dataclasses.replace(bundle.manifest, graphs={Phase.PREFILL: decode, Phase.DECODE: decode})
    assert set(open_sessions(bundle.folder, single, provider="cpu").by_file) == {"decode.onnx"}
    both = open_sessions(bundle.folder, bundle.manifest, provider="cpu")
    assert set(both.by_file) == {"prefill.onnx", "decode.onnx"}
    assert (both.weight_copies, both.device_bytes) == (1, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_no_session_makes_a_copy_of_its_weights(bundle: Bundle, tmp_path: Path) -> None:
    """Memory that is not mapped from a file grows by far less than the weights when both sessions load and run."""
    large = build_model(
        "llama", tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=4, vocab_size=4096
    )
    export_bundle(large.checkpoint, full_schedule(large.identity), tmp_path / "bundle", verify=lambda _: None)
    weights = (tmp_path / "bundle" / "model.safetensors").stat().st_size
    assert weights > 50_000_000
    command = [sys.executable, "-c", MEMORY, str(bundle.folder), str(tmp_path / "bundle")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < weights / 4


@pytest.mark.usefixtures("bundle")
def test_bfloat16_comes_to_the_host_as_it_is() -> None:
    """As logits do: an output bound to a numpy buffer. onnxruntime itself has no numpy type for it."""
    node = onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.BFLOAT16)
    shapes = [
        onnx.helper.make_tensor_value_info(name, kind, [3])
        for name, kind in (("x", onnx.TensorProto.FLOAT), ("y", onnx.TensorProto.BFLOAT16))
    ]
    graph = onnx.helper.make_graph([node], "cast", shapes[:1], shapes[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # as in every session of ours: the process has one pool
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = np.empty(3, ml_dtypes.bfloat16)
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.array([1.0, -2.5, 3.14159], np.float32))
    binding.bind_output("y", "cpu", 0, element_type(found.dtype), found.shape, found.ctypes.data)
    session.run_with_iobinding(binding)
    assert found.astype(np.float32).tolist() == [1.0, -2.5, 3.140625]
    assert int(found.argmax()) == 2
