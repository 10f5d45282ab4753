"""Families without experts. Literals only: **add a family here**, and to the table in `families.py`.

The defaults are those of the configuration classes in transformers 4.57 and 5.23; which module's output joins the residual
stream, and which layers have windows or no rotary embedding, is read off `models/<family>/modeling_<family>.py` of 5.23.
"""

from __future__ import annotations

from typing import Any

from voidprune.models.architecture import FamilySpec, ModulePaths, PerLayer, TensorNames
from voidprune.models.graph_spec import GraphSpec, HeadNorm, Norm, Rotated, Windows
from voidprune.models.layer_lists import EveryNth, FromThreshold, WhereZero

COUNT = {"num_hidden_layers": PerLayer.COUNT}
WINDOWS_FROM_A_LAYER_UP = FromThreshold("max_window_layers", switches=("use_sliding_window", "sliding_window"))
QWEN_WINDOWS = {"layer_types": PerLayer.LIST, "max_window_layers": PerLayer.THRESHOLD}
QWEN_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}

SILU_AND_RMS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}

LLAMA = FamilySpec(
    model_type="llama",
    title="Llama 2, 3, 3.1, 3.2 and models of the same architecture",
    per_layer=COUNT,
    defaults=SILU_AND_RMS
    | {
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
    },
    graph=GraphSpec(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
)

MISTRAL = FamilySpec(
    model_type="mistral",
    title="Mistral 7B and models of the same architecture",
    per_layer=COUNT,
    defaults=SILU_AND_RMS
    | {
        "tie_word_embeddings": False,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    graph=GraphSpec(windows=Windows.ALL_LAYERS),
)

QWEN2 = FamilySpec(
    model_type="qwen2",
    title="Qwen2 and Qwen2.5",
    per_layer=COUNT | QWEN_WINDOWS,
    defaults=SILU_AND_RMS | QWEN_DEFAULTS,
    layer_lists={"layer_types": WINDOWS_FROM_A_LAYER_UP},
    graph=GraphSpec(qkv_bias=True, windows=Windows.LAYER_TYPES),
)

QWEN3 = FamilySpec(
    model_type="qwen3",
    title="Qwen3, dense",
    per_layer=COUNT | QWEN_WINDOWS,
    defaults=SILU_AND_RMS | QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    layer_lists={"layer_types": WINDOWS_FROM_A_LAYER_UP},
    graph=GraphSpec(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_norm=HeadNorm.EACH,
        windows=Windows.LAYER_TYPES,
    ),
)

GEMMA = FamilySpec(
    model_type="gemma",
    title="Gemma",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    graph=GraphSpec(
        norm=Norm.RMS_PLUS_ONE,
        activations={"gelu": "gelu_pytorch_tanh"},  # what the first files say, and never was
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        embedding_multiplier="sqrt_hidden_size",
        required={"use_bidirectional_attention": None},
    ),
)

PHI3 = FamilySpec(
    model_type="phi3",
    title="Phi-3, Phi-3.5 and Phi-4",
    per_layer=COUNT,
    defaults=SILU_AND_RMS
    | {
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    },
    tensors=TensorNames(
        kv_parts=("input_layernorm",), fused_qkv="self_attn.qkv_proj", fused_gate_up="mlp.gate_up_proj"
    ),
    graph=GraphSpec(windows=Windows.ALL_LAYERS),
    # 4.57 refuses a rope_scaling with other fields (its models/phi3/configuration_phi3.py, _rope_scaling_validation).
    rope_scaling_fields=("type", "short_factor", "long_factor"),
)

GRANITE = FamilySpec(
    model_type="granite",
    title="Granite 3 and 4, dense",
    per_layer=COUNT,
    defaults=SILU_AND_RMS
    | {
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    graph=GraphSpec(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        score_multiplier="attention_multiplier",
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    modules=ModulePaths(residual_multiplier="residual_multiplier"),
)

SMOLLM3_ROTATED = EveryNth("no_rope_layer_interval", nth=0, other=1)
SMOLLM3 = FamilySpec(
    model_type="smollm3",
    title="SmolLM3",
    per_layer=COUNT
    | {
        "layer_types": PerLayer.LIST,
        "no_rope_layers": PerLayer.LIST,  # 1: rotated, 0: not
        "no_rope_layer_interval": PerLayer.PERIOD,
        "max_window_layers": PerLayer.THRESHOLD,  # in published configs; transformers does not read it
    },
    defaults=SILU_AND_RMS
    | {
        "rope_theta": 2000000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "no_rope_layers": None,
        "layer_types": None,
    },
    layer_lists={
        "no_rope_layers": SMOLLM3_ROTATED,
        "layer_types": WhereZero("no_rope_layers", SMOLLM3_ROTATED, switches=("use_sliding_window", "sliding_window")),
    },
    graph=GraphSpec(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows=Windows.LAYER_TYPES,
        rotated=Rotated.LISTED,
    ),
)

# Attention and MLP side by side behind one norm; its bytes are counted with attention.
COHERE = FamilySpec(
    model_type="cohere",
    title="Command R",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "logit_scale": 0.0625,
    },
    graph=GraphSpec(
        norm=Norm.LAYER,
        norm_epsilon="layer_norm_eps",
        parallel=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        head_norm=HeadNorm.EACH_ITS_OWN,
        has_head_norm="use_qk_norm",
        interleaved=True,
        logit_multiplier="logit_scale",
    ),
)

COHERE2 = FamilySpec(
    model_type="cohere2",
    title="Command R7B and A",
    per_layer=COUNT
    | {
        "layer_types": PerLayer.LIST,  # layers with a window are rotated, the others are not
        "sliding_window_pattern": PerLayer.PERIOD,
        "layer_switch": PerLayer.PERIOD,  # the same number, of an older spelling
    },
    defaults={
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "layer_types": None,
        "sliding_window_pattern": 4,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "logit_scale": 0.0625,
    },
    layer_lists={"layer_types": EveryNth("sliding_window_pattern")},
    graph=GraphSpec(
        norm=Norm.LAYER,
        norm_epsilon="layer_norm_eps",
        parallel=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        windows=Windows.LAYER_TYPES,
        rotated=Rotated.WINDOWED,
        interleaved=True,
        logit_multiplier="logit_scale",
    ),
)

STARCODER2 = FamilySpec(
    model_type="starcoder2",
    title="StarCoder2",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_bias": True,
    },
    tensors=TensorNames(up="mlp.c_fc", down="mlp.c_proj"),
    graph=GraphSpec(
        norm=Norm.LAYER,
        norm_bias=True,
        norm_epsilon="norm_epsilon",
        gated=False,
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        windows=Windows.ALL_LAYERS,
    ),
)

STABLELM = FamilySpec(
    model_type="stablelm",
    title="StableLM 2 and models of the same architecture",
    per_layer=COUNT,
    defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    graph=GraphSpec(
        norm=Norm.LAYER,
        norm_bias=True,
        norm_epsilon="layer_norm_eps",
        parallel="use_parallel_residual",
        qkv_bias="use_qkv_bias",
        head_norm=HeadNorm.EACH_ITS_OWN,
        has_head_norm="qk_layernorm",
    ),
    tensors=TensorNames(
        query_norm="self_attn.q_layernorm.norms.{head}",
        key_norm="self_attn.k_layernorm.norms.{head}",
        kv_parts=("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_layernorm"),
    ),
)

DENSE = (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, PHI3, GRANITE, SMOLLM3, COHERE, COHERE2, STARCODER2, STABLELM,
)  # fmt: skip
