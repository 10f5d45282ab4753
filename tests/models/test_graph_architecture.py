"""What graphs need to know: windows, rotary frequencies against transformers, and refusals that say what to do instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.tiny_models import (
    BASE,
    GRAPH_SHAPES,
    NUM_LAYERS,
    SHAPES,
    TRANSFORMERS,
    TinyModel,
    spell_for_transformers_4,
)
from voidprune.errors import ModelError
from voidprune.models.architecture import Config
from voidprune.models.configs import remap_config
from voidprune.models.families import FAMILIES, find_family, read_architecture
from voidprune.models.graph_architecture import GraphArchitecture, Rope, describe_graph_architecture, layer_types

QWEN2, MISTRAL = FAMILIES["qwen2"], FAMILIES["mistral"]
LLAMA_CONFIG = {**BASE, "model_type": "llama"}


def read_graph(config: Config) -> GraphArchitecture:
    return describe_graph_architecture(config, find_family(config))


def graph_of(source: TinyModel) -> GraphArchitecture:
    return read_graph(source.checkpoint.config)


# ---- sliding windows


@pytest.mark.parametrize("name", sorted(GRAPH_SHAPES))
def test_layer_types_are_those_of_transformers(get_model: Callable[[str], TinyModel], name: str) -> None:
    source = get_model(name)
    expected = tuple(
        getattr(layer.self_attn, "sliding_window", getattr(source.model.config, "sliding_window", None))
        for layer in source.model.model.layers
    )
    assert graph_of(source).windows == expected


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
    assert read_graph(config).windows == windows


def test_qwen2_threshold_without_the_switch_means_nothing() -> None:
    config = {**BASE, "model_type": "qwen2", "sliding_window": 4, "max_window_layers": 2}
    assert read_graph(config).windows == (None,) * NUM_LAYERS


def test_dropping_writes_out_which_layers_have_windows() -> None:
    config = {**BASE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    new = remap_config(config, QWEN2, (0, 3, 5))
    assert new["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert new["max_window_layers"] == 1
    assert read_graph(new).windows == (None, 4, 4)
    assert read_graph(remap_config(config, QWEN2, (4, 5))).windows == (4, 4)


@pytest.mark.parametrize("window", [None, 7])
def test_mistral_windows_are_for_all_layers(window: int | None) -> None:
    config = {**BASE, "model_type": "mistral", "sliding_window": window}
    assert read_graph(config).windows == (window,) * NUM_LAYERS
    assert read_graph(remap_config(config, MISTRAL, (1, 2))).windows == (window,) * 2


@pytest.mark.parametrize(
    "listed", [["full_attention"] * 5, ["full_attention"] * 5 + ["chunked_attention"], "full", 6, [[]] * 6]
)
def test_layer_types_that_say_something_else(listed: Any) -> None:
    with pytest.raises(ModelError, match=r"layer_types in config\.json"):
        read_graph({**BASE, "model_type": "qwen2", "layer_types": listed})


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
    if TRANSFORMERS < 5:
        config = spell_for_transformers_4(config)
    stock = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
    found = read_graph(config).rope.inverse_frequencies(head_dim)
    assert stock.attention_scaling == 1.0
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, stock.inv_freq.numpy(), rtol=1e-6)


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
    assert read_graph({**LLAMA_CONFIG, **fields}).rope == Rope(theta=5000.0, kind="linear", factor=4.0)


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": None}, {"rope_theta": 10000.0}])
def test_rope_that_is_not_written_is_the_family_s(fields: dict[str, Any]) -> None:
    assert read_graph({**LLAMA_CONFIG, **fields}).rope == Rope(theta=10000.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "mrope"])
def test_rope_of_unknown_type_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"with a rotary embedding of type '{kind}'"):
        read_graph({**LLAMA_CONFIG, "rope_scaling": {"rope_type": kind, "factor": 2.0}})


def test_partial_rotary_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=r"partial_rotary_factor 0\.5"):
        read_graph({**LLAMA_CONFIG, "partial_rotary_factor": 0.5})


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "llama3", "factor": 8.0}, "linear", [1]])
def test_broken_rope_is_a_named_error(rope: Any) -> None:
    with pytest.raises(ModelError):
        read_graph({**LLAMA_CONFIG, "rope_scaling": rope})


# ---- the rest


def test_description_of_the_fixtures(tiny_model: TinyModel) -> None:
    found, stock = graph_of(tiny_model), tiny_model.model.config
    attention, mlp = tiny_model.model.model.layers[0].self_attn, tiny_model.model.model.layers[0].mlp
    assert found.intermediate_size == stock.intermediate_size
    assert found.head_dim == attention.head_dim
    assert found.norm_epsilon == stock.rms_norm_eps
    assert found.qkv_bias == (attention.q_proj.bias is not None) == (attention.v_proj.bias is not None)
    assert found.output_bias == (attention.o_proj.bias is not None)
    assert found.mlp_bias == (mlp.gate_proj.bias is not None) == (mlp.down_proj.bias is not None)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_have_no_graph_but_a_slim_checkpoint(activation: str) -> None:
    config = {**LLAMA_CONFIG, "hidden_act": activation}
    with pytest.raises(ModelError, match=f"no ONNX graphs are made of llama with hidden_act '{activation}'") as caught:
        read_graph(config)
    assert caught.value.hint == "export with --format hf"
    assert read_architecture(config).num_layers == NUM_LAYERS


def test_quantized_checkpoints_have_no_graph_but_a_slim_checkpoint() -> None:
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ModelError, match="no ONNX graphs are made of a checkpoint that is quantized already"):
        read_graph(config)
    assert read_architecture(config).num_layers == NUM_LAYERS


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {SHAPES[name][0] for name in GRAPH_SHAPES}))
def test_families_without_graphs_are_refused_with_the_way_out(get_model: Callable[[str], TinyModel], name: str) -> None:
    with pytest.raises(ModelError, match=f"no ONNX graphs are made of {name} models") as caught:
        graph_of(get_model(name))
    assert caught.value.hint == "export with --format hf"
