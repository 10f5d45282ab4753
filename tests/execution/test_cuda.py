"""What only a card can show. Where there is none the same is tried on the CPU, as far as that goes, so that it is known to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import GetModel
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import build_model
from voidprune.execution.device_weights import load_device_weights, weight_ranges
from voidprune.execution.providers import open_session
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.quantize import uniform_packing
from voidprune.pipeline.models import default_provider
from voidprune.quality.parity import verify_bundle
from voidprune.schedule import full_schedule

needs_card = pytest.mark.skipif(default_provider() != "cuda", reason="onnxruntime and torch see no GPU here")
PROVIDERS = ["cpu", pytest.param("cuda", marks=needs_card)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"precision": "fp16"}, id="fp16"),
        pytest.param({"precision": "bf16"}, id="bf16", marks=needs_card),
        pytest.param({"packing": {"precision": "int4", "activations": "fp16"}}, id="int4"),
        pytest.param({"packing": {"precision": "int8", "activations": "fp16", "block_size": 128}}, id="int8"),
        pytest.param({"precision": "fp32", "operators": "standard"}, id="standard-fp32"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi3"])
def test_graphs_are_right_and_captured_steps_say_the_same(
    get_model: GetModel, tmp_path: Path, name: str, settings: dict[str, Any], provider: str
) -> None:
    if provider == "cpu" and settings.get("precision") == "bf16":
        pytest.skip("onnxruntime has no bf16 on the CPU")
    model = get_model(name)
    schedule = mixed(model)
    packing = settings.get("packing")
    export_bundle(
        model.checkpoint,
        schedule,
        tmp_path / "bundle",
        verify=lambda stage: verify_bundle(stage, source=model.checkpoint, schedule=schedule, provider=provider),
        formats=("onnx",),
        precision=settings.get("precision", "keep"),
        operators=settings.get("operators", "ort"),
        packing=None if packing is None else uniform_packing(num_layers=len(schedule.union), **packing),
    )
    session = BundleSession(tmp_path / "bundle", provider=provider)
    prompts = random_prompts(model, [5, 3])
    said = session.generate(prompts, max_new_tokens=12)
    assert session.lives_on_device == (provider == "cuda")
    if provider == "cuda":
        assert session.weight_copies == 1
        assert session.captures_left
    session.captures_left, session._spare = 0, None
    assert session.generate(prompts, max_new_tokens=12) == said


@needs_card
def test_a_second_session_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    source = build_model(
        "llama", tmp_path / "source", hidden_size=2048, intermediate_size=8192, num_attention_heads=16, head_dim=128
    )
    schedule = full_schedule(source.identity)
    folder = tmp_path / "bundle"
    export_bundle(source.checkpoint, schedule, folder, verify=lambda _: None, formats=("onnx",), precision="fp16")
    graphs = [folder / "prefill.onnx", folder / "decode.onnx"]
    weights = load_device_weights({graph.name: weight_ranges(graph) for graph in graphs}, device="cuda")
    sessions, free = [], [torch.cuda.mem_get_info()[0]]
    for graph in graphs:
        sessions.append(open_session(graph, folder, provider="cuda", weights=weights.values[graph.name]))
        free.append(torch.cuda.mem_get_info()[0])
    assert weights.num_bytes > 700_000_000
    assert free[1] - free[2] < weights.num_bytes / 4
