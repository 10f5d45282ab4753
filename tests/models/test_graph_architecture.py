"""What graphs need to know, against the modules that transformers builds, and refusals that say what to do instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

from tests.tiny_models import (
    BASE,
    GRAPH_SHAPES,
    NUM_LAYERS,
    SHAPES,
    TinyModel,
)
from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers
from voidprune.models.architecture import Config
from voidprune.models.configs import remap_config
from voidprune.models.families import FAMILIES, find_family, read_architecture
from voidprune.models.graph_architecture import Activation, GraphArchitecture, describe_graph_architecture, layer_types

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
    architecture, config = graph_of(source), source.model.config.get_text_config()
    layers = decoder_layers(source.model, architecture.spec.modules)
    # Attention modules keep their window, or the config's is every layer's; EXAONE keeps the config's in all and says which.
    expected = tuple(
        getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
        if getattr(layer.self_attn, "is_sliding", True)
        else None
        for layer in layers
    )
    assert architecture.windows == expected


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


# ---- the rest


def test_description_of_the_fixtures(graph_model: TinyModel) -> None:
    """Against the modules that transformers built of the same config."""
    found, stock = graph_of(graph_model), graph_model.model.config.get_text_config()
    names, layer = found.spec.tensors, decoder_layers(graph_model.model, found.spec.modules)[0]
    assert found.intermediate_size == stock.intermediate_size
    assert found.head_dim == layer.self_attn.head_dim
    assert found.score_scale == pytest.approx(layer.self_attn.scaling, rel=1e-12)

    def has_bias(suffix: str) -> bool:
        return layer.get_submodule(suffix).bias is not None

    for suffix in (names.query, names.value) if names.fused_qkv is None else (names.fused_qkv,):
        assert found.qkv_bias == has_bias(suffix)
    assert found.output_bias == has_bias(names.output)
    for suffix in (names.up, names.down) if names.fused_gate_up is None else (names.fused_gate_up, names.down):
        assert found.mlp_bias == has_bias(suffix)
    assert found.gated == hasattr(layer.mlp, "gate_proj" if names.fused_gate_up is None else "gate_up_proj")
    for suffix in (names.attention_norm, names.attention_post_norm, names.mlp_post_norm):
        if suffix is not None:
            norm = layer.get_submodule(suffix)
            epsilons = [value for name, value in vars(norm).items() if "eps" in name]
            assert epsilons == [found.norm_epsilon]
            assert found.norm_bias == (getattr(norm, "bias", None) is not None)
    if found.spec.model_type in ("cohere", "cohere2", "stablelm"):
        assert found.parallel == (getattr(layer, "post_attention_layernorm", None) is None)


def test_scales_and_caps_of_the_families_that_have_them(get_model: Callable[[str], TinyModel]) -> None:
    granite = graph_of(get_model("granite"))
    assert (granite.residual_scale, granite.embedding_scale, granite.score_scale) == (0.6, 3.0, 0.3)
    assert granite.logit_scale == 2.0  # logits are divided by 0.5
    gemma2 = graph_of(get_model("gemma2"))
    assert (gemma2.score_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma2.embedding_scale == math.sqrt(32)
    assert gemma2.score_scale == pytest.approx(8**-0.5)
    llama = graph_of(get_model("llama"))
    assert (llama.residual_scale, llama.embedding_scale, llama.logit_scale) == (1.0, 1.0, 1.0)
    assert (llama.score_softcap, llama.logit_softcap) == (None, None)
    assert read_graph({**BASE, "model_type": "cohere"} | {"rope_theta": 10000.0}).logit_scale == 0.0625


def test_which_layers_are_rotated(get_model: Callable[[str], TinyModel]) -> None:
    def rotated(name: str) -> list[int]:
        return [int(rope is not None) for rope in graph_of(get_model(name)).ropes]

    assert rotated("llama") == [1] * NUM_LAYERS
    assert rotated("smollm3") == [1, 0, 1, 1, 0, 1]
    assert rotated("cohere2") == [1, 0, 0, 1, 1, 0]  # those with a window
    assert rotated("exaone4") == [1, 1, 0, 1, 1, 0]  # the same
    assert rotated("exaone4-no-windows") == [1] * NUM_LAYERS


def test_legacy_gelu_of_gemma_is_the_approximation() -> None:
    config = {**BASE, "model_type": "gemma", "hidden_act": "gelu"}
    assert read_graph(config).activation is Activation.GELU_TANH
    assert read_graph({**LLAMA_CONFIG, "hidden_act": "gelu"}).activation is Activation.GELU


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_settings_that_mean_another_computation_are_refused(model_type: str) -> None:
    with pytest.raises(ModelError, match="with use_bidirectional_attention True") as caught:
        read_graph({**BASE, "model_type": model_type, "use_bidirectional_attention": True})
    assert caught.value.hint == "export with --format hf"


@pytest.mark.parametrize("value", ["big", None, True, [1]])
def test_a_number_that_is_none_is_named(value: Any) -> None:
    with pytest.raises(ModelError, match=r"rms_norm_eps in config\.json is"):
        read_graph({**LLAMA_CONFIG, "rms_norm_eps": value})


@pytest.mark.parametrize("activation", ["relu", "gelu_10", "quick_gelu"])
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
    assert caught.value.hint == "export with --format hf; Optimum makes one graph of some of those: docs/optimum.md"
