"""What the parts of a model weigh, against the parts themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
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


def test_sizes_in_another_precision(tiny_model: TinyModel) -> None:
    whole, half = (measure_sizes(tiny_model.checkpoint, dtype=dtype) for dtype in (None, "BF16"))
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
