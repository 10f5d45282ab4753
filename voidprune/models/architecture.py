"""How a decoder LM is described: tensor names, graph facts, and the per-layer fields of its config.

`FamilySpec` is what all models of one `model_type` share; `families.py` holds the literals. `DecoderArchitecture` is one model,
read from its `config.json` with nothing left to guess. A field that could depend on the layer and that the family does not
list is refused by name: a stale per-layer field gives a wrong model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from voidprune.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

Config = Mapping[str, Any]

# Lists that have nothing to do with layers, whatever their length.
_NEVER_PER_LAYER = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference"}


class PerLayer(StrEnum):
    """What a config field says about layers, and so what happens to it when layers go."""

    COUNT = "count"  # the number of layers: set
    LIST = "list"  # one entry a layer: kept entries are taken
    INDICES = "indices"  # a list of layer numbers: filtered and renumbered, never sliced
    THRESHOLD = "threshold"  # the first layer to which something applies: kept layers below it are counted
    INERT = "inert"  # "layer" is in its name only


class Windows(StrEnum):
    """How a family says which layers attend to a sliding window only."""

    NEVER = "never"
    ALL_LAYERS = "all_layers"  # every layer, when `sliding_window` is set (Mistral)
    LAYER_TYPES = "layer_types"  # `layer_types`, or else `use_sliding_window` from `max_window_layers` up (Qwen2)


@dataclass(frozen=True)
class TensorNames:
    """Where the tensors of a family are. Layer tensors are `{layers}.{index}.{suffix}.weight` and `.bias`."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    def layer(self, index: int, suffix: str) -> str:
        return f"{self.layers}.{index}.{suffix}"

    def layer_of(self, tensor: str) -> tuple[int, str] | None:
        """(layer index, rest of the name) of a tensor, or None where it belongs to no layer."""
        if not tensor.startswith(self.layers + "."):
            return None
        index, _, suffix = tensor[len(self.layers) + 1 :].partition(".")
        return (int(index), suffix) if index.isdigit() and suffix else None

    @property
    def storage_order(self) -> tuple[str, ...]:
        """Suffixes of a layer's tensors in the order that we write them: q, k, v side by side, and gate, up.

        One initializer of a graph can then span three matrices.
        """
        qkv = (self.query, self.key, self.value)
        return (
            f"{self.attention_norm}.weight",
            *(f"{name}.weight" for name in qkv),
            *(f"{name}.bias" for name in qkv),
            f"{self.output}.weight",
            f"{self.output}.bias",
            f"{self.mlp_norm}.weight",
            f"{self.gate}.weight",
            f"{self.up}.weight",
            f"{self.gate}.bias",
            f"{self.up}.bias",
            f"{self.down}.weight",
            f"{self.down}.bias",
        )


@dataclass(frozen=True)
class ModulePaths:
    """Attribute paths in the transformers model: the layer list, and in each layer the two sublayers and their branches.

    A *branch* is the module whose output is added to the residual stream: the sublayer itself, or, in families that normalize
    what a sublayer gives (Gemma 2, OLMo 2), the norm behind it. Where the family multiplies branches before it adds them
    (Granite), the layer's attribute `residual_multiplier` holds the number, and a branch's output is what comes before it:

        hidden_states = residual + multiplier * branch output

    An output may be a tuple (attention: output and weights; a mixture of experts: output and router scores): its first entry is
    what is added.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_branch: str = "self_attn"
    mlp_branch: str = "mlp"
    residual_multiplier: str | None = None


@dataclass(frozen=True)
class FamilySpec:
    """What all models of one `model_type` share.

    A bias is True, False, or the config field that says so. `defaults` are the values that transformers assumes for a field
    that `config.json` leaves out. `per_layer` names every config field that has to do with layers.
    """

    model_type: str
    title: str
    per_layer: Mapping[str, PerLayer]
    defaults: Mapping[str, Any]
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    windows: Windows = Windows.NEVER
    tensors: TensorNames = field(default_factory=TensorNames)
    modules: ModulePaths = field(default_factory=ModulePaths)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base, and how its frequencies are scaled.

    `kind` is "default", "linear" or "llama3"; the other fields are those of transformers' `rope_parameters`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 0

    def inverse_frequencies(self, head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """`head_dim / 2` angular frequencies, radians a position, in float32 at every step as transformers does it.

        Formulas: transformers `modeling_rope_utils`, `_compute_linear_scaling_rope_parameters` and
        `_compute_llama3_parameters`.
        """
        import numpy as np

        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = np.float32(1.0) / np.float32(self.theta) ** exponents
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind == "llama3":
            wavelengths = np.float32(2 * math.pi) / frequencies
            smooth = (self.original_context_length / wavelengths - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            smooth = np.clip(smooth, 0.0, 1.0)  # 0: long waves, slowed by the factor; 1: short waves, kept
            return ((1 - smooth) * frequencies / self.factor + smooth * frequencies).astype(np.float32)
        return frequencies


@dataclass(frozen=True)
class DecoderArchitecture:
    """One model's shape. `windows[l]` is the sliding window of layer l in tokens, itself included, or None."""

    spec: FamilySpec
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]


def describe_architecture(config: Config, spec: FamilySpec) -> DecoderArchitecture:
    """Read a `config.json` as its family says. Raises ModelError on anything that would have to be guessed."""
    reader = _ConfigReader(config, spec)
    refuse_unknown_layer_fields(config, spec)
    if config.get("quantization_config"):
        raise ModelError(
            "the checkpoint is quantized (quantization_config); its layers cannot be re-cut yet",
            hint="start from the checkpoint that was quantized",
        )
    if (activation := reader.value("hidden_act")) != "silu":
        raise ModelError(f"{spec.model_type} with hidden_act {activation!r} is not supported; only silu is")
    num_layers = reader.integer("num_hidden_layers")
    num_heads = reader.integer("num_attention_heads")
    hidden_size = reader.integer("hidden_size")
    return DecoderArchitecture(
        spec=spec,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", otherwise=num_heads),
        head_dim=reader.integer("head_dim", otherwise=hidden_size // num_heads),
        vocab_size=reader.integer("vocab_size"),
        context_length=reader.integer("max_position_embeddings"),
        norm_epsilon=float(reader.value("rms_norm_eps")),
        rope=_read_rope(reader),
        tied_embeddings=bool(reader.value("tie_word_embeddings")),
        qkv_bias=reader.flag(spec.qkv_bias),
        output_bias=reader.flag(spec.output_bias),
        mlp_bias=reader.flag(spec.mlp_bias),
        windows=tuple(
            int(reader.value("sliding_window")) if kind == "sliding_attention" else None
            for kind in layer_types(config, spec)
        ),
    )


def layer_types(config: Config, spec: FamilySpec) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` for each layer, as transformers would run it."""
    reader = _ConfigReader(config, spec)
    num_layers = reader.integer("num_hidden_layers")
    match spec.windows:
        case Windows.NEVER:
            return ("full_attention",) * num_layers
        case Windows.ALL_LAYERS:
            kind = "full_attention" if reader.value("sliding_window") is None else "sliding_attention"
            return (kind,) * num_layers
        case Windows.LAYER_TYPES:
            listed = reader.value("layer_types")
            if listed is not None:
                return _read_layer_types(listed, num_layers)
            windowed = reader.value("use_sliding_window") and reader.value("sliding_window") is not None
            first = reader.integer("max_window_layers", minimum=0) if windowed else num_layers
            return tuple("sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers))


def _read_layer_types(listed: Any, num_layers: int) -> tuple[str, ...]:
    known = ("full_attention", "sliding_attention")
    if not isinstance(listed, list) or len(listed) != num_layers or not all(kind in known for kind in listed):
        raise ModelError(
            f"layer_types in config.json does not say full_attention or sliding_attention for each of {num_layers} layers"
        )
    return tuple(listed)


def refuse_unknown_layer_fields(config: Config, spec: FamilySpec) -> None:
    """Raise ModelError on a field that may depend on the layer and that the family does not list."""
    num_layers = config.get("num_hidden_layers")
    for name, value in config.items():
        if name in spec.per_layer or name in _NEVER_PER_LAYER:
            continue
        one_a_layer = isinstance(value, list) and num_layers is not None and len(value) == num_layers > 1
        if one_a_layer or ("layer" in name and isinstance(value, (int, list)) and not isinstance(value, bool)):
            raise ModelError(
                f"config.json has {name}, which may depend on the layer and is unknown for {spec.model_type}",
                hint=f"remove {name} if it means nothing, or describe it in voidprune/models/families.py",
            )


def remap_config(config: Config, spec: FamilySpec, kept: Sequence[int]) -> dict[str, Any]:
    """The config of the checkpoint that holds only the layers `kept` (ascending, original numbers).

    Lists that transformers would otherwise derive from the layer's number are written out.
    """
    refuse_unknown_layer_fields(config, spec)
    new = {**_rope_for_transformers_4(config), **config}
    if spec.windows is Windows.LAYER_TYPES:
        new["layer_types"] = list(layer_types(config, spec))
    for name, kind in spec.per_layer.items():
        value = new.get(name)
        if value is None:
            continue
        match kind:
            case PerLayer.COUNT:
                new[name] = len(kept)
            case PerLayer.LIST:
                new[name] = [value[layer] for layer in kept]
            case PerLayer.INDICES:
                new[name] = [position for position, layer in enumerate(kept) if layer in value]
            case PerLayer.THRESHOLD:
                new[name] = sum(layer < value for layer in kept)
            case PerLayer.INERT:
                pass
    return new


def _rope_for_transformers_4(config: Config) -> dict[str, Any]:
    """`rope_parameters` as 4.x spells it: without, it would silently fall back to an unscaled base of 10,000."""
    written = config.get("rope_parameters")
    if not isinstance(written, dict) or "rope_theta" not in written:
        return {}
    rest = {name: value for name, value in written.items() if name != "rope_theta"}
    scaling = rest if rest.get("rope_type", "default") != "default" else None
    return {"rope_theta": written["rope_theta"], "rope_scaling": scaling}


def _read_rope(reader: _ConfigReader) -> Rope:
    # transformers 5 writes rope_parameters; 4.x writes rope_theta and rope_scaling beside each other.
    written = reader.config.get("rope_parameters") or reader.config.get("rope_scaling") or {}
    if not isinstance(written, dict):
        raise ModelError("rope_parameters or rope_scaling in config.json is not an object")
    kind = written.get("rope_type", written.get("type", "default"))
    theta = float(written.get("rope_theta", reader.value("rope_theta")))
    partial = written.get("partial_rotary_factor", reader.config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(f"{reader.spec.model_type} with partial_rotary_factor {partial} is not supported")

    def number(name: str) -> float:
        if not isinstance(written.get(name), (int, float)):
            raise ModelError(f"config.json scales its rotary embedding by {kind!r} but gives no number for {name}")
        return float(written[name])

    match kind:
        case "default":
            return Rope(theta=theta)
        case "linear":
            return Rope(theta=theta, kind=kind, factor=number("factor"))
        case "llama3":
            return Rope(
                theta=theta,
                kind=kind,
                factor=number("factor"),
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
                original_context_length=int(number("original_max_position_embeddings")),
            )
        case _:
            raise ModelError(f"rotary embedding of type {kind!r} is not supported; default, linear and llama3 are")


@dataclass(frozen=True)
class _ConfigReader:
    """Fields of a config with the defaults of its family, and a named error for what is missing."""

    config: Config
    spec: FamilySpec

    def value(self, name: str) -> Any:
        if name in self.config:
            return self.config[name]
        if name in self.spec.defaults:
            return self.spec.defaults[name]
        raise ModelError(f"config.json lacks {name}", hint="is this the folder of a Hugging Face causal LM?")

    def integer(self, name: str, *, otherwise: int | None = None, minimum: int = 1) -> int:
        value = self.config.get(name, self.spec.defaults.get(name))
        if value is None:
            value = self.value(name) if otherwise is None else otherwise
        if type(value) is not int or value < minimum:
            raise ModelError(f"{name} in config.json is {value!r}, not a whole number from {minimum} up")
        return value

    def flag(self, source: bool | str) -> bool:
        return source if isinstance(source, bool) else bool(self.value(source))
