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

# Each family as it is, then what its members may differ in: name -> (model_type, config fields).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in FAMILIES},
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
    "mistral-window": ("mistral", {"sliding_window": 5, "hidden_size": 32, "head_dim": 8}),
    "mistral-window-fused-rope": ("mistral", {"sliding_window": 5}),
    "qwen2-tied": ("qwen2", {"hidden_size": 32, "tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
}


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


def build_model(name: str, folder: Path, **overrides: Any) -> TinyModel:
    """Write the model of SHAPES[name] into a folder, with a few config fields changed."""
    model_type, fields = SHAPES[name]
    if "rope_parameters" in fields and int(transformers.__version__.split(".")[0]) < 5:
        rope = dict(fields["rope_parameters"])
        fields = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**BASE, **fields, **overrides}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero: swapping or forgetting one would not show.
            if parameter_name.endswith(".bias"):
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.3)
    model.save_pretrained(folder)
    return TinyModel(name, folder)
