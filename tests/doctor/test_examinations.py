"""Examinations in this process: what they find of what is really installed."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from voidprune.doctor.children import run_examination
from voidprune.doctor.examinations import (
    EXAMINATIONS,
    ONE_NODE,
    load_libraries,
    look_at_runtime,
    open_model,
)
from voidprune.pipeline.models import demo_folder


def test_the_model_of_one_node_is_valid() -> None:
    model = onnx.load_from_string(ONE_NODE)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_the_runtime_describes_its_own_files() -> None:
    found = look_at_runtime()
    assert found["version"] == ort.__version__
    assert found["providers"] == ort.get_available_providers()
    assert (found["cuda"] is not None) == ("CUDAExecutionProvider" in found["providers"])


def test_the_cpu_provider_runs_a_graph() -> None:
    """In a process of its own, as always: the threads of onnxruntime are those of the process, and tests here have theirs."""
    found = run_examination("provider", "CPUExecutionProvider", timeout=3600)
    assert found == {"got": ["CPUExecutionProvider"]}


def test_libraries_that_are_there_and_not() -> None:
    found = load_libraries("libc.so.6", "libnosuch.so.1")
    assert found["libc.so.6"] is None
    assert "libnosuch.so.1" in str(found["libnosuch.so.1"])


def test_a_model_is_measured_by_its_headers() -> None:
    found = open_model(str(demo_folder()))
    assert (found["model_type"], found["num_layers"], found["dtype"]) == ("llama", 12, "F32")
    size = (demo_folder() / "model.safetensors").stat().st_size
    assert 0.99 * size < found["stored_bytes"] == found["fp32_bytes"] <= size
    assert 0 < found["part_bytes"] < found["fp32_bytes"] / 2
    assert not found["is_remote"]


@pytest.mark.parametrize("config", [None, "{", json.dumps({"model_type": "mamba", "num_hidden_layers": 2})])
def test_a_folder_that_is_no_model_says_why(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    found = open_model(str(tmp_path))
    assert found["failure"]
    assert found["hint"]


def test_every_examination_can_be_asked_for() -> None:
    assert set(EXAMINATIONS) == {
        "import", "transformers", "torch", "runtime", "provider", "libraries", "driver", "hub", "model",
    }  # fmt: skip
