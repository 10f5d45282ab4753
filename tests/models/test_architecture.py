"""How models are described: what a slim checkpoint must know of any family, and refusals by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from tests.tiny_models import BASE, NUM_LAYERS, TinyModel
from voidprune.errors import ModelError
from voidprune.models.architecture import (
    FamilySpec,
    PerLayer,
    TensorNames,
    refuse_unknown_layer_fields,
    text_config,
)
from voidprune.models.configs import remap_config
from voidprune.models.families import FAMILIES, read_architecture

SPEC = FamilySpec(
    model_type="made_up",
    title="A family with every kind of field",
    per_layer={
        "num_hidden_layers": PerLayer.COUNT,
        "mlp_layer_types": PerLayer.LIST,
        "moe_layers": PerLayer.INDICES,
        "first_k_dense_replace": PerLayer.THRESHOLD,
        "layer_scale_kind": PerLayer.INERT,
    },
    defaults={},
)
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 6,
    "mlp_layer_types": ["a", "b", "c", "d", "e", "f"],
    "moe_layers": [1, 3, 5],
    "first_k_dense_replace": 3,
    "layer_scale_kind": 9,
    "hidden_size": 64,
}
LLAMA_CONFIG = {**BASE, "model_type": "llama"}


# ---- fields that depend on the layer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_rope_layers", [1, 0, 1, 0, 1, 1]),
        ("per_thing", ["x"] * 6),
        ("num_kv_shared_layers", 2),
        ("no_rope_layer_interval", 4),
        ("mlp_only_layers", []),
        ("num_nextn_predict_layers", 1),
    ],
)
@pytest.mark.parametrize("act", [refuse_unknown_layer_fields, lambda config, spec: remap_config(config, spec, (0,))])
def test_unknown_field_is_refused_by_name(name: str, value: Any, act: Callable[[Any, FamilySpec], Any]) -> None:
    with pytest.raises(ModelError) as caught:
        act({**CONFIG, name: value}, SPEC)
    assert caught.value.message == f"config.json has {name}, which may depend on the layer and is unknown for made_up"
    assert caught.value.hint is not None
    assert name in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer_norm_eps", 1e-5), ("use_layer_norm", True), ("architectures", ["One"]), ("layers_kind", None)],
)
def test_harmless_fields_are_not_refused(name: str, value: Any) -> None:
    refuse_unknown_layer_fields({**CONFIG, name: value}, SPEC)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_end_tokens_are_no_list_of_layers(num_layers: int) -> None:
    """Llama 3 has three of them; a model cut to three layers is still a Llama."""
    config = {**LLAMA_CONFIG, "num_hidden_layers": num_layers, "eos_token_id": [128001, 128008, 128009][:num_layers]}
    refuse_unknown_layer_fields(config, FAMILIES["llama"])


# ---- the description


def test_description_of_the_fixtures(family_model: TinyModel) -> None:
    found = family_model.checkpoint.architecture
    stock = family_model.model.config.get_text_config()
    assert found.num_layers == stock.num_hidden_layers == NUM_LAYERS
    assert found.hidden_size == stock.hidden_size
    assert found.num_heads == stock.num_attention_heads
    assert found.num_kv_heads == stock.num_key_value_heads
    assert found.vocab_size == stock.vocab_size
    assert found.context_length == stock.max_position_embeddings
    embedding, head = family_model.model.get_input_embeddings(), family_model.model.get_output_embeddings()
    assert found.tied_embeddings == (head.weight is embedding.weight)
    assert found.experts_per_token == getattr(stock, "num_experts_per_tok", 0)


def test_width_of_keys_and_values_is_what_the_cache_holds(family_model: TinyModel) -> None:
    """transformers 4.57 caches all heads of latent attention; 5.23 the latent vector."""
    if family_model.checkpoint.architecture.spec.compressed_kv and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 does not cache latent vectors")
    cache = DynamicCache()
    with torch.inference_mode():
        family_model.model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 3 * family_model.checkpoint.architecture.kv_width


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_missing_field_is_named(name: str) -> None:
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != name}
    with pytest.raises(ModelError, match=f"config.json lacks {name}"):
        read_architecture(config)


@pytest.mark.parametrize("value", [0, -1, 2.5, "6", True, [6]])
def test_count_that_is_no_count(value: Any) -> None:
    with pytest.raises(ModelError, match=re.escape(f"num_hidden_layers in config.json is {value!r}")):
        read_architecture({**LLAMA_CONFIG, "num_hidden_layers": value})


def test_absent_kv_heads_and_head_size_follow_from_the_others() -> None:
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "num_key_value_heads"}
    found = read_architecture(config)
    assert (found.num_kv_heads, found.head_dim) == (4, 16)
    assert read_architecture({**config, "head_dim": None, "num_key_value_heads": None}) == found


@pytest.mark.parametrize("nested", [None, [], "gemma3_text"])
def test_nested_config_must_be_there(nested: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json of a gemma3 model has no object text_config"):
        text_config({"model_type": "gemma3", "text_config": nested}, FAMILIES["gemma3"])


def test_layer_of_a_tensor_name() -> None:
    names = TensorNames()
    assert names.layer_of("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    for other in ("model.norm.weight", "model.layers.x.weight", "model.layers.3", "model.layers_extra.3.weight"):
        assert names.layer_of(other) is None
    assert names.layer(3, names.query) == "model.layers.3.self_attn.q_proj"
