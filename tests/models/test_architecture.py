"""How models are described: every kind of per-layer field, rope against transformers, and refusals by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.tiny_models import BASE, NUM_LAYERS, SHAPES, TinyModel
from voidprune.errors import ModelError
from voidprune.models.architecture import (
    FamilySpec,
    PerLayer,
    Rope,
    TensorNames,
    describe_architecture,
    layer_types,
    refuse_unknown_layer_fields,
    remap_config,
)
from voidprune.models.families import FAMILIES, LLAMA, MISTRAL, QWEN2, find_family, read_architecture

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


def saved_config(source: TinyModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    return config


# ---- fields that depend on the layer


def test_each_kind_of_field_is_remapped_in_its_way() -> None:
    assert remap_config(CONFIG, SPEC, (0, 3, 4)) == {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["a", "d", "e"],
        "moe_layers": [1],
        "first_k_dense_replace": 1,
        "layer_scale_kind": 9,
        "hidden_size": 64,
    }
    assert remap_config(CONFIG, SPEC, range(6)) == CONFIG


@given(st.sets(st.integers(0, 5), min_size=1))
def test_remapping_says_of_each_kept_layer_what_was_said_before(kept_set: set[int]) -> None:
    kept = sorted(kept_set)
    new = remap_config(CONFIG, SPEC, kept)
    assert new["num_hidden_layers"] == len(kept)
    for position, layer in enumerate(kept):
        assert new["mlp_layer_types"][position] == CONFIG["mlp_layer_types"][layer]
        assert (position in new["moe_layers"]) == (layer in CONFIG["moe_layers"])
        assert (position < new["first_k_dense_replace"]) == (layer < CONFIG["first_k_dense_replace"])


def test_remapping_leaves_absent_and_null_fields_alone() -> None:
    config = {"num_hidden_layers": 4, "moe_layers": None}
    assert remap_config(config, SPEC, (1, 2)) == {"num_hidden_layers": 2, "moe_layers": None}


def test_remapping_changes_a_copy() -> None:
    before = json.dumps(CONFIG)
    remap_config(CONFIG, SPEC, (1,))
    assert json.dumps(CONFIG) == before


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
    refuse_unknown_layer_fields(config, LLAMA)


# ---- sliding windows


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_layer_types_are_those_of_transformers(get_model: Callable[[str], TinyModel], name: str) -> None:
    source = get_model(name)
    expected = tuple(
        getattr(layer.self_attn, "sliding_window", getattr(source.model.config, "sliding_window", None))
        for layer in source.model.model.layers
    )
    assert source.checkpoint.architecture.windows == expected


@pytest.mark.parametrize("first", [0, 1, 3, 6, 9])
def test_qwen2_windows_from_a_threshold(first: int) -> None:
    config = {
        **BASE,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": first,
    }
    stock = AutoConfig.for_model(**config)
    assert layer_types(config, QWEN2) == tuple(stock.layer_types)
    windows = tuple(4 if kind == "sliding_attention" else None for kind in stock.layer_types)
    assert read_architecture(config).windows == windows


def test_qwen2_threshold_without_the_switch_means_nothing() -> None:
    config = {**BASE, "model_type": "qwen2", "sliding_window": 4, "max_window_layers": 2}
    assert read_architecture(config).windows == (None,) * NUM_LAYERS


def test_dropping_writes_out_which_layers_have_windows() -> None:
    config = {**BASE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    new = remap_config(config, QWEN2, (0, 3, 5))
    assert new["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert new["max_window_layers"] == 1
    assert read_architecture(new).windows == (None, 4, 4)
    assert read_architecture(remap_config(config, QWEN2, (4, 5))).windows == (4, 4)


@pytest.mark.parametrize("window", [None, 7])
def test_mistral_windows_are_for_all_layers(window: int | None) -> None:
    config = {**BASE, "model_type": "mistral", "sliding_window": window}
    assert read_architecture(config).windows == (window,) * NUM_LAYERS
    assert read_architecture(remap_config(config, MISTRAL, (1, 2))).windows == (window,) * 2


@pytest.mark.parametrize(
    "listed", [["full_attention"] * 5, ["full_attention"] * 5 + ["chunked_attention"], "full", 6, [[]] * 6]
)
def test_layer_types_that_say_something_else(listed: Any) -> None:
    with pytest.raises(ModelError, match=r"layer_types in config\.json does not say"):
        read_architecture({**BASE, "model_type": "qwen2", "layer_types": listed})


# ---- rotary embedding


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
@pytest.mark.parametrize("head_dim", [8, 16, 128])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = {**LLAMA_CONFIG, "head_dim": head_dim, "rope_parameters": rope}
    stock = AutoConfig.for_model(**config)
    if rope["rope_type"] == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        expected, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(stock)
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](stock, device="cpu")
    found = read_architecture(config).rope.inverse_frequencies(head_dim)
    assert scaling == 1.0
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_llama3_scaling_has_three_bands() -> None:
    """Short waves are kept, long ones are slowed by the factor, those between lie between."""
    plain = Rope(theta=500.0)
    scaled = Rope(
        theta=500.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64
    )
    ratio = plain.inverse_frequencies(64) / scaled.inverse_frequencies(64)
    waves = 2 * math.pi / plain.inverse_frequencies(64)
    np.testing.assert_allclose(ratio[waves < 16], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 64], 8.0, rtol=1e-6)
    between = ratio[(waves > 17) & (waves < 60)]
    assert between.size > 2
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ],
)
def test_spellings_of_transformers_4_and_5_mean_the_same(fields: dict[str, Any]) -> None:
    assert read_architecture({**LLAMA_CONFIG, **fields}).rope == Rope(theta=5000.0, kind="linear", factor=4.0)


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": None}, {"rope_theta": 10000.0}])
def test_rope_that_is_not_written_is_the_family_s(fields: dict[str, Any]) -> None:
    assert read_architecture({**LLAMA_CONFIG, **fields}).rope == Rope(theta=10000.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope"])
def test_rope_of_unknown_type_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"rotary embedding of type '{kind}' is not supported"):
        read_architecture({**LLAMA_CONFIG, "rope_scaling": {"rope_type": kind, "factor": 2.0}})


def test_partial_rotary_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=r"partial_rotary_factor 0\.5 is not supported"):
        read_architecture({**LLAMA_CONFIG, "partial_rotary_factor": 0.5})


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "llama3", "factor": 8.0}, "linear", [1]])
def test_broken_rope_is_a_named_error(rope: Any) -> None:
    with pytest.raises(ModelError):
        read_architecture({**LLAMA_CONFIG, "rope_scaling": rope})


# ---- the rest of the description


def test_description_of_the_fixtures(tiny_model: TinyModel) -> None:
    found, stock = tiny_model.checkpoint.architecture, tiny_model.model.config
    attention, mlp = tiny_model.model.model.layers[0].self_attn, tiny_model.model.model.layers[0].mlp
    assert found.num_layers == stock.num_hidden_layers
    assert found.hidden_size == stock.hidden_size
    assert found.intermediate_size == stock.intermediate_size
    assert found.num_heads == stock.num_attention_heads
    assert found.num_kv_heads == stock.num_key_value_heads
    assert found.head_dim == attention.head_dim
    assert found.vocab_size == stock.vocab_size
    assert found.context_length == stock.max_position_embeddings
    assert found.norm_epsilon == stock.rms_norm_eps
    assert found.tied_embeddings == stock.tie_word_embeddings
    assert found.qkv_bias == (attention.q_proj.bias is not None) == (attention.v_proj.bias is not None)
    assert found.output_bias == (attention.o_proj.bias is not None)
    assert found.mlp_bias == (mlp.gate_proj.bias is not None) == (mlp.down_proj.bias is not None)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config that says only what it must: what it leaves out is what transformers assumes."""
    spec = FAMILIES[model_type]
    stock = AutoConfig.for_model(model_type).to_dict()
    for name, value in spec.defaults.items():
        if name == "rope_theta":
            assert stock["rope_parameters"]["rope_theta"] == value
        elif name == "sliding_window" and model_type == "qwen2":
            continue  # transformers sets it to None when use_sliding_window is off
        elif name == "layer_types":
            assert set(stock["layer_types"]) == {"full_attention"}
        else:
            assert stock[name] == value, name


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


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_are_refused(activation: str) -> None:
    with pytest.raises(ModelError, match=f"llama with hidden_act '{activation}' is not supported"):
        read_architecture({**LLAMA_CONFIG, "hidden_act": activation})


def test_quantized_checkpoints_are_refused() -> None:
    with pytest.raises(ModelError, match="the checkpoint is quantized"):
        read_architecture({**LLAMA_CONFIG, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize("model_type", ["gemma3n", "", None, 7])
def test_unknown_family_is_refused(model_type: Any) -> None:
    with pytest.raises(ModelError, match=f"model_type {model_type!r} is not supported") as caught:
        find_family({"model_type": model_type})
    assert caught.value.hint == "supported: llama, mistral, qwen2 (voidprune families)"


def test_layer_of_a_tensor_name() -> None:
    names = TensorNames()
    assert names.layer_of("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    for other in ("model.norm.weight", "model.layers.x.weight", "model.layers.3", "model.layers_extra.3.weight"):
        assert names.layer_of(other) is None
    assert names.layer(3, names.query) == "model.layers.3.self_attn.q_proj"


def test_every_family_is_keyed_by_its_model_type() -> None:
    for model_type, spec in FAMILIES.items():
        assert spec.model_type == model_type
        assert spec.per_layer["num_hidden_layers"] is PerLayer.COUNT
        assert dataclasses.is_dataclass(describe_architecture({**BASE, "model_type": model_type}, spec))
