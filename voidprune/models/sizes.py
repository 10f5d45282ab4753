"""What the parts of a model weigh, from its header alone: enough to cost a schedule without the model at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Any

from voidprune.errors import ArtifactError
from voidprune.models.architecture import Config, DecoderArchitecture
from voidprune.models.checkpoint import DTYPE_BYTES, Checkpoint, TensorRecord, refuse_packed, stored_bytes
from voidprune.models.quantization import weights_in


@dataclass(frozen=True)
class LayerSizes:
    """Parts of one decoder layer: bytes (as decode reads them), and weights in matrices, of attention, of its K/V part alone, and
    of the MLP.

    Of a mixture of experts, `mlp_bytes` and `mlp_weights` are those of the experts that one token runs; `total_bytes` is all
    that is stored.
    """

    total_bytes: int
    attention_bytes: int
    kv_bytes: int
    mlp_bytes: int
    attention_weights: int
    kv_weights: int
    mlp_weights: int


@dataclass(frozen=True)
class ModelSizes:
    """A model's parts. `kv_bytes_per_token` is of one layer; `attention_width` is heads times head size."""

    layers: tuple[LayerSizes, ...]
    other_bytes: int
    head_bytes: int
    head_weights: int
    kv_bytes_per_token: int
    attention_width: int

    @property
    def total_bytes(self) -> int:
        return self.other_bytes + sum(layer.total_bytes for layer in self.layers)

    def with_kv_bytes(self, bytes_per_token: int | None) -> ModelSizes:
        """The same model with so many bytes of K/V in a layer; itself where that is None."""
        return self if bytes_per_token is None else replace(self, kv_bytes_per_token=bytes_per_token)

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: Any, *, place: str) -> ModelSizes:
        try:
            layers = tuple(LayerSizes(**_integers(layer, LayerSizes)) for layer in document["layers"])
            scalars = {name: value for name, value in document.items() if name != "layers"}
            return cls(layers=layers, **_integers(scalars, cls, without="layers"))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ArtifactError(f"{place}: sizes is broken: {error}", hint="run voidprune profile again") from error


def _integers(document: dict[str, Any], kind: type, *, without: str = "") -> dict[str, int]:
    names = {field.name for field in fields(kind)} - {without}
    if document.keys() != names or not all(type(value) is int for value in document.values()):
        raise ValueError(f"expected whole numbers for {', '.join(sorted(names))}")
    return document


def measure_sizes(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    size_of: Callable[[TensorRecord], int] | None = None,
    read_by_decode: Callable[[TensorRecord], int] | None = None,
) -> ModelSizes:
    """Read sizes off the header; with `dtype`, as if float tensors were stored in it.

    `size_of` gives the bytes of a tensor that is stored in another way yet; `dtype` is then that of keys and values.
    `read_by_decode` gives those of its bytes that decode reads, where these are fewer. A tied head is counted where it is stored,
    with the embedding. Raises ModelError for packed matrices.
    """
    refuse_packed(checkpoint.folder)

    def size(record: TensorRecord) -> int:
        return stored_bytes(record, dtype) if size_of is None else size_of(record)

    used = size if read_by_decode is None else read_by_decode
    architecture = checkpoint.architecture
    names = architecture.spec.tensors
    head = checkpoint.tensors[f"{names.embedding if architecture.tied_embeddings else names.head}.weight"]
    tied_copy = f"{names.head}.weight" if architecture.tied_embeddings else None
    return ModelSizes(
        layers=_measure_layers(checkpoint, size, used),
        other_bytes=sum(
            size(record)
            for record in checkpoint.tensors.values()
            if names.layer_of(record.name) is None and record.name != tied_copy
        ),
        head_bytes=size(head),
        head_weights=architecture.vocab_size * architecture.hidden_size,
        kv_bytes_per_token=architecture.kv_width * DTYPE_BYTES[dtype or head.dtype],
        attention_width=architecture.attention_width,
    )


def _measure_layers(
    checkpoint: Checkpoint, stored: Callable[[TensorRecord], int], used: Callable[[TensorRecord], int]
) -> tuple[LayerSizes, ...]:
    architecture = checkpoint.architecture
    layers: list[dict[str, TensorRecord]] = [{} for _ in range(architecture.num_layers)]
    for record in checkpoint.tensors.values():
        place = architecture.spec.tensors.layer_of(record.name)
        if place is not None and place[0] < len(layers):  # behind them: layers for multi-token prediction
            layers[place[0]][place[1]] = record
    return tuple(_measure_layer(layer, architecture, checkpoint.config, stored, used) for layer in layers)


def _measure_layer(
    layer: dict[str, TensorRecord],
    architecture: DecoderArchitecture,
    config: Config,
    stored: Callable[[TensorRecord], int],
    used: Callable[[TensorRecord], int],
) -> LayerSizes:
    names = architecture.spec.tensors
    running = _share_of_experts(layer, architecture)

    def measure(parts: tuple[str, ...]) -> tuple[int, int]:
        """(bytes, weights) that a token uses of what belongs to these parts."""
        num_bytes = num_weights = Fraction(0)
        for suffix, record in layer.items():
            if not _belongs(suffix, parts):
                continue
            share = running if _belongs(suffix, (names.experts,)) else Fraction(1)
            num_bytes += share * used(record)
            num_weights += share * weights_in(suffix, record.shape, config.get("quantization_config"))
        return int(num_bytes), int(num_weights)

    attention, kv, mlp = (measure(parts) for parts in (names.attention_parts, names.kv_parts, names.mlp_parts))
    if names.fused_qkv is not None:
        # q, k and v lie one below the other: the rows of k and v are all that K/V need.
        heads = architecture.num_heads + 2 * architecture.num_kv_heads
        fused = (Fraction(2 * architecture.num_kv_heads, heads) * number for number in measure((names.fused_qkv,)))
        kv = (kv[0] + int(next(fused)), kv[1] + int(next(fused)))
    return LayerSizes(
        total_bytes=sum(map(stored, layer.values())),
        attention_bytes=attention[0],
        kv_bytes=kv[0],
        mlp_bytes=mlp[0],
        attention_weights=attention[1],
        kv_weights=kv[1],
        mlp_weights=mlp[1],
    )


def _share_of_experts(layer: dict[str, TensorRecord], architecture: DecoderArchitecture) -> Fraction:
    """Experts that a token runs / experts. They are stored apart (`experts.7.up_proj`) or as one [experts, ...] tensor."""
    prefix = architecture.spec.tensors.experts + "."
    found = {suffix[len(prefix) :]: record for suffix, record in layer.items() if suffix.startswith(prefix)}
    apart = {name.partition(".")[0] for name in found if name[0].isdigit()}
    num_experts = len(apart) if apart else max((record.shape[0] for record in found.values()), default=0)
    return Fraction(min(architecture.experts_per_token, num_experts), num_experts) if num_experts else Fraction(1)


def _belongs(suffix: str, parts: tuple[str, ...]) -> bool:
    return any(suffix == part or suffix.startswith(part + ".") for part in parts)
