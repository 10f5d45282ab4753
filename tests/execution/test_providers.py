"""Sessions are opened on what was asked for, with the weights in memory once, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.conftest import W8A8, Bundle, GetModel, MakeBundle
from tests.execution.test_session import mixed
from tests.tiny_models import TinyModel, build_model
from voidprune.errors import RuntimeProviderError
from voidprune.execution import providers
from voidprune.execution.bindings import element_type
from voidprune.execution.providers import (
    PROVIDERS,
    configured,
    open_session,
    open_sessions,
    refuse_softcap,
    stray_operators,
)
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.quantize import uniform_packing
from voidprune.schedule import Phase, full_schedule

MEMORY = """
import dataclasses, re, sys
from pathlib import Path
from voidprune.execution.manifest import read_manifest
from voidprune.execution.providers import open_sessions
from voidprune.execution.session import BundleSession
from voidprune.schedule import Phase

def anonymous_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tiny, large = map(Path, sys.argv[1:3])
for folder in (tiny, large):  # the first brings what onnxruntime takes for any model
    before = anonymous_bytes()
    if sys.argv[3] == "decode alone":
        manifest = read_manifest(folder)
        manifest = dataclasses.replace(manifest, graphs=dict.fromkeys(Phase, manifest.graphs[Phase.DECODE]))
        opened = open_sessions(folder, manifest, provider="cpu")
    else:
        session = BundleSession(folder, prepack=sys.argv[3] == "packed")
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


def test_weights_are_in_memory_once_packed_or_not(bundle: Bundle) -> None:
    decode = bundle.manifest.graphs[Phase.DECODE]
    single = dataclasses.replace(bundle.manifest, graphs={Phase.PREFILL: decode, Phase.DECODE: decode})
    for manifest, prepack, num_sessions in (
        (single, True, 1),
        (single, False, 1),
        (bundle.manifest, True, 1),
        (bundle.manifest, False, 2),
    ):
        opened = open_sessions(bundle.folder, manifest, provider="cpu", prepack=prepack)
        assert len(set(map(id, opened.by_phase.values()))) == num_sessions
        assert (opened.weight_copies, opened.device_bytes) == (1, None)
        assert opened.last_only == {Phase.PREFILL: manifest is bundle.manifest, Phase.DECODE: False}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("precision", ["fp32", "int4", W8A8])
def test_weights_are_laid_out_once_for_both_phases_or_stay_in_their_file(
    bundle: Bundle, tmp_path: Path, precision: str
) -> None:
    """Memory that is not mapped from a file, when both phases have loaded and run: all matrices once, or none."""
    large = build_model(
        "llama", tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=6, vocab_size=4096
    )
    packing = None if precision == "fp32" else uniform_packing(precision, 6)
    export_bundle(
        large.checkpoint,
        full_schedule(large.identity),
        tmp_path / "bundle",
        verify=lambda _: None,
        formats=("hf", "onnx") if packing is None else ("onnx",),
        packing=packing,
    )
    weights = sum(file.stat().st_size for file in (tmp_path / "bundle").glob("*.safetensors"))

    def grown(placing: str) -> float:
        command = [sys.executable, "-c", MEMORY, str(bundle.folder), str(tmp_path / "bundle"), placing]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / weights

    if packing is None:
        assert weights > 70_000_000
        assert grown("mapped") < 0.25
        assert 0.7 < grown("packed") < 1.3
    else:  # no kernel runs on bits that are not laid out
        assert weights > 10_000_000
        alone = grown("decode alone")
        assert alone > 1
        assert grown("packed") - alone < 0.5, "laid out twice, it would be once more"


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


@pytest.mark.integer_products
def test_a_processor_whose_products_overflow_is_refused(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32,767 is the most that a sum of two products in 16 bits keeps."""
    schedule = full_schedule(llama.identity)
    manifest = export_bundle(
        llama.checkpoint,
        schedule,
        tmp_path / "bundle",
        verify=lambda _: None,
        formats=("onnx",),
        packing=uniform_packing("w8a8", len(schedule.union)),
    )
    assert set(open_sessions(tmp_path / "bundle", manifest, provider="cpu").by_phase) == set(Phase)
    monkeypatch.setattr(providers, "_integer_product", lambda: 32.0 * 32767 - 64 * 128 * 127)
    with pytest.raises(RuntimeProviderError, match="products of them overflow") as caught:
        open_sessions(tmp_path / "bundle", manifest, provider="cpu")
    assert "--precision int8" in str(caught.value.hint)


def test_attention_whose_scores_are_capped_is_refused_on_cuda(
    get_model: GetModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on a card: without the cap logits were off by what the cap changes."""
    monkeypatch.setattr(providers, "can_load", lambda _: False)
    for name, refused in (("gemma2", True), ("gemma", False)):
        model = get_model(name)
        bundle = make_bundle(model, full_schedule(model.identity))
        graphs = [bundle.folder / graph.file for graph in bundle.manifest.graphs.values()]
        with (
            pytest.raises(RuntimeProviderError, match="caps attention scores") if refused else contextlib.nullcontext()
        ):
            refuse_softcap(graphs)
        if refused:
            with pytest.raises(RuntimeProviderError, match="leaves that out on CUDA") as caught:
                BundleSession(bundle.folder, provider="cuda")
            assert caught.value.hint == "use --provider cpu"


def test_a_graph_that_cannot_be_captured_is_opened_without(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of older exports are."""
    asked = []

    def refusing(graph, folder, **options):
        asked.append((graph.name, options.get("captures", False)))
        if options.get("captures"):
            raise providers._NotCapturedError("This session cannot use the graph capture feature")
        return open_session(graph, folder, **options)

    monkeypatch.setattr(providers, "open_session", refusing)
    graphs = {phase: bundle.folder / graph.file for phase, graph in bundle.manifest.graphs.items()}
    opened = providers._open_on_device(graphs, provider="cpu")
    assert asked == [("decode.onnx", True), ("decode.onnx", False), ("prefill.onnx", False)]
    assert not opened.captures
    assert set(opened.by_phase) == set(Phase)
    monkeypatch.setattr(providers, "open_session", open_session)
    assert providers._open_on_device(graphs, provider="cpu").captures


def test_float32_stays_float32_on_cuda() -> None:
    name, options = configured("cuda", captures=True)
    assert name == PROVIDERS["cuda"]
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "1")
    assert configured("cuda")[1]["enable_cuda_graph"] == "0"
    assert configured("cpu") == PROVIDERS["cpu"]
