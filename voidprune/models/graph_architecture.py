"""What the authored graphs need to know of one model beyond its checkpoint: norms, biases, windows, rotary embedding, scales.

Only families with a `GraphSpec` have that; anything that the graphs could not compute exactly is refused by name here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from voidprune.errors import ModelError
from voidprune.models.architecture import (
    Config,
    ConfigReader,
    DecoderArchitecture,
    FamilySpec,
    describe_architecture,
    layer_list,
    text_config,
)
from voidprune.models.graph_spec import GraphSpec, HeadNorm, Norm, Rotated, Windows
from voidprune.models.layer_lists import FULL, SLIDING
from voidprune.models.rope import Rope, read_ropes


class Activation(StrEnum):
    """What an MLP does between its matrices."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"  # the approximation with tanh


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}


@dataclass(frozen=True)
class GraphArchitecture(DecoderArchitecture):
    """One model's shape as its graphs need it.

    `windows[l]`: the sliding window of layer l in tokens, itself included, or None. `ropes[l]`: its rotary embedding, or None.
    `ropes_by_kind`: the same for "full_attention" and "sliding_attention", whether or not a layer is of the kind. Scores are
    multiplied by `score_scale`, then capped; logits multiplied by `logit_scale`, then capped. None: no cap.
    """

    intermediate_size: int
    norm: Norm
    norm_bias: bool
    norm_epsilon: float
    activation: Activation
    gated: bool
    parallel: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: HeadNorm
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    ropes_by_kind: Mapping[str, Rope]
    score_scale: float
    score_softcap: float | None
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float | None


def describe_graph_architecture(config: Config, spec: FamilySpec) -> GraphArchitecture:
    """Read a `config.json` for its graphs. Raises ModelError where no graph would equal the model."""
    graph = spec.graph
    if graph is None:
        raise ModelError(
            f"no ONNX graphs are made of {spec.model_type} models, only slim checkpoints",
            hint="export with --format hf; Optimum makes one graph of some of those: docs/optimum.md",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "no ONNX graphs are made of a checkpoint that is quantized already (quantization_config)",
            hint="export with --format hf, or start from the checkpoint that was quantized",
        )
    described = describe_architecture(config, spec)
    reader = ConfigReader(text_config(config, spec), spec)
    for name, value in graph.required.items():
        if (found := reader.lookup(name)) != value:
            raise ModelError(
                f"no ONNX graphs are made of {spec.model_type} with {name} {found!r}; only with {value!r}",
                hint="export with --format hf",
            )
    kinds = layer_types(reader.config, spec)
    windows = tuple(reader.integer("sliding_window") if kind == SLIDING else None for kind in kinds)
    ropes = read_ropes(reader, head_dim=described.head_dim, interleaved=graph.interleaved)
    rotated = _rotated_layers(reader, graph, windows)
    return GraphArchitecture(
        **vars(described),
        intermediate_size=reader.integer("intermediate_size"),
        norm=graph.norm,
        norm_bias=graph.norm_bias,
        norm_epsilon=_number(reader, graph.norm_epsilon),
        activation=_read_activation(reader, graph),
        gated=graph.gated,
        parallel=reader.flag(graph.parallel),
        qkv_bias=reader.flag(graph.qkv_bias),
        output_bias=reader.flag(graph.output_bias),
        mlp_bias=reader.flag(graph.mlp_bias),
        head_norm=graph.head_norm if reader.flag(graph.has_head_norm) else HeadNorm.NONE,
        windows=windows,
        ropes=tuple(ropes[kind] if turned else None for kind, turned in zip(kinds, rotated, strict=True)),
        ropes_by_kind=ropes,
        score_scale=_score_scale(reader, graph, described.head_dim),
        score_softcap=_optional_number(reader, graph.score_softcap),
        embedding_scale=described.hidden_size**0.5
        if graph.embedding_multiplier == "sqrt_hidden_size"
        else _scale(reader, graph.embedding_multiplier),
        residual_scale=_scale(reader, graph.residual_multiplier),
        logit_scale=_scale(reader, graph.logit_multiplier) / _scale(reader, graph.logit_divisor),
        logit_softcap=_optional_number(reader, graph.logit_softcap),
    )


def layer_types(config: Config, spec: FamilySpec) -> tuple[str, ...]:
    """`full_attention` or `sliding_attention` for each layer, as transformers would run it."""
    assert spec.graph is not None
    reader = ConfigReader(config, spec)
    num_layers = reader.integer("num_hidden_layers")
    match spec.graph.windows:
        case Windows.NEVER:
            return (FULL,) * num_layers
        case Windows.ALL_LAYERS:
            return (FULL if reader.value("sliding_window") is None else SLIDING,) * num_layers
        case Windows.LAYER_TYPES:
            return tuple(layer_list(config, spec, "layer_types"))


def _rotated_layers(reader: ConfigReader, graph: GraphSpec, windows: tuple[int | None, ...]) -> tuple[bool, ...]:
    match graph.rotated:
        case Rotated.ALL:
            return (True,) * len(windows)
        case Rotated.LISTED:
            return tuple(entry != 0 for entry in layer_list(reader.config, reader.spec, "no_rope_layers"))
        case Rotated.WINDOWED:
            return tuple(window is not None for window in windows)
        case Rotated.WINDOWED_OR_ALL:
            return tuple(window is not None or reader.lookup("sliding_window") is None for window in windows)


def _read_activation(reader: ConfigReader, graph: GraphSpec) -> Activation:
    written = str(reader.value(graph.activation))
    name = graph.activations.get(written, written)
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"no ONNX graphs are made of {reader.spec.model_type} with {graph.activation} {written!r}; "
            f"with {', '.join(_ACTIVATIONS)}",
            hint="export with --format hf",
        )
    return _ACTIVATIONS[name]


def _score_scale(reader: ConfigReader, graph: GraphSpec, head_dim: int) -> float:
    if graph.score_multiplier is not None:
        return _number(reader, graph.score_multiplier)
    return 1 / math.sqrt(head_dim if graph.query_scale is None else _number(reader, graph.query_scale))


def _scale(reader: ConfigReader, name: str | None) -> float:
    return 1.0 if name is None else _number(reader, name)


def _optional_number(reader: ConfigReader, name: str | None) -> float | None:
    return None if name is None or reader.value(name) is None else _number(reader, name)


def _number(reader: ConfigReader, name: str) -> float:
    value = reader.value(name)
    if type(value) not in (int, float):
        raise ModelError(f"{name} in config.json is {value!r}, not a number")
    return float(value)
