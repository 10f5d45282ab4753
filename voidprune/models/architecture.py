"""How a decoder LM is described: tensor names, module paths, and the per-layer fields of its config.

`FamilySpec` is what all models of one `model_type` share; `families.py` holds the literals. `DecoderArchitecture` is what a
slim checkpoint, its sizes and its identity need to know of one model, read from its `config.json` with nothing left to guess;
what graphs need beyond that is in `graph_architecture.py`. A field that could depend on the layer and that the family does
not list is refused by name: a stale per-layer field gives a wrong model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from voidprune.errors import ModelError
from voidprune.models.graph_spec import GraphSpec
from voidprune.models.layer_lists import LayerListRule

Config = Mapping[str, Any]

# Lists that have nothing to do with layers, whatever their length.
_NEVER_PER_LAYER = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference"}


class PerLayer(StrEnum):
    """What a config field says about layers, and so what happens to it when layers go."""

    COUNT = "count"  # the number of layers: set
    LIST = "list"  # one entry a layer: kept entries are taken
    INDICES = "indices"  # a list of layer numbers: filtered and renumbered, never sliced
    THRESHOLD = "threshold"  # the first layer to which something applies: kept layers below it are counted
    PERIOD = "period"  # every n-th layer differs: said by a list instead, else refused unless 1
    EXTRA = "extra"  # the number of further layers behind the last one (multi-token prediction): they go, set to 0
    SHARING = "sharing"  # the number of layers that use the keys and values of others: refused unless 0
    INERT = "inert"  # "layer" is in its name only


@dataclass(frozen=True)
class TensorNames:
    """Where the tensors of a family are. Layer tensors are `{layers}.{index}.{suffix}.weight` and `.bias`.

    The names from `attention_norm` to `down` are what graphs read: norms before a sublayer and behind it, None where there is
    none, matrices, and norms of queries and keys (`{head}` in them: one a head). The `_parts` are beginnings of suffixes:
    whatever begins like this belongs to attention, to the part of it that keys and values need, or to the MLP. `fused_qkv` holds
    q, k and v one below the other, `fused_gate_up` gate and up; `experts` are matrices of which a token runs only some.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_parts: tuple[str, ...] = ("input_layernorm", "self_attn")
    kv_parts: tuple[str, ...] = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
    mlp_parts: tuple[str, ...] = ("post_attention_layernorm", "mlp")
    fused_qkv: str | None = None
    fused_gate_up: str | None = None
    experts: str = "mlp.experts"

    def layer(self, index: int, suffix: str) -> str:
        return f"{self.layers}.{index}.{suffix}"

    def layer_of(self, tensor: str) -> tuple[int, str] | None:
        """(layer index, rest of the name) of a tensor, or None where it belongs to no layer."""
        if not tensor.startswith(self.layers + "."):
            return None
        index, _, suffix = tensor[len(self.layers) + 1 :].partition(".")
        return (int(index), suffix) if index.isdigit() and suffix else None

    @property
    def attention_matrices(self) -> tuple[str, ...]:
        """Suffixes that may name a matrix of attention."""
        return tuple(
            name for name in (self.query, self.key, self.value, self.output, self.fused_qkv) if name is not None
        )

    @property
    def mlp_matrices(self) -> tuple[str, ...]:
        """Suffixes that may name a matrix of an MLP."""
        return tuple(name for name in (self.gate, self.up, self.down, self.fused_gate_up) if name is not None)

    @property
    def storage_order(self) -> tuple[str, ...]:
        """Suffixes of a layer's tensors in the order that we write them: q, k, v side by side, and gate, up.

        One initializer of a graph can then span three matrices.
        """
        weights_and_biases = (
            (self.attention_norm,),
            (self.query, self.key, self.value),
            (self.output,),
            (self.mlp_norm,),
            (self.gate, self.up),
            (self.down,),
        )
        return tuple(
            f"{name}.{kind}"
            for group in weights_and_biases
            for kind in ("weight", "bias")
            for name in group
            if name is not None
        )


@dataclass(frozen=True)
class ModulePaths:
    """Attribute paths in the transformers model: the layer list, and in each layer the two sublayers and their branches.

    A *branch* is the module whose output is added to the residual stream: the sublayer itself, or, in families that normalize
    what a sublayer gives (Gemma 2, OLMo 2), the norm behind it. Where the family multiplies branches before it adds them
    (Granite), the layer's attribute `residual_multiplier` holds the number, and a branch's output is what comes before it:

        hidden_states = residual + multiplier * branch output

    An output may be a tuple (attention: output and weights; a mixture of experts: output and router scores): its first entry is
    what is added. `mlp_in_transformers_4` is the older name of the MLP, where 5.x renamed it.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_branch: str = "self_attn"
    mlp_branch: str = "mlp"
    residual_multiplier: str | None = None
    mlp_in_transformers_4: str | None = None

    def sublayers(self, layer: Any) -> tuple[Any, Any]:
        """The attention and MLP modules of a decoder layer."""
        return getattr(layer, self.attention), getattr(layer, self._name(layer, self.mlp))

    def branches(self, layer: Any) -> tuple[Any, Any]:
        """The modules of a decoder layer whose outputs are added to the residual stream: of attention, and of the MLP."""
        return getattr(layer, self.attention_branch), getattr(layer, self._name(layer, self.mlp_branch))

    def _name(self, layer: Any, name: str) -> str:
        older = self.mlp_in_transformers_4
        return older if older is not None and name == self.mlp and hasattr(layer, older) else name


@dataclass(frozen=True)
class FamilySpec:
    """What all models of one `model_type` share.

    `defaults` are the values that transformers assumes for a field that `config.json` leaves out. `per_layer` names every
    config field that has to do with layers; `layer_lists` those of them that transformers makes up when they are absent.
    `graph` is None where no graphs are authored for the family. `text_config` is the field with the language model's part of a
    nested config. `compressed_kv`: keys and values are cached as one latent vector (multi-head latent attention).

    How transformers 4.57 spells what 5.x writes differently: `local_rope_theta` is the field for the rotary base of sliding
    layers; `rope_scaling_fields`, where they are given, are the only fields that its `rope_scaling` may have; `aliases` are
    pairs of names of one field.
    """

    model_type: str
    title: str
    per_layer: Mapping[str, PerLayer]
    defaults: Mapping[str, Any]
    layer_lists: Mapping[str, LayerListRule] = field(default_factory=dict)
    graph: GraphSpec | None = None
    tensors: TensorNames = field(default_factory=TensorNames)
    modules: ModulePaths = field(default_factory=ModulePaths)
    text_config: str | None = None
    compressed_kv: bool = False
    local_rope_theta: str | None = None
    rope_scaling_fields: tuple[str, ...] | None = None
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def unfoldable(self) -> str | None:
        """Why no linear map of what a sublayer adds can be put into its output projection; None where it can."""
        if (self.modules.attention_branch, self.modules.mlp_branch) == (self.modules.attention, self.modules.mlp):
            return None
        return "a norm stands between the output projections of its sublayers and the residual stream"

    @property
    def formats(self) -> tuple[str, ...]:
        """What `voidprune export` writes of this family."""
        return ("hf",) if self.graph is None else ("hf", "onnx")


@dataclass(frozen=True)
class DecoderArchitecture:
    """One model's shape.

    `kv_width`: numbers that one layer caches for a token. `attention_width`: heads times head size (of keys and values on
    average). `num_extra_layers`: layers behind the last for multi-token prediction, which stock transformers does not run.
    `experts_per_token` is 0 where there is no mixture of experts.
    """

    spec: FamilySpec
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool
    kv_width: int
    attention_width: int
    num_extra_layers: int
    experts_per_token: int


def describe_architecture(config: Config, spec: FamilySpec) -> DecoderArchitecture:
    """Read a `config.json` as its family says. Raises ModelError on anything that would have to be guessed."""
    reader = ConfigReader(text_config(config, spec), spec)
    refuse_unknown_layer_fields(reader.config, spec)
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", otherwise=num_heads)
    hidden_size = reader.integer("hidden_size")
    if spec.compressed_kv:
        # transformers 5.23 caches kv_lora_rank + qk_rope_head_dim numbers (models/deepseek_v3/modeling_deepseek_v3.py,
        # DeepseekV3Attention.forward), as other runtimes do; 4.57 caches all heads.
        rotated = reader.integer("qk_rope_head_dim")
        head_dim = reader.integer("qk_nope_head_dim") + rotated
        kv_width = reader.integer("kv_lora_rank") + rotated
        attention_width = num_heads * (head_dim + reader.integer("v_head_dim")) // 2
    else:
        head_dim = reader.integer("head_dim", otherwise=hidden_size // num_heads)
        kv_width = 2 * num_kv_heads * head_dim
        attention_width = num_heads * head_dim
    extra = [name for name, kind in spec.per_layer.items() if kind is PerLayer.EXTRA]
    return DecoderArchitecture(
        spec=spec,
        num_layers=reader.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        context_length=reader.integer("max_position_embeddings"),
        tied_embeddings=bool(config.get("tie_word_embeddings", reader.value("tie_word_embeddings"))),
        kv_width=kv_width,
        attention_width=attention_width,
        num_extra_layers=sum(reader.integer(name, otherwise=0, minimum=0) for name in extra),
        experts_per_token=reader.integer("num_experts_per_tok", otherwise=0, minimum=0),
    )


def text_config(config: Config, spec: FamilySpec) -> Config:
    """The language model's part of a config: all of it, or the field that the family names. Raises ModelError."""
    if spec.text_config is None:
        return config
    nested = config.get(spec.text_config)
    if not isinstance(nested, dict):
        raise ModelError(f"config.json of a {spec.model_type} model has no object {spec.text_config}")
    return nested


def layer_list(config: Config, spec: FamilySpec, name: str) -> list[Any]:
    """A list with an entry a layer, as transformers would complete it. Raises ModelError."""
    reader = ConfigReader(config, spec)
    return spec.layer_lists[name].complete(name, reader.lookup, reader.integer("num_hidden_layers"))


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


@dataclass(frozen=True)
class ConfigReader:
    """Fields of a config with the defaults of its family, and a named error for what is missing."""

    config: Config
    spec: FamilySpec

    def lookup(self, name: str) -> Any:
        """The value of a field, or its default, or None."""
        return self.config.get(name, self.spec.defaults.get(name))

    def value(self, name: str) -> Any:
        if name in self.config:
            return self.config[name]
        if name in self.spec.defaults:
            return self.spec.defaults[name]
        raise ModelError(f"config.json lacks {name}", hint="is this the folder of a Hugging Face causal LM?")

    def integer(self, name: str, *, otherwise: int | None = None, minimum: int = 1) -> int:
        value = self.lookup(name)
        if value is None:
            value = self.value(name) if otherwise is None else otherwise
        if type(value) is not int or value < minimum:
            raise ModelError(f"{name} in config.json is {value!r}, not a whole number from {minimum} up")
        return value

    def flag(self, source: bool | str) -> bool:
        return source if isinstance(source, bool) else bool(self.value(source))
