"""What the authored graphs ask of a family beyond its checkpoint: how a layer computes. Pure values, filled in `families_*.py`.

A setting that differs from model to model is the name of the config field that says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Norm(StrEnum):
    """How the family normalizes."""

    RMS = "rms"
    RMS_PLUS_ONE = "rms_plus_one"  # the weight that is stored is the scale minus one (Gemma)
    LAYER = "layer"  # mean and variance


class HeadNorm(StrEnum):
    """How queries and keys are normalized before they are rotated."""

    NONE = "none"
    EACH = "each"  # every head by itself, with one weight for all (Qwen3)
    EACH_ITS_OWN = "each_its_own"  # every head by itself, each with a weight of its own (Command R)
    ALL = "all"  # all heads as one vector (OLMo 2)


class Windows(StrEnum):
    """How a family says which layers attend to a sliding window only."""

    NEVER = "never"
    ALL_LAYERS = "all_layers"  # every layer, when `sliding_window` is set (Mistral)
    LAYER_TYPES = "layer_types"  # those that the list says (Qwen2)


class Rotated(StrEnum):
    """Which layers have a rotary embedding."""

    ALL = "all"
    LISTED = "listed"  # those with an entry other than 0 in `no_rope_layers` (SmolLM3)
    WINDOWED = "windowed"  # those with a window (Command R7B)
    WINDOWED_OR_ALL = "windowed_or_all"  # those with a window; all, where the model has no `sliding_window` (EXAONE 4)


@dataclass(frozen=True)
class GraphSpec:
    """How the layers of a family compute.

    A flag is True, False, or the config field that says so; a number is a number, None, or a field. `norm_bias`: norms
    of layers and the last one have biases. `parallel`: attention and MLP read the same norm of the same state.
    `activation` and `norm_epsilon` are fields. `query_scale`: scores are divided by the square root of this field;
    `score_multiplier`: or multiplied by this one; else divided by the root of the head size. `embedding_multiplier`: a field, or
    "sqrt_hidden_size". `logit_divisor`, `logit_multiplier`, `score_softcap`, `logit_softcap`, `residual_multiplier`: fields.
    `scales_full_layers_only`: one `rope_scaling` for the model is that of its layers without a window.
    `required`: fields whose other values would mean another computation.
    """

    norm: Norm = Norm.RMS
    norm_bias: bool = False
    norm_epsilon: str = "rms_norm_eps"
    activation: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    gated: bool = True
    parallel: bool | str = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norm: HeadNorm = HeadNorm.NONE
    has_head_norm: bool | str = True
    windows: Windows = Windows.NEVER
    rotated: Rotated = Rotated.ALL
    interleaved: bool = False
    scales_full_layers_only: bool = False
    query_scale: str | None = None
    score_multiplier: str | None = None
    score_softcap: str | None = None
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    required: Mapping[str, Any] = field(default_factory=dict)
