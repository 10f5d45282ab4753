"""Families with mixtures of experts. Literals only: **add a family here**, and to the table in `families.py`.

Sources as in `families_dense.py`.
"""

from __future__ import annotations

from typing import Any

from voidprune.models.architecture import FamilySpec, ModulePaths, PerLayer, TensorNames
from voidprune.models.families_dense import COUNT
from voidprune.models.layer_lists import AndNotEveryNth, EveryNth

MIXTRAL = FamilySpec(
    model_type="mixtral",
    title="Mixtral",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
    },
    # In files `block_sparse_moe`, in the modules of 5.x `mlp`.
    tensors=TensorNames(mlp_parts=("post_attention_layernorm", "block_sparse_moe"), experts="block_sparse_moe.experts"),
    modules=ModulePaths(mlp_in_transformers_4="block_sparse_moe"),
)

QWEN3_MOE = FamilySpec(
    model_type="qwen3_moe",
    title="Qwen3, mixture of experts",
    per_layer=COUNT
    | {
        "mlp_only_layers": PerLayer.INDICES,
        "decoder_sparse_step": PerLayer.PERIOD,  # gone: its default, 1, leaves it to mlp_only_layers
        "max_window_layers": PerLayer.THRESHOLD,  # in published configs; transformers does not read it
    },
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
    },
    layer_lists={"mlp_only_layers": AndNotEveryNth("decoder_sparse_step")},
    aliases=(("num_experts", "num_local_experts"),),
)

GPT_OSS = FamilySpec(
    model_type="gpt_oss",
    title="gpt-oss",
    per_layer=COUNT | {"layer_types": PerLayer.LIST},
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 4,
        "layer_types": None,
    },
    layer_lists={"layer_types": EveryNth(2)},
)

# What keys and values need, up to the latent vector that is cached.
LATENT_NAMES = TensorNames(
    kv_parts=("input_layernorm", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm"),
)
DEEPSEEK_LAYERS = COUNT | {
    "first_k_dense_replace": PerLayer.THRESHOLD,
    "moe_layer_freq": PerLayer.PERIOD,
    "num_nextn_predict_layers": PerLayer.EXTRA,
}
DEEPSEEK_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

DEEPSEEK_V2 = FamilySpec(
    model_type="deepseek_v2",
    title="DeepSeek V2",
    per_layer=DEEPSEEK_LAYERS,
    defaults=DEEPSEEK_DEFAULTS | {"max_position_embeddings": 2048, "first_k_dense_replace": 0},
    tensors=LATENT_NAMES,
    compressed_kv=True,
)

DEEPSEEK_V3 = FamilySpec(
    model_type="deepseek_v3",
    title="DeepSeek V3 and R1; layers for multi-token prediction are left out",
    per_layer=DEEPSEEK_LAYERS,
    defaults=DEEPSEEK_DEFAULTS
    | {"max_position_embeddings": 4096, "first_k_dense_replace": 3, "num_experts_per_tok": 8},
    tensors=LATENT_NAMES,
    compressed_kv=True,
)

EXPERTS = (MIXTRAL, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
