"""How far a training is, on disk: one safetensors file, replaced as a whole, from which it goes on bit by bit.

    <folder>/training.safetensors
        weight.<name>  first.<name>  second.<name>      a trained parameter, and the moments of AdamW
        best.<name>                                     the parameter at the best step, unless that is this step
        metadata: "progress", JSON

No pickle, so no `torch.save` and no `Accelerator.save_state`. Nothing random is left to remember: models run without dropout, and
which samples a step sees is a function of its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from voidprune.artifacts import disk_errors
from voidprune.errors import ArtifactError

FILE = "training.safetensors"
_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}


@dataclass(frozen=True)
class Measurement:
    """A look at the held-out samples after `step` steps. `training_loss` is the mean since the look before, None at step 0.

    Losses are a token's; `tokens_per_second` counts what was fed to the student, since the look before.
    """

    step: int
    held_out_loss: float
    training_loss: float | None
    tokens_per_second: float | None


@dataclass
class Progress:
    """`key` is what determines the run: a state of another key is refused. `seconds` were trained, over all sittings."""

    key: Mapping[str, Any]
    step: int = 0
    seconds: float = 0.0
    history: list[Measurement] = field(default_factory=list)

    @property
    def best(self) -> Measurement:
        """The least loss on held-out samples, the earliest of equals."""
        return min(self.history, key=lambda measurement: measurement.held_out_loss)


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Tensors are on the CPU."""

    progress: Progress
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    best: Mapping[str, Tensor]


def copy_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Where the parameters stand, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def write_state(
    folder: Path,
    progress: Progress,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Raises OutputError."""
    tensors = {f"weight.{name}": parameter.detach().cpu() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for kind, stored in _MOMENTS.items():
            if parameter in optimizer.state:
                tensors[f"{kind}.{name}"] = optimizer.state[parameter][stored].cpu()
    if progress.best.step != progress.step:
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    target = folder / FILE
    with disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".new")
        save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(progress), allow_nan=False)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)


def read_state(folder: Path, *, key: Mapping[str, Any], overwrite: bool = False) -> TrainingState | None:
    """What was written last, or None. Raises ArtifactError where it is broken, or of another run.

    With `overwrite`, that of another run is as none: what is written next replaces it.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        history = [Measurement(**entry) for entry in document.pop("history")]
        progress = Progress(**document, history=history)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not the state of a training: {error}", hint="remove it to begin anew"
        ) from error
    expected = json.loads(json.dumps(key))
    if progress.key != expected:
        if overwrite:
            return None
        names = sorted(name for name in {*expected, *progress.key} if expected.get(name) != progress.key.get(name))
        raise ArtifactError(
            f"{path} was begun by another run, with another {', '.join(names)}",
            hint="repeat that run to finish it, or begin anew: remove the file, or add --overwrite",
        )

    def part(kind: str) -> dict[str, Tensor]:
        return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(kind + ".")}

    weights = part("weight")
    return TrainingState(progress, weights, {kind: part(kind) for kind in _MOMENTS}, part("best") or weights)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: TrainingState
) -> None:
    """Give AdamW the moments that it had."""
    for name, parameter in parameters.items():
        if name in state.moments["first"]:
            moments = {stored: state.moments[kind][name].to(parameter.device) for kind, stored in _MOMENTS.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(state.progress.step)), **moments}
