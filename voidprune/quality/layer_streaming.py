"""A stock transformers model whose weights are in memory only while they are needed: one decoder layer at a time.

For models larger than the memory, and for sources of which only the kept layers are on this disk. The model is built without
weights; hooks load each part when it is called and forget it when it returns, so one pass reads every tensor once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from voidprune.errors import ModelError
from voidprune.models.checkpoint import Checkpoint, TensorRecord
from voidprune.models.pretrained import DTYPES, check_rotary_frequencies
from voidprune.models.tensors import FLOAT_DTYPES, PRECISIONS, fetch_tensors, read_pieces

_TORCH_DTYPES = {stored: getattr(torch, DTYPES[name]) for name, stored in PRECISIONS.items()}


@contextmanager
def streamed_model(
    checkpoint: Checkpoint,
    *,
    through: str,
    dtype: str = "F32",
    device: str = "cpu",
    dropped: Collection[int] = (),
) -> Iterator[PreTrainedModel]:
    """The model of a checkpoint, run in `dtype` with weights rounded to the dtype `through`.

    The layers `dropped` get zeros for weights and are never read: for layers whose output does not count.
    Raises ModelError where the tensors do not go by the names of transformers' modules.
    """
    folder = checkpoint.folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with _without_weights():
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config, dtype=_TORCH_DTYPES[dtype]).eval()
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"{folder} cannot be run layer by layer: transformers gives its buffer {name} no value")
    check_rotary_frequencies(model, folder)
    _forget(model, device=device)
    for module in model.modules():
        for name, held in module._buffers.items():
            if held is not None:
                module._buffers[name] = held.to(device)
    names = checkpoint.architecture.spec.tensors
    handles = []

    def load(parameter: str, shape: torch.Size) -> Tensor:
        place = names.layer_of(parameter)
        if place is not None and place[0] in dropped:
            return torch.zeros(shape, dtype=_TORCH_DTYPES[dtype], device=device)
        record = checkpoint.tensors.get(parameter)
        if record is None and parameter == f"{names.head}.weight" and checkpoint.architecture.tied_embeddings:
            record = checkpoint.tensors[f"{names.embedding}.weight"]
        if record is None or record.shape != tuple(shape):
            raise ModelError(
                f"{folder} cannot be run layer by layer: it holds no {parameter} of shape {list(shape)}",
                hint="verify the export on a machine with more memory",
            )
        return read_weights(record, through=through, dtype=dtype).to(device)

    for path, unit in _units(model, layers=names.layers):
        handles.append(unit.register_forward_pre_hook(_fill(path, load)))
        handles.append(unit.register_forward_hook(functools.partial(_forget, device=device)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def read_weights(record: TensorRecord, *, through: str, dtype: str) -> Tensor:
    """A float tensor, rounded to the dtype `through` and then held in `dtype`; read in pieces of bounded size."""
    if record.dtype not in FLOAT_DTYPES:
        raise ModelError(f"{record.name} is {record.dtype}; only {', '.join(FLOAT_DTYPES)} can be compared")
    fetch_tensors([record])
    weights = torch.empty(record.shape, dtype=_TORCH_DTYPES[dtype])
    flat, position = weights.view(-1), 0
    for content in read_pieces(record):
        piece = torch.frombuffer(bytearray(content), dtype=_TORCH_DTYPES[record.dtype])
        flat[position : position + len(piece)] = piece.to(_TORCH_DTYPES[through])
        position += len(piece)
    return weights


def largest_part(checkpoint: Checkpoint) -> int:
    """Float32 bytes of the largest thing that has to be in memory at once: a decoder layer, or a tensor of none."""
    names = checkpoint.architecture.spec.tensors
    parts: dict[object, int] = {}
    for name, record in checkpoint.tensors.items():
        place = names.layer_of(name)
        key = name if place is None else place[0]
        parts[key] = parts.get(key, 0) + 4 * math.prod(record.shape)
    return max(parts.values())


def _units(model: nn.Module, *, layers: str) -> list[tuple[str, nn.Module]]:
    """What is loaded at once: each decoder layer, and each other module that holds parameters of its own."""
    found = []
    for path, module in model.named_modules():
        parent, _, index = path.rpartition(".")
        is_layer = parent == layers and index.isdigit()
        in_layer = path.startswith(layers + ".") and not is_layer
        if is_layer or (not in_layer and any(True for _ in module.parameters(recurse=False))):
            found.append((path, module))
    return found


def _fill(path: str, load: Callable[[str, torch.Size], Tensor]) -> Callable[[nn.Module, Any], None]:
    def hook(unit: nn.Module, _args: Any) -> None:
        for inner, module in unit.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full = ".".join(part for part in (path, inner, name) if part)
                    module._parameters[name] = nn.Parameter(load(full, parameter.shape), requires_grad=False)

    return hook


def _forget(unit: nn.Module, *_: Any, device: str) -> None:
    """Leave of each parameter what says its shape and device: one number, repeated without being stored again."""
    for module in unit.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                nothing = torch.zeros((), dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters of modules that are built in this block take no memory; buffers, which are computed, get their values.

    `torch.device("meta")` would leave the buffers without values, too, and transformers only fills those in when it loads
    weights. What is patched here is what accelerate's `init_empty_weights` patches.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
