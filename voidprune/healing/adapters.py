"""What of a student is trained, and what of it ends up in a checkpoint: low-rank adapters through peft, or the weights themselves.

Adapters are merged into the matrices that they adapt, so that the checkpoint stays stock either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.errors import MissingExtraError
from voidprune.healing.settings import Parameters
from voidprune.models.architecture import FamilySpec
from voidprune.models.families import find_family


class Trainable:
    """A student whose parameters that are trained require gradients, in float32, and no others."""

    def __init__(
        self, student: PreTrainedModel, *, parameters: Parameters, rank: int, alpha: int, embeddings: bool, seed: int
    ) -> None:
        self.student = student
        self._spec = find_family(student.config.to_dict())
        self._dtype = student.dtype
        self._peft: Any = None
        student.requires_grad_(False)
        chosen = _trained_weights(student, self._spec, matrices=parameters is Parameters.LORA, embeddings=embeddings)
        self._changed = sorted(chosen)
        if parameters is Parameters.LORA:
            place = self._spec.modules.layers
            targets = [name.removeprefix(place + ".").removesuffix(".weight") for name in chosen]
            self._peft = _add_adapters(student.get_submodule(place), targets, rank, alpha, seed)
        else:
            student.float()  # type: ignore[no-untyped-call]
            for parameter in chosen.values():
                parameter.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the student."""
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def load(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(values[name])

    def merge(self) -> dict[str, Tensor]:
        """End the training: a stock student in its own dtype again. Returns what was trained, by its names in a checkpoint."""
        if self._peft is not None:
            self._peft.merge_and_unload()
        self.student.requires_grad_(False).to(self._dtype)  # type: ignore[arg-type]
        weights = dict(self.student.named_parameters())
        return {checkpoint_name(name, self.student, self._spec): weights[name].detach() for name in self._changed}


def checkpoint_name(parameter: str, student: PreTrainedModel, spec: FamilySpec) -> str:
    """What a parameter of the model that transformers makes of a checkpoint is called in that checkpoint."""
    place = spec.modules.layers + "."
    if not parameter.startswith(place):
        ends = {id(weight): name for name, weight in _end_weights(student, spec).items()}
        return ends[id(student.get_parameter(parameter))]
    index, _, suffix = parameter.removeprefix(place).partition(".")
    older = spec.modules.mlp_in_transformers_4
    if older is not None and suffix.startswith(spec.modules.mlp + "."):
        suffix = older + suffix.removeprefix(spec.modules.mlp)
    return spec.tensors.layer(int(index), suffix)


def load_weights(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Give a model new weights of its layers, its embedding and its head, by their names in a checkpoint of it."""
    spec = find_family(model.config.to_dict())
    layers = spec.modules.layers + "."
    places = {
        checkpoint_name(name, model, spec): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(layers)
    } | _end_weights(model, spec)
    with torch.no_grad():
        for name, tensor in values.items():
            places[name].copy_(tensor)


def _end_weights(student: PreTrainedModel, spec: FamilySpec) -> dict[str, nn.Parameter]:
    """The embedding and the head, by their names in a checkpoint. A tied head is the embedding."""
    embedding, head = (
        module.get_parameter("weight")
        for module in (student.get_input_embeddings(), student.get_output_embeddings())  # type: ignore[no-untyped-call]
    )
    named = {f"{spec.tensors.embedding}.weight": embedding}
    return named if head is embedding else {**named, f"{spec.tensors.head}.weight": head}


def _trained_weights(
    student: PreTrainedModel, spec: FamilySpec, *, matrices: bool, embeddings: bool
) -> dict[str, nn.Parameter]:
    """The weights of the layers, or only the matrices of linear maps, by their names in the student.

    Experts stay as they are: transformers keeps them in other tensors than checkpoints do.
    """
    linear = {f"{path}.weight" for path, module in student.named_modules() if isinstance(module, nn.Linear)}
    ends = {id(weight) for weight in _end_weights(student, spec).values()} if embeddings and not matrices else set()
    found = {}
    for name, parameter in student.named_parameters():
        if name.startswith(spec.modules.layers + "."):
            place = spec.tensors.layer_of(checkpoint_name(name, student, spec))
            assert place is not None
            if not place[1].startswith(spec.tensors.experts + ".") and (not matrices or name in linear):
                found[name] = parameter
        elif id(parameter) in ends:
            found[name] = parameter
    return found


def require_peft() -> None:
    """Raise MissingExtraError where adapters cannot be had."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingExtraError("peft is not installed", hint="pip install 'voidprune[heal]'") from error


def _add_adapters(layers: nn.Module, targets: list[str], rank: int, alpha: int, seed: int) -> Any:
    """Low-rank adapters (arXiv 2106.09685) of these linear maps: W + alpha / rank * B A, with B zero at first.

    peft is given the layers alone: of a whole transformers model it asks the config, and takes a dense MLP beside experts for one
    of these (0.21.2).
    """
    require_peft()
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = LoraModel(layers, config, "default")
    for parameter in layers.parameters():
        if parameter.requires_grad:  # an adapter; peft gives it the dtype of what it adapts
            parameter.data = parameter.data.float()
    return adapted
