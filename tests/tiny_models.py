"""Tiny models with random weights, one for every way in which a supported family can be shaped. Stock transformers builds them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.models.families import FAMILIES
from voidprune.models.pretrained import load_model
from voidprune.schedule import ModelIdentity

TRANSFORMERS = int(transformers.__version__.split(".")[0])
NUM_LAYERS = 6
BASE: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.15,  # with the usual 0.02 logits are near zero, and no error would show
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LITTLE: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
EXPERTS: Mapping[str, Any] = {**LITTLE, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: Mapping[str, Any] = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED_LAYERS = [SLIDING, FULL, FULL, SLIDING, SLIDING, FULL]
LONG_AND_SHORT = {"rope_theta": 5000.0, "rope_type": "default"}, {"rope_theta": 300.0, "rope_type": "default"}
VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What a family needs to be tiny, and the fields that matter set: windows, kinds of layers, dense layers among experts.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {**LITTLE, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "gemma": {**LITTLE, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {**LITTLE, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **LITTLE,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": MIXED_LAYERS,
        "rope_parameters": {FULL: LONG_AND_SHORT[0], SLIDING: LONG_AND_SHORT[1]},
    },
    "gemma3": {
        "text_config": {**LITTLE, "head_dim": 8, "sliding_window": 4, "layer_types": MIXED_LAYERS},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 97,
        "eoi_token_index": 98,
        "image_token_index": 99,
    },
    "phi3": {**LITTLE, "sliding_window": 5},
    "granite": {
        **LITTLE,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.5,
    },
    "smollm3": {
        **LITTLE,
        "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "olmo2": LITTLE,
    "olmo3": {**LITTLE, "sliding_window": 4},
    "cohere": {**LITTLE, "use_qk_norm": True, "logit_scale": 1.0},
    "cohere2": {**LITTLE, "sliding_window": 4, "layer_types": MIXED_LAYERS, "logit_scale": 1.0},
    "glm4": {**LITTLE, "head_dim": 8},
    "starcoder2": {**LITTLE, "sliding_window": 5},
    "stablelm": {**LITTLE, "use_qkv_bias": True},
    "exaone4": {**LITTLE, "sliding_window": 4, "sliding_window_pattern": 3},
    "mixtral": {**LITTLE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "gpt_oss": {**LITTLE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1},
}

# Each family as it is, then what its members may differ in: name -> (model_type, config fields).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, dict(FAMILY_FIELDS[model_type])) for model_type in FAMILIES},
    "llama-tied-small-heads": ("llama", {"hidden_size": 32, "head_dim": 8, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-wide-heads": ("llama", {"hidden_size": 48, "num_attention_heads": 2, "head_dim": 32, "vocab_size": 128}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-rope-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 40,
            }
        },
    ),
    "olmo3-rope-yarn": (
        "olmo3",
        {
            **LITTLE,
            "sliding_window": 4,
            "rope_parameters": {
                FULL: {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 40,
                },
                SLIDING: {"rope_type": "default", "rope_theta": 500000.0},  # 4.57 has one base for both
            },
        },
    ),
    "qwen3-fused-rope": ("qwen3", {**LITTLE, "head_dim": 16, "attention_bias": True}),
    "phi3-longrope": (
        "phi3",
        {
            **LITTLE,
            "original_max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 5.0, 9.0],
                "original_max_position_embeddings": 40,
            },
        },
    ),
    "phi3-partly-rotated-fused": (
        "phi3",
        {
            **LITTLE,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4-fused-rope": ("glm4", {**LITTLE, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "cohere-plain-heads": ("cohere", {**LITTLE, "logit_scale": 1.0, "attention_bias": True}),
    "gemma3_text-capped": ("gemma3_text", {**LITTLE, "head_dim": 16, "final_logit_softcapping": 3.0}),
    "mistral-window": ("mistral", {"sliding_window": 5, "hidden_size": 32, "head_dim": 8}),
    "mistral-window-fused-rope": ("mistral", {"sliding_window": 5}),
    "qwen2-tied": ("qwen2", {"hidden_size": 32, "tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "stablelm-parallel": ("stablelm", {**LITTLE, "use_parallel_residual": True}),
    "phi3-partly-rotated": (
        "phi3",
        {**LITTLE, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "exaone4-no-windows": ("exaone4", {**LITTLE, "sliding_window": None, "layer_types": [FULL] * NUM_LAYERS}),
    "deepseek_v2-one-query": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 4}),
}
if TRANSFORMERS >= 5:  # 4.57 cannot make one from its config: its initializer wants a bias of norms that have none
    SHAPES["stablelm-normed-heads"] = ("stablelm", {**LITTLE, "qk_layernorm": True})
CORE_SHAPES = [name for name, (model_type, _) in SHAPES.items() if model_type in ("llama", "mistral", "qwen2")]
GRAPH_SHAPES = [name for name, (model_type, _) in SHAPES.items() if FAMILIES[model_type].graph is not None]


@dataclass(frozen=True)
class TinyModel:
    """A model folder, with what the tests ask of it most."""

    name: str
    folder: Path

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder, name=self.name)

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        return self.checkpoint.identity

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.folder)


def spell_for_transformers_4(fields: dict[str, Any]) -> dict[str, Any]:
    """The same config with the rotary embedding in the words of 4.57."""
    if "rope_parameters" not in fields:
        return fields
    rope = dict(fields["rope_parameters"])
    rest = {name: value for name, value in fields.items() if name != "rope_parameters"}
    if FULL in rope:
        return {**rest, "rope_theta": rope[FULL]["rope_theta"], "rope_local_base_freq": rope[SLIDING]["rope_theta"]}
    spelled = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {**rest, **spelled, "rope_scaling": None if rope["rope_type"] == "default" else rope}


def build_model(name: str, folder: Path, **overrides: Any) -> TinyModel:
    """Write the model of SHAPES[name] into a folder, with a few config fields changed."""
    model_type, fields = SHAPES[name]
    if TRANSFORMERS < 5:
        fields = spell_for_transformers_4(fields)
    torch.manual_seed(sum(map(ord, name)))
    if "text_config" in fields:
        fields = {**fields, "text_config": {**BASE, **fields["text_config"], **overrides}}
        config = AutoConfig.for_model(model_type, **fields)
    else:
        config = AutoConfig.for_model(model_type, **{**BASE, **fields, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero: swapping or forgetting one would not show.
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
    model.save_pretrained(folder)
    return TinyModel(name, folder)
