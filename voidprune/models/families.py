"""The table of supported families. The literals stand in `families_dense.py`, `families_post_normed.py` and
`families_experts.py`: **add a family there**.

A family is supported exactly when its conformance suite passes: a tiny model with random weights, slimmed, loads in stock
transformers with its logits those of the whole model under the schedule; where graphs are authored, they give them too.
"""

from __future__ import annotations

from typing import Any

from voidprune.errors import ModelError
from voidprune.models.architecture import Config, DecoderArchitecture, FamilySpec, describe_architecture
from voidprune.models.families_dense import DENSE
from voidprune.models.families_experts import EXPERTS
from voidprune.models.families_post_normed import POST_NORMED_FAMILIES
from voidprune.models.quantization import check_quantization

FAMILIES: dict[str, FamilySpec] = {spec.model_type: spec for spec in (*DENSE, *POST_NORMED_FAMILIES, *EXPERTS)}

_SHARED_KV = "its last layers use the keys and values of earlier ones, and lose them when those are dropped"
_STATE = "some of its layers carry a recurrent state, for which a schedule has no actions"
_CHUNKED = "its layers attend in chunks and skip rotation by position in the model; not described yet"
REFUSED: dict[str, str] = {
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gemma4": _SHARED_KV,
    "gemma4_text": _SHARED_KV,
    "bamba": _STATE,
    "falcon_h1": _STATE,
    "falcon_mamba": _STATE,
    "granitemoehybrid": _STATE,
    "jamba": _STATE,
    "lfm2": _STATE,
    "mamba": _STATE,
    "mamba2": _STATE,
    "minimax": _STATE,
    "nemotron_h": _STATE,
    "qwen3_next": _STATE,
    "recurrent_gemma": _STATE,
    "rwkv": _STATE,
    "zamba": _STATE,
    "zamba2": _STATE,
    "llama4": _CHUNKED,
    "llama4_text": _CHUNKED,
}
"""Families that are known and refused, with the reason."""


def find_family(config: Config) -> FamilySpec:
    """The family of a `config.json`. Raises ModelError, with the reason or naming the supported ones."""
    model_type: Any = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ModelError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    raise ModelError(
        f"model_type {model_type!r} is not supported",
        hint=f"supported: {', '.join(sorted(FAMILIES))} (voidprune families)",
    )


def read_architecture(config: Config) -> DecoderArchitecture:
    """Describe a model of any supported family. Raises ModelError."""
    spec = find_family(config)
    check_quantization(config.get("quantization_config"))
    return describe_architecture(config, spec)
