"""A stock transformers model whose weights are in memory only while they are needed: one decoder layer at a time.

For models larger than the memory, and for sources of which only the kept layers are on this disk. The model is built without
weights; hooks load each part when it is called and forget it when it returns, so one pass reads every tensor once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from voidprune.errors import ModelError
from voidprune.models.checkpoint import Checkpoint, TensorRecord
from voidprune.models.configs import remap_config
from voidprune.models.packed import PackedRecord, dequantize_rows
from voidprune.models.pretrained import DTYPES, check_rotary_frequencies
from voidprune.models.tensors import FLOAT_DTYPES, PRECISIONS, fetch_tensors, read_pieces

_CONVERSION = 3
"""Measured on a layer of 104 MB in float32: 253 MB at most where files hold float32, 340 MB by way of bf16 (transformers 5.23)."""
_UNPACKED_VALUES = 1 << 22  # at a time
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
    """The model of a checkpoint, run in `dtype` with weights rounded to the dtype `through`; packed matrices as what they mean.

    The layers `dropped` get zeros for weights and are never read: for layers whose output does not count.
    Raises ModelError where the tensors do not go by the names of transformers' modules.
    """
    model = _build_empty(checkpoint, dtype=dtype, device=device)
    weights = _StoredWeights(checkpoint, model, through=through, dtype=dtype, dropped=dropped)
    handles = []
    for path, unit in _units(model, layers=checkpoint.architecture.spec.modules.layers):
        handles.append(unit.register_forward_pre_hook(_fill(path, weights, device=device)))
        handles.append(unit.register_forward_hook(functools.partial(_forget, device=device)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def resident_model(
    checkpoint: Checkpoint, *, dtype: str = "F32", device: str = "cpu", dropped: Collection[int] = ()
) -> PreTrainedModel:
    """The same in `dtype`, each part loaded when it is first called and kept: how packed matrices are run in torch.

    Raises ModelError, also when it is run.
    """
    model = _build_empty(checkpoint, dtype=dtype, device=device)
    weights = _StoredWeights(checkpoint, model, through=dtype, dtype=dtype, dropped=dropped)
    for path, unit in _units(model, layers=checkpoint.architecture.spec.modules.layers):
        _fill_once(unit, _fill(path, weights, device=device))
    return model


def _build_empty(checkpoint: Checkpoint, *, dtype: str, device: str) -> PreTrainedModel:
    """The model without weights. Raises ModelError."""
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
    return model


@dataclass(frozen=True)
class _StoredWeights:
    """What belongs into the modules of a model, read from its checkpoint when it is asked for."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    through: str
    dtype: str
    dropped: Collection[int]

    def load(self, path: str, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The weights of the unit at `path`, by name and shape in it. Raises ModelError where they are not there."""
        names = {name: self._stored_name(f"{path}.{name}") for name in wanted}
        place = self.checkpoint.architecture.spec.tensors.layer_of(next(iter(names.values())))
        if place is not None and place[0] in self.dropped:
            return {name: torch.zeros(shape, dtype=_TORCH_DTYPES[self.dtype]) for name, shape in wanted.items()}
        records = {name: self.checkpoint.tensors.get(stored) for name, stored in names.items()}
        if None in records.values() and place is not None:
            return self._load_converted(place[0], wanted)
        for name, record in records.items():
            self._require(name=names[name], shape=wanted[name], found=None if record is None else record.shape)
        return {
            name: read_weights(record, through=self.through, dtype=self.dtype)
            for name, record in records.items()
            if record is not None
        }

    def _stored_name(self, parameter: str) -> str:
        """The name in the files of a tensor of the model, whose modules may be nested otherwise (Gemma 3)."""
        architecture = self.checkpoint.architecture
        names, modules = architecture.spec.tensors, architecture.spec.modules
        head: Any = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if self.model.get_submodule(parameter.rpartition(".")[0]) is head:
            tied = architecture.tied_embeddings and f"{names.head}.weight" not in self.checkpoint.tensors
            return f"{names.embedding if tied else names.head}.{parameter.rpartition('.')[2]}"
        inside, outside = modules.layers.removesuffix("layers"), names.layers.removesuffix("layers")
        return outside + parameter.removeprefix(inside) if parameter.startswith(inside) else parameter

    def _load_converted(self, layer: int, wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """A layer whose tensors transformers puts together when it loads them (5.x: experts), by its own loader.

        It gets the layer as a model of one layer and one word.
        """
        spec = self.checkpoint.architecture.spec
        config = remap_config(self.checkpoint.config, spec, [layer])
        config |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        tensors = {}
        for name, record in self.checkpoint.tensors.items():
            place = spec.tensors.layer_of(name)
            if place is not None and place[0] == layer:
                held = read_weights(record, through=self.through, dtype=self.through)
                tensors[spec.tensors.layer(0, place[1])] = held
        path = f"{spec.modules.layers}.0"
        with _quiet():
            loaded: Any = type(self.model).from_pretrained(
                None,
                config=AutoConfig.for_model(**config),
                state_dict=tensors,
                dtype=_TORCH_DTYPES[self.dtype],
                output_loading_info=True,
            )
        single, report = loaded
        found = single.get_submodule(path).state_dict()
        for name, shape in wanted.items():
            is_there = name in found and f"{path}.{name}" not in report["missing_keys"]
            self._require(
                name=f"{spec.modules.layers}.{layer}.{name}",
                shape=shape,
                found=tuple(found[name].shape) if is_there else None,
            )
        return {name: found[name] for name in wanted}

    def _require(self, *, name: str, shape: torch.Size, found: tuple[int, ...] | None) -> None:
        if found != tuple(shape):
            raise ModelError(
                f"{self.checkpoint.folder} cannot be run layer by layer: it holds no {name} of shape {list(shape)}",
                hint="verify the export on a machine with more memory",
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers lists at length what a part of a model lacks."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = logging.get_verbosity()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)  # type: ignore[no-untyped-call]


def read_weights(record: TensorRecord, *, through: str, dtype: str) -> Tensor:
    """A float tensor, rounded to the dtype `through` and then held in `dtype`; read in pieces of bounded size.

    Of a packed matrix, what its numbers mean.
    """
    if isinstance(record, PackedRecord):
        return _unpack_weights(record).to(_TORCH_DTYPES[dtype])
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


def _unpack_weights(record: PackedRecord) -> Tensor:
    rows, columns = record.shape
    weights = torch.empty(rows, columns)
    step = max(1, _UNPACKED_VALUES // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weights[start:stop] = torch.from_numpy(dequantize_rows(record, start, stop))
    return weights


def largest_part(checkpoint: Checkpoint) -> int:
    """Float32 bytes of the largest thing that has to be in memory at once: a decoder layer, or a tensor of none.

    Experts that transformers puts together when it loads them are there _CONVERSION times meanwhile.
    """
    names = checkpoint.architecture.spec.tensors
    parts: dict[object, int] = {}
    for name, record in checkpoint.tensors.items():
        place = names.layer_of(name)
        key = name if place is None else place[0]
        copies = _CONVERSION if place is not None and place[1].startswith(f"{names.experts}.") else 1
        parts[key] = parts.get(key, 0) + copies * 4 * math.prod(record.shape)
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


def _stored(unit: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """What a checkpoint holds of a unit: (name in the unit, module, name in the module, tensor). Buffers, too, if they are kept."""
    for inner, module in unit.named_modules():
        kept = {name: held for name, held in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, held in (*module._parameters.items(), *kept.items()):
            if held is not None:
                yield (f"{inner}.{name}" if inner else name), module, name, held


def _fill(path: str, weights: _StoredWeights, *, device: str) -> Callable[[nn.Module, Any], None]:
    def hook(unit: nn.Module, _args: Any) -> None:
        found = weights.load(path, {name: held.shape for name, _, _, held in _stored(unit)})
        for name, module, own_name, held in list(_stored(unit)):
            tensor = found[name].to(device)
            if isinstance(held, nn.Parameter):
                module._parameters[own_name] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[own_name] = tensor

    return hook


def _fill_once(unit: nn.Module, fill: Callable[[nn.Module, Any], None]) -> None:
    def hook(unit: nn.Module, args: Any) -> None:
        handle.remove()
        fill(unit, args)

    handle = unit.register_forward_pre_hook(hook)


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
