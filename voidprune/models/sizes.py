"""What the parts of a model weigh, from its header alone: enough to cost a schedule without the model at hand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from voidprune.errors import ArtifactError
from voidprune.models.checkpoint import DTYPE_BYTES, Checkpoint, TensorRecord, stored_bytes


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


def measure_sizes(checkpoint: Checkpoint, *, dtype: str | None = None) -> ModelSizes:
    """Read sizes off the header; with `dtype`, as if float tensors were stored in it.

    A tied head is counted where it is stored, with the embedding.
    """
    architecture = checkpoint.architecture
    names = architecture.spec.tensors
    head = checkpoint.tensors[f"{names.embedding if architecture.tied_embeddings else names.head}.weight"]
    tied_copy = f"{names.head}.weight" if architecture.tied_embeddings else None
    return ModelSizes(
        layers=_measure_layers(checkpoint, dtype),
        other_bytes=sum(
            stored_bytes(record, dtype)
            for record in checkpoint.tensors.values()
            if names.layer_of(record.name) is None and record.name != tied_copy
        ),
        head_bytes=stored_bytes(head, dtype),
        head_weights=architecture.vocab_size * architecture.hidden_size,
        kv_bytes_per_token=2 * architecture.num_kv_heads * architecture.head_dim * DTYPE_BYTES[dtype or head.dtype],
        attention_width=architecture.num_heads * architecture.head_dim,
    )


def _measure_layers(checkpoint: Checkpoint, dtype: str | None) -> tuple[LayerSizes, ...]:
    names = checkpoint.architecture.spec.tensors
    tensors: list[dict[str, TensorRecord]] = [{} for _ in range(checkpoint.architecture.num_layers)]
    for record in checkpoint.tensors.values():
        if (place := names.layer_of(record.name)) is not None:
            tensors[place[0]][place[1]] = record

    def measure(layer: dict[str, TensorRecord], parts: tuple[str, ...]) -> tuple[int, int]:
        wanted = [layer[name] for part in parts for name in (f"{part}.weight", f"{part}.bias") if name in layer]
        weights = sum(math.prod(record.shape) for record in wanted if len(record.shape) == 2)
        return sum(stored_bytes(record, dtype) for record in wanted), weights

    sizes = []
    for layer in tensors:
        attention = measure(layer, (names.attention_norm, names.query, names.key, names.value, names.output))
        kv = measure(layer, (names.attention_norm, names.key, names.value))
        mlp = measure(layer, (names.mlp_norm, names.gate, names.up, names.down))
        sizes.append(
            LayerSizes(
                total_bytes=sum(stored_bytes(record, dtype) for record in layer.values()),
                attention_bytes=attention[0],
                kv_bytes=kv[0],
                mlp_bytes=mlp[0],
                attention_weights=attention[1],
                kv_weights=kv[1],
                mlp_weights=mlp[1],
            )
        )
    return tuple(sizes)
