"""The state of a training comes back bit by bit, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from voidprune.errors import ArtifactError
from voidprune.healing.training_state import (
    FILE,
    Measurement,
    Progress,
    copy_weights,
    read_state,
    restore_optimizer,
    write_state,
)

KEY = {"seed": 0, "samples": "sha256:1", "share": 0.1}


def make_training(num_steps: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    rng = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for step in range(num_steps):
        advance(parameters, optimizer, step)
    return parameters, optimizer


def advance(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    optimizer.step()


def look(step: int, loss: float) -> Measurement:
    return Measurement(step, loss, None if step == 0 else 0.1 + 0.2, 1e3 / 3)


def test_goes_on_bit_by_bit(tmp_path: Path) -> None:
    parameters, optimizer = make_training(3)
    progress = Progress(KEY, step=3, seconds=0.1 + 0.2, history=[look(0, 2.0), look(3, 1 / 3)])
    write_state(tmp_path / "state", progress, parameters, optimizer, {})
    assert [path.name for path in (tmp_path / "state").iterdir()] == [FILE]

    state = read_state(tmp_path / "state", key=KEY)
    assert state is not None
    assert state.progress == progress
    fresh, other = make_training(0)
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(state.weights[name])
    restore_optimizer(other, fresh, state)
    for step in (3, 4):
        advance(parameters, optimizer, step)
        advance(fresh, other, step)
    assert all(torch.equal(fresh[name], parameters[name]) for name in parameters)
    plain, _ = make_training(5)
    assert all(torch.equal(plain[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize("best_step", [0, 3])
def test_best_weights_are_kept(tmp_path: Path, best_step: int) -> None:
    parameters, optimizer = make_training(3)
    losses = {0: 2.0, 3: 2.0, best_step: 1.0}
    progress = Progress(KEY, step=3, history=[look(step, loss) for step, loss in losses.items()])
    earlier: dict[str, Tensor] = {name: torch.full_like(parameter, 7) for name, parameter in parameters.items()}
    write_state(tmp_path, progress, parameters, optimizer, copy_weights(parameters) if best_step == 3 else earlier)
    state = read_state(tmp_path, key=KEY)
    assert state is not None
    assert state.progress.best.step == best_step
    for name, parameter in parameters.items():
        assert torch.equal(state.best[name], parameter if best_step == 3 else earlier[name])


def test_of_equals_the_earliest_is_best() -> None:
    assert Progress(KEY, history=[look(0, 1.0), look(5, 0.5), look(10, 0.5)]).best.step == 5


def test_nothing_there_is_nothing(tmp_path: Path) -> None:
    assert read_state(tmp_path / "none", key=KEY) is None


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    parameters, optimizer = make_training(0)
    write_state(tmp_path, Progress(KEY, history=[look(0, 1.0)]), parameters, optimizer, {})
    with pytest.raises(ArtifactError, match="begun by another run, with another extra, seed") as caught:
        read_state(tmp_path, key={**KEY, "seed": 1, "extra": 1})
    assert "remove the file" in str(caught.value.hint)
    assert read_state(tmp_path, key={**KEY, "seed": 1}, overwrite=True) is None
    assert read_state(tmp_path, key=KEY, overwrite=True) is not None, "of the same run"


@pytest.mark.parametrize("content", [b"", b"no header", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="is not the state of a training"):
        read_state(tmp_path, key=KEY)
