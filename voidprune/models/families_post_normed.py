"""Families that normalize what a sublayer gives before it joins the residual stream. Literals only: **add a family here**.

Sources as in `families_dense.py`.
"""

from __future__ import annotations

from typing import Any

from voidprune.models.architecture import FamilySpec, ModulePaths, PerLayer, TensorNames
from voidprune.models.families_dense import COUNT, SILU_AND_RMS
from voidprune.models.graph_spec import GraphSpec, HeadNorm, Norm, Rotated, Windows
from voidprune.models.layer_lists import EveryNth

# Norms around both sublayers (Gemma 2, Gemma 3): the norm behind a sublayer is what joins the residual stream.
SANDWICHED = ModulePaths(attention_branch="post_attention_layernorm", mlp_branch="post_feedforward_layernorm")
SANDWICHED_NAMES: dict[str, Any] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attention_parts": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "mlp_parts": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
}
# Norms behind the sublayers only (OLMo 2 and 3, EXAONE 4).
POST_NORMED = SANDWICHED
POST_NORMED_NAMES = TensorNames(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
    attention_parts=("self_attn", "post_attention_layernorm"),
    kv_parts=("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"),
    mlp_parts=("mlp", "post_feedforward_layernorm"),
)

GEMMA2 = FamilySpec(
    model_type="gemma2",
    title="Gemma 2",
    per_layer=COUNT | {"layer_types": PerLayer.LIST},
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "layer_types": None,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
    },
    layer_lists={"layer_types": EveryNth(2)},
    tensors=TensorNames(**SANDWICHED_NAMES),
    modules=SANDWICHED,
    graph=GraphSpec(
        norm=Norm.RMS_PLUS_ONE,
        activation="hidden_activation",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows=Windows.LAYER_TYPES,
        query_scale="query_pre_attn_scalar",
        score_softcap="attn_logit_softcapping",
        embedding_multiplier="sqrt_hidden_size",
        logit_softcap="final_logit_softcapping",
        required={"use_bidirectional_attention": None},
    ),
)

GEMMA3_TEXT = FamilySpec(
    model_type="gemma3_text",
    title="Gemma 3, text only",
    per_layer=COUNT
    | {
        "layer_types": PerLayer.LIST,
        "sliding_window_pattern": PerLayer.PERIOD,
        "_sliding_window_pattern": PerLayer.PERIOD,  # written by 5.x beside layer_types, read by nobody
    },
    defaults={
        "tie_word_embeddings": True,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "layer_types": None,
        "sliding_window_pattern": 6,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    layer_lists={"layer_types": EveryNth("sliding_window_pattern")},
    tensors=TensorNames(**SANDWICHED_NAMES),
    modules=SANDWICHED,
    graph=GraphSpec(
        norm=Norm.RMS_PLUS_ONE,
        activation="hidden_activation",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_norm=HeadNorm.EACH,
        windows=Windows.LAYER_TYPES,
        query_scale="query_pre_attn_scalar",
        embedding_multiplier="sqrt_hidden_size",
        logit_softcap="final_logit_softcapping",
        # transformers 5.23 reads attn_logit_softcapping and does not apply it (models/gemma3, Gemma3Attention.forward).
        required={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
    local_rope_theta="rope_local_base_freq",
)

GEMMA3 = FamilySpec(
    model_type="gemma3",
    title="Gemma 3 with images: layers of its language model go, its vision tower stays",
    per_layer=GEMMA3_TEXT.per_layer,
    defaults=GEMMA3_TEXT.defaults,
    layer_lists=GEMMA3_TEXT.layer_lists,
    tensors=TensorNames(
        embedding="language_model.model.embed_tokens",
        layers="language_model.model.layers",
        final_norm="language_model.model.norm",
        head="language_model.lm_head",
        **SANDWICHED_NAMES,
    ),
    modules=ModulePaths(
        layers="model.language_model.layers",
        attention_branch=SANDWICHED.attention_branch,
        mlp_branch=SANDWICHED.mlp_branch,
    ),
    graph=GEMMA3_TEXT.graph,
    text_config="text_config",
    local_rope_theta="rope_local_base_freq",
)

OLMO2 = FamilySpec(
    model_type="olmo2",
    title="OLMo 2",
    per_layer=COUNT,
    defaults=SILU_AND_RMS
    | {
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    tensors=POST_NORMED_NAMES,
    modules=POST_NORMED,
    graph=GraphSpec(qkv_bias="attention_bias", output_bias="attention_bias", head_norm=HeadNorm.ALL),
)

OLMO3 = FamilySpec(
    model_type="olmo3",
    title="OLMo 3",
    per_layer=COUNT | {"layer_types": PerLayer.LIST},
    defaults={
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "layer_types": None,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    layer_lists={"layer_types": EveryNth(4)},
    tensors=POST_NORMED_NAMES,
    modules=POST_NORMED,
    graph=GraphSpec(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_norm=HeadNorm.ALL,
        windows=Windows.LAYER_TYPES,
        scales_full_layers_only=True,
    ),
)

GLM4 = FamilySpec(
    model_type="glm4",
    title="GLM-4-0414, dense",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    graph=GraphSpec(qkv_bias="attention_bias", interleaved=True),
    tensors=TensorNames(
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        fused_gate_up="mlp.gate_up_proj",
        attention_parts=("input_layernorm", "self_attn", "post_self_attn_layernorm"),
        mlp_parts=("post_attention_layernorm", "mlp", "post_mlp_layernorm"),
    ),
    modules=ModulePaths(attention_branch="post_self_attn_layernorm", mlp_branch="post_mlp_layernorm"),
)

EXAONE4 = FamilySpec(
    model_type="exaone4",
    title="EXAONE 4.0",
    per_layer=COUNT
    | {
        "layer_types": PerLayer.LIST,  # where there are windows, layers without one are not rotated
        "sliding_window_pattern": PerLayer.PERIOD,
    },
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "layer_types": None,
        "sliding_window_pattern": 4,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    graph=GraphSpec(head_norm=HeadNorm.EACH, windows=Windows.LAYER_TYPES, rotated=Rotated.WINDOWED_OR_ALL),
    layer_lists={"layer_types": EveryNth("sliding_window_pattern")},
    tensors=POST_NORMED_NAMES,
    modules=POST_NORMED,
)

POST_NORMED_FAMILIES = (GEMMA2, GEMMA3_TEXT, GEMMA3, OLMO2, OLMO3, GLM4, EXAONE4)
