"""What the authored graphs need to know of one model beyond its checkpoint: widths, biases, windows, rotary embedding.

Only families with a `GraphSpec` have that; anything that the graphs could not compute exactly is refused by name here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from voidprune.errors import ModelError
from voidprune.models.architecture import (
    Config,
    ConfigReader,
    DecoderArchitecture,
    FamilySpec,
    Windows,
    describe_architecture,
    layer_list,
)
from voidprune.models.layer_lists import FULL, SLIDING

if TYPE_CHECKING:
    import numpy as np


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
class GraphArchitecture(DecoderArchitecture):
    """One model's shape as its graphs need it. `windows[l]`: the sliding window of layer l in tokens, itself included, or None."""

    intermediate_size: int
    norm_epsilon: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]


def describe_graph_architecture(config: Config, spec: FamilySpec) -> GraphArchitecture:
    """Read a `config.json` for its graphs. Raises ModelError where no graph would equal the model."""
    if spec.graph is None:
        raise ModelError(
            f"no ONNX graphs are made of {spec.model_type} models, only slim checkpoints",
            hint="export with --format hf",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "no ONNX graphs are made of a checkpoint that is quantized already (quantization_config)",
            hint="export with --format hf, or start from the checkpoint that was quantized",
        )
    reader = ConfigReader(config, spec)
    described = describe_architecture(config, spec)
    if (activation := reader.value("hidden_act")) != "silu":
        raise ModelError(
            f"no ONNX graphs are made of {spec.model_type} with hidden_act {activation!r}; only of silu",
            hint="export with --format hf",
        )
    return GraphArchitecture(
        **vars(described),
        intermediate_size=reader.integer("intermediate_size"),
        norm_epsilon=float(reader.value("rms_norm_eps")),
        rope=_read_rope(reader),
        qkv_bias=reader.flag(spec.graph.qkv_bias),
        output_bias=reader.flag(spec.graph.output_bias),
        mlp_bias=reader.flag(spec.graph.mlp_bias),
        windows=tuple(
            int(reader.value("sliding_window")) if kind == SLIDING else None for kind in layer_types(config, spec)
        ),
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


def _read_rope(reader: ConfigReader) -> Rope:
    # transformers 5 writes rope_parameters; 4.x writes rope_theta and rope_scaling beside each other.
    written = reader.config.get("rope_parameters") or reader.config.get("rope_scaling") or {}
    if not isinstance(written, dict):
        raise ModelError("rope_parameters or rope_scaling in config.json is not an object")
    kind = written.get("rope_type", written.get("type", "default"))
    theta = float(written.get("rope_theta", reader.value("rope_theta")))
    partial = written.get("partial_rotary_factor", reader.config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(
            f"no ONNX graphs are made of {reader.spec.model_type} with partial_rotary_factor {partial}",
            hint="export with --format hf",
        )

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
            raise ModelError(
                f"no ONNX graphs are made with a rotary embedding of type {kind!r}; with default, linear and llama3",
                hint="export with --format hf",
            )
