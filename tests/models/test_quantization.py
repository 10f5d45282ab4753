"""Checkpoints that are quantized already: copied where each tensor belongs to one layer, else refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.quantization import Renumbering, check_quantization, renumber_module_names, weights_in
from voidprune.models.sizes import measure_sizes

KEPT = (1, 2, 5)
RENUMBERING = Renumbering({1: 0, 2: 1, 5: 2}, ("model.layers", "model.layers"))
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}


def quantize(source: TinyModel, folder: Path, quantization: dict[str, Any]) -> Path:
    """Tensors as GPTQ names and shapes them, eight weights in an int32. The numbers mean nothing."""
    shutil.copytree(source.folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        sizes = {"qweight": (columns // 8, rows), "qzeros": (columns // 8, rows // 8)}
        for part, shape in sizes.items():
            tensors[f"{stem}.{part}"] = torch.randint(
                -(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32
            )
        tensors[f"{stem}.scales"] = torch.rand(columns // 8, rows, generator=generator).half()
        tensors[f"{stem}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 8
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def test_quantized_layers_are_copied_bit_by_bit(llama: TinyModel, tmp_path: Path) -> None:
    source = open_checkpoint(quantize(llama, tmp_path / "source", GPTQ))
    assert source.dtype == "F32"
    (tmp_path / "slim").mkdir()
    write_slim_checkpoint(source, KEPT, tmp_path / "slim")
    before = safetensors.torch.load_file(tmp_path / "source" / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "slim" / "model.safetensors")
    expected = {name: value for name, value in before.items() if ".layers." not in name}
    for position, layer in enumerate(KEPT):
        prefix = f"model.layers.{layer}."
        for name, value in before.items():
            if name.startswith(prefix):
                expected[f"model.layers.{position}.{name.removeprefix(prefix)}"] = value
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "slim" / "config.json").read_text())["quantization_config"] == GPTQ
    assert open_checkpoint(tmp_path / "slim").architecture.num_layers == 3


def test_sizes_of_a_quantized_checkpoint(llama: TinyModel, tmp_path: Path) -> None:
    """The same weights in fewer bytes."""
    whole = measure_sizes(llama.checkpoint)
    found = measure_sizes(open_checkpoint(quantize(llama, tmp_path / "source", GPTQ)))
    assert found.total_bytes < whole.total_bytes
    for one, other in zip(whole.layers, found.layers, strict=True):
        assert (one.attention_weights, one.kv_weights, one.mlp_weights) == (
            other.attention_weights,
            other.kv_weights,
            other.mlp_weights,
        )
        assert other.attention_bytes + other.mlp_bytes == other.total_bytes < one.total_bytes
    assert found.kv_bytes_per_token == whole.kv_bytes_per_token


@pytest.mark.parametrize(
    ("name", "shape", "quantization", "expected"),
    [
        ("self_attn.q_proj.weight", (64, 32), None, 2048),
        ("self_attn.q_proj.bias", (64,), None, 0),
        ("mlp.experts.down_proj_bias", (4, 32), None, 0),
        ("mlp.experts.down_proj", (4, 48, 32), None, 6144),
        ("mlp.down_proj.qweight", (12, 64), {"bits": 4}, 6144),
        ("mlp.down_proj.qweight", (12, 64), {"bits": 8}, 3072),
        ("mlp.down_proj.qzeros", (12, 64), {"bits": 8}, 0),
        ("mlp.down_proj.weight_packed", (12, 64), {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 6144),
        ("mlp.down_proj.weight_scale", (12, 64), {}, 0),
        ("mlp.down_proj.weight_scale_inv", (12, 64), {}, 0),
        ("mlp.experts.gate_up_proj_blocks", (4, 96, 1, 16), {}, 12288),
        ("mlp.experts.gate_up_proj_scales", (4, 96, 1), {}, 0),
    ],
)
def test_weights_in_a_tensor(name: str, shape: tuple[int, ...], quantization: Any, expected: int) -> None:
    assert weights_in(name, shape, quantization) == expected


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4"])
def test_methods_whose_layers_can_be_cut_apart(method: str) -> None:
    check_quantization({"quant_method": method})
    check_quantization(None)


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "bitsandbytes"}, {"bits": 4}, {"quant_method": None}, "gptq"]
)
def test_other_methods_are_refused(llama: TinyModel, quantization: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ModelError, match="the checkpoint is quantized by") as caught:
        open_checkpoint(folder)
    assert "start from the checkpoint that was quantized" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"ignored_layers": ["model.layers.2.mlp.gate", "model.layers.3.mlp.gate", "lm_head"]},
            {"ignored_layers": ["model.layers.1.mlp.gate", "lm_head"]},
        ),
        (
            {"modules_to_not_convert": ["layers.5.mlp", "visual"]},
            {"modules_to_not_convert": ["layers.2.mlp", "visual"]},
        ),
        ({"modules_to_not_convert": None}, {"modules_to_not_convert": None}),
        (
            {"modules_to_not_convert": ["model.layers.*.self_attn"]},
            {"modules_to_not_convert": ["model.layers.*.self_attn"]},
        ),
        ({"ignore": ["re:.*lm_head", "re:.*mlp.gate$"]}, {"ignore": ["re:.*lm_head", "re:.*mlp.gate$"]}),
        (
            {"extra_config": {"model.layers.1.mlp": {"bits": 8}, "model.layers.4.mlp": {"bits": 16}}},
            {"extra_config": {"model.layers.0.mlp": {"bits": 8}}},
        ),
        ({"ignore": ["vision_tower.encoder.layers.3.mlp"]}, {"ignore": ["vision_tower.encoder.layers.3.mlp"]}),
        ({"ignore": ["base.model.layers.5"]}, {"ignore": ["base.model.layers.2"]}),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"]}}},
            {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        ),
        (
            {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
        ),
    ],
)
def test_names_of_layers_are_changed(given: Any, expected: Any) -> None:
    assert renumber_module_names(given, RENUMBERING) == expected


@pytest.mark.parametrize(
    "pattern",
    [r"re:.*layers\.(0|1)\..*", r"re:model.layers.3.*", r"-:.*\.18\..*", r"+:model\.layers\.2\.", r"layers\.[0-4]\."],
)
def test_patterns_with_layer_numbers_are_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match="which may depend on the number of the layer"):
        renumber_module_names({"ignore": [pattern]}, RENUMBERING)
    with pytest.raises(ModelError, match="which may depend on the number of the layer"):
        renumber_module_names({"dynamic": {pattern: {}}}, RENUMBERING)


def test_names_reach_the_slim_config(llama: TinyModel, tmp_path: Path, get_model: Callable[[str], TinyModel]) -> None:
    quantization = {**GPTQ, "modules_to_not_convert": ["model.layers.3.mlp", "model.layers.5.mlp"]}
    source = open_checkpoint(quantize(llama, tmp_path / "source", quantization))
    (tmp_path / "slim").mkdir()
    write_slim_checkpoint(source, KEPT, tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.2.mlp"]
