"""The table of supported families. Literals only: **add a family here**.

A family is supported exactly when its conformance test passes (tiny random weights, logits against stock transformers). The
defaults are those of the configuration classes in transformers 4.57 and 5.23.
"""

from __future__ import annotations

from typing import Any

from voidprune.errors import ModelError
from voidprune.models.architecture import (
    Config,
    DecoderArchitecture,
    FamilySpec,
    PerLayer,
    Windows,
    describe_architecture,
)

LLAMA = FamilySpec(
    model_type="llama",
    title="Llama 2, 3, 3.1, 3.2 and models of the same architecture",
    per_layer={"num_hidden_layers": PerLayer.COUNT},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)

MISTRAL = FamilySpec(
    model_type="mistral",
    title="Mistral 7B and models of the same architecture",
    per_layer={"num_hidden_layers": PerLayer.COUNT},
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    windows=Windows.ALL_LAYERS,
)

QWEN2 = FamilySpec(
    model_type="qwen2",
    title="Qwen2 and Qwen2.5",
    per_layer={
        "num_hidden_layers": PerLayer.COUNT,
        "layer_types": PerLayer.LIST,
        "max_window_layers": PerLayer.THRESHOLD,
    },
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "layer_types": None,
    },
    qkv_bias=True,
    windows=Windows.LAYER_TYPES,
)

FAMILIES: dict[str, FamilySpec] = {spec.model_type: spec for spec in (LLAMA, MISTRAL, QWEN2)}


def find_family(config: Config) -> FamilySpec:
    """The family of a `config.json`. Raises ModelError, naming the supported ones."""
    model_type: Any = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not supported",
            hint=f"supported: {', '.join(sorted(FAMILIES))} (voidprune families)",
        )
    return FAMILIES[model_type]


def read_architecture(config: Config) -> DecoderArchitecture:
    """Describe a model of any supported family. Raises ModelError."""
    return describe_architecture(config, find_family(config))
