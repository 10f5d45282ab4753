"""Weights on a device once, for all sessions: bytes of the safetensors files, lent to onnxruntime through DLPack.

Graphs name ranges of bytes, and ranges of two graphs may overlap (query, key and value in one, key and value in the other). So
overlapping ranges are loaded as one tensor, and each initializer is a view of it. torch is imported when something is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_TYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 16: "bfloat16"}
"""Element types of ONNX, and torch's names of them. Initializers of other types are left to onnxruntime."""
_ALIGNMENT = 16  # bytes: the widest load of a CUDA kernel


@dataclass(frozen=True)
class WeightRange:
    """An initializer that lies in a weight file: `num_bytes` bytes at `offset`."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    element_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DeviceWeights:
    """`values[graph file][initializer]` points into `tensors`, which have to live as long as a session that uses them."""

    tensors: tuple[Tensor, ...]
    values: Mapping[str, Mapping[str, ort.OrtValue]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@functools.cache
def can_load(device: str) -> bool:
    """Whether there is a torch here that sees the device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return device != "cuda" or torch.cuda.is_available()


def load_device_weights(wanted: Mapping[str, Sequence[WeightRange]], *, device: str) -> DeviceWeights:
    """Load what some graphs refer to, each byte once. On "cpu" the files are mapped, and nothing is copied."""
    tensors: list[Tensor] = []
    views: dict[WeightRange, ort.OrtValue] = {}
    for group in overlapping_groups({weight for weights in wanted.values() for weight in weights}):
        start = group[0].offset
        end = max(weight.offset + weight.num_bytes for weight in group)
        whole = _load_bytes(group[0].file, start, end, device=device)
        tensors.append(whole)
        for weight in group:
            part = whole[weight.offset - start : weight.offset - start + weight.num_bytes]
            if (weight.offset - start) % _ALIGNMENT:  # a layer of odd width: rather twice than misaligned
                part = part.clone()
                tensors.append(part)
            views[weight] = _lend(part, weight)
    values = {graph: {weight.name: views[weight] for weight in weights} for graph, weights in wanted.items()}
    return DeviceWeights(tuple(tensors), values)


def weight_ranges(graph: Path) -> list[WeightRange]:
    """The initializers of a graph that lie in weight files beside it."""
    import onnx

    found = []
    for initializer in onnx.load(graph, load_external_data=False).graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL and initializer.data_type in _TORCH_TYPES:
            place = {entry.key: entry.value for entry in initializer.external_data}
            file = graph.parent / Path(place["location"]).name
            offset, length = int(place["offset"]), int(place["length"])
            found.append(
                WeightRange(initializer.name, file, offset, length, initializer.data_type, tuple(initializer.dims))
            )
    return found


def overlapping_groups(weights: Iterable[WeightRange]) -> list[list[WeightRange]]:
    """Ranges that share bytes, together; each group in order of offset."""
    groups: list[list[WeightRange]] = []
    end = 0
    for weight in sorted(weights, key=lambda weight: (weight.file, weight.offset, -weight.num_bytes)):
        if groups and weight.file == groups[-1][0].file and weight.offset < end:
            groups[-1].append(weight)
            end = max(end, weight.offset + weight.num_bytes)
        else:
            groups.append([weight])
            end = weight.offset + weight.num_bytes
    return groups


def _load_bytes(file: Path, start: int, end: int, *, device: str) -> Tensor:
    import torch

    # Copy-on-write, because torch warns of an array that nobody may write to; nobody does.
    return torch.from_numpy(np.memmap(file, np.uint8, mode="c", offset=start, shape=end - start)).to(device)


def _lend(part: Tensor, weight: WeightRange) -> ort.OrtValue:
    """onnxruntime copies an initializer whose value owns its buffer; one that came through DLPack does not."""
    import torch

    return ort.OrtValue.from_dlpack(part.view(getattr(torch, _TORCH_TYPES[weight.element_type])).view(weight.shape))
