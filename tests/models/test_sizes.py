"""What the parts of a model weigh, against the parts themselves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers
from voidprune.models.checkpoint import WEIGHTS_FILE, open_checkpoint
from voidprune.models.sizes import measure_sizes


def num_bytes(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def num_weights(*modules: nn.Module) -> int:
    """Numbers in matrices: what a product reads."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters() if parameter.ndim == 2)


def test_parts_weigh_what_the_modules_weigh(tiny_model: TinyModel) -> None:
    sizes, model = measure_sizes(tiny_model.checkpoint), tiny_model.model
    for found, layer in zip(sizes.layers, model.model.layers, strict=True):
        attention = layer.self_attn
        assert found.total_bytes == num_bytes(layer)
        assert found.attention_bytes == num_bytes(layer.input_layernorm, attention)
        assert found.kv_bytes == num_bytes(layer.input_layernorm, attention.k_proj, attention.v_proj)
        assert found.mlp_bytes == num_bytes(layer.post_attention_layernorm, layer.mlp)
        assert found.attention_weights == num_weights(attention)
        assert found.kv_weights == num_weights(attention.k_proj, attention.v_proj)
        assert found.mlp_weights == num_weights(layer.mlp)
    assert sizes.total_bytes == tiny_model.checkpoint.num_bytes == num_bytes(model)
    assert sizes.head_bytes == num_bytes(model.lm_head)
    assert sizes.head_weights == num_weights(model.lm_head)
    keys = model.model.layers[0].self_attn.k_proj.out_features
    assert sizes.kv_bytes_per_token == 2 * keys * 4


def test_every_tensor_of_a_layer_is_of_attention_or_mlp(family_model: TinyModel) -> None:
    """Stored bytes; of experts, all of them."""
    checkpoint = family_model.checkpoint
    every_expert = dataclasses.replace(checkpoint.architecture, experts_per_token=99)
    whole = dataclasses.replace(checkpoint)
    whole.__dict__["architecture"] = every_expert  # the cached property
    sizes = measure_sizes(whole)
    layers = decoder_layers(family_model.model, checkpoint.architecture.spec.modules)
    for found, layer in zip(sizes.layers, layers, strict=True):
        buffers = sum(
            buffer.nbytes for name, buffer in layer.named_buffers() if name.endswith("e_score_correction_bias")
        )
        assert found.attention_bytes + found.mlp_bytes == found.total_bytes == num_bytes(layer) + buffers
        assert 0 < found.kv_bytes < found.attention_bytes
        assert 0 < found.kv_weights < found.attention_weights
    assert sizes.total_bytes == checkpoint.num_bytes


@pytest.mark.parametrize(
    ("name", "attention", "mlp", "kv"),
    [
        ("qwen3", 3072, 4608, 1024),
        ("phi3", 3072, 4608, 1024),
        ("glm4", 3072, 4608, 1024),
        ("starcoder2", 3072, 3072, 1024),
        ("mixtral", 3072, 2 * 4608 + 4 * 32, 1024),
        ("gpt_oss", 3072, 2 * 4608 + 4 * 32, 1024),
        # q_a, q_b, kv_a, kv_b and output; router, two of four experts and the shared one; kv_a alone is what K/V need.
        ("deepseek_v3", 32 * 16 + 16 * 48 + 32 * 20 + 16 * 56 + 24 * 32, 4 * 32 + 3 * 1536, 32 * 20),
    ],
)
def test_weights_by_hand(get_model: Callable[[str], TinyModel], name: str, attention: int, mlp: int, kv: int) -> None:
    """Hidden size 32, 4 query and 2 K/V heads of 8, an MLP of 48; of experts, those that a token runs."""
    found = measure_sizes(get_model(name).checkpoint).layers[-1]
    assert (found.attention_weights, found.mlp_weights, found.kv_weights) == (attention, mlp, kv)
    assert found.mlp_bytes >= 4 * mlp


def test_a_token_reads_some_experts_only(get_model: Callable[[str], TinyModel]) -> None:
    source = get_model("qwen3_moe")
    dense, sparse = measure_sizes(source.checkpoint).layers[4], measure_sizes(source.checkpoint).layers[5]
    assert dense.attention_bytes + dense.mlp_bytes == dense.total_bytes
    expert = 3 * 32 * 16 * 4
    assert sparse.attention_bytes + sparse.mlp_bytes + 2 * expert == sparse.total_bytes


def test_sizes_in_another_precision(family_model: TinyModel) -> None:
    whole, half = (measure_sizes(family_model.checkpoint, dtype=dtype) for dtype in (None, "BF16"))
    assert 2 * half.total_bytes == whole.total_bytes
    assert 2 * half.kv_bytes_per_token == whole.kv_bytes_per_token
    assert 2 * half.head_bytes == whole.head_bytes
    assert half.layers[0].mlp_weights == whole.layers[0].mlp_weights


def test_layers_beyond_the_config_are_a_named_error(llama: TinyModel, tmp_path: Path) -> None:
    """A config that was cut by hand, or extra prediction layers: the file holds more than the config speaks of."""
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="layer"):
        measure_sizes(open_checkpoint(folder))


def test_missing_head_is_a_named_error(llama: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        measure_sizes(open_checkpoint(folder))
