"""What the parts of a model weigh, from its header alone: enough to cost a schedule without the model at hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from voidprune.errors import ArtifactError
from voidprune.models.checkpoint import DTYPE_BYTES, Checkpoint


@dataclass(frozen=True)
class LayerSizes:
    """Parts of one decoder layer: bytes, and weights in matrices, of attention, of its K/V part alone, and of the MLP."""

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


def measure_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """Read sizes off the header. A tied head is counted where it is stored, with the embedding."""
    architecture = checkpoint.architecture
    names = architecture.spec.tensors
    head = checkpoint.tensors[f"{names.embedding if architecture.tied_embeddings else names.head}.weight"]
    layer_bytes = checkpoint.layer_bytes()
    tied_copy = f"{names.head}.weight" if architecture.tied_embeddings else None
    return ModelSizes(
        layers=tuple(_measure_layer(checkpoint, layer, total) for layer, total in enumerate(layer_bytes)),
        other_bytes=sum(
            record.num_bytes
            for record in checkpoint.tensors.values()
            if names.layer_of(record.name) is None and record.name != tied_copy
        ),
        head_bytes=head.num_bytes,
        head_weights=architecture.vocab_size * architecture.hidden_size,
        kv_bytes_per_token=2 * architecture.num_kv_heads * architecture.head_dim * DTYPE_BYTES[head.dtype],
        attention_width=architecture.num_heads * architecture.head_dim,
    )


def _measure_layer(checkpoint: Checkpoint, layer: int, total_bytes: int) -> LayerSizes:
    names = checkpoint.architecture.spec.tensors

    def measure(suffixes: Iterable[str]) -> tuple[int, int]:
        records = [
            checkpoint.tensors[name]
            for suffix in suffixes
            for name in (f"{names.layer(layer, suffix)}.weight", f"{names.layer(layer, suffix)}.bias")
            if name in checkpoint.tensors
        ]
        weights = sum(record.shape[0] * record.shape[1] for record in records if len(record.shape) == 2)
        return sum(record.num_bytes for record in records), weights

    attention_bytes, attention_weights = measure(
        (names.attention_norm, names.query, names.key, names.value, names.output)
    )
    kv_bytes, kv_weights = measure((names.attention_norm, names.key, names.value))
    mlp_bytes, mlp_weights = measure((names.mlp_norm, names.gate, names.up, names.down))
    return LayerSizes(
        total_bytes=total_bytes,
        attention_bytes=attention_bytes,
        kv_bytes=kv_bytes,
        mlp_bytes=mlp_bytes,
        attention_weights=attention_weights,
        kv_weights=kv_weights,
        mlp_weights=mlp_weights,
    )
