"""What is trained has a place in a stock checkpoint, of every family; merging changes what the model says by rounding alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.healing.students import load_student
from tests.tiny_models import TinyModel
from voidprune.healing.adapters import Trainable
from voidprune.healing.settings import Parameters
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.pretrained import load_model
from voidprune.schedule import dropped_schedule

LORA, FULL = Parameters.LORA, Parameters.FULL
TOKENS = torch.arange(3, 15).view(2, 6)


def make_trainable(model: PreTrainedModel, parameters: Parameters, *, embeddings: bool = False) -> Trainable:
    return Trainable(model, parameters=parameters, rank=4, alpha=8, embeddings=embeddings, seed=0)


def say(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits_BTV: Tensor = model(TOKENS).logits
    return logits_BTV


def disturb(trainable: Trainable) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))


@pytest.mark.parametrize("parameters", Parameters)
def test_what_was_trained_goes_back_into_a_checkpoint(
    family_model: TinyModel, tmp_path: Path, parameters: Parameters
) -> None:
    """Changed weights, written over those of the folder by their names, are the model that was trained."""
    from safetensors.torch import load_file, save_file

    student = load_student(family_model, dropped_schedule(family_model.identity, {1, 4}), tmp_path / "slim")
    before = say(student)
    trainable = make_trainable(student, parameters, embeddings=True)
    assert torch.equal(say(student), before), "nothing changes before training"
    disturb(trainable)
    trained = say(student)
    assert not torch.allclose(trained, before, atol=1e-2)
    changed = trainable.merge()
    torch.testing.assert_close(say(student), trained, atol=2e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in student.parameters())

    weights = load_file(tmp_path / "slim" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "slim")
    for name, tensor in changed.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert not torch.equal(weights[name], tensor)
    save_file(
        weights | {name: tensor.contiguous() for name, tensor in changed.items()},
        tmp_path / "slim" / "model.safetensors",
    )
    torch.testing.assert_close(say(load_model(tmp_path / "slim")), trained, atol=2e-4, rtol=1e-4)


def trained_names(source: TinyModel, folder: Path, parameters: Parameters, *, embeddings: bool = False) -> set[str]:
    student = load_student(source, dropped_schedule(source.identity, {1, 2, 3, 4}), folder)
    return set(make_trainable(student, parameters, embeddings=embeddings).merge())


def test_layers_alone_are_trained(llama: TinyModel, tmp_path: Path) -> None:
    matrices = {
        f"model.layers.{layer}.{matrix}_proj.weight"
        for layer in (0, 1)
        for matrix in (*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    norms = {
        f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (0, 1) for norm in ("input", "post_attention")
    }
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    assert trained_names(llama, tmp_path / "slim", LORA) == matrices
    assert trained_names(llama, tmp_path / "slim", FULL) == matrices | norms
    assert trained_names(llama, tmp_path / "slim", FULL, embeddings=True) == matrices | norms | ends


def test_tied_head_is_the_embedding(get_model: object, tmp_path: Path) -> None:
    tied = get_model("llama-tied-small-heads")  # type: ignore[operator]
    names = trained_names(tied, tmp_path / "slim", FULL, embeddings=True)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_adapters_are_small_and_float32(llama: TinyModel, tmp_path: Path) -> None:
    student = load_student(llama, dropped_schedule(llama.identity, {1}), tmp_path / "slim", dtype="bf16")
    trainable = make_trainable(student, LORA)
    parameters = trainable.parameters()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert {min(parameter.shape) for parameter in parameters.values()} == {4}
    assert all(tensor.dtype is torch.bfloat16 for tensor in trainable.merge().values())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_same_seed_same_adapters(llama: TinyModel, tmp_path: Path) -> None:
    """And nothing of the state of torch's own generator."""
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        student = load_student(llama, dropped_schedule(llama.identity, {1}), tmp_path / "slim")
        found.append(make_trainable(student, LORA).parameters())
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(state).get_state())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_weights_are_loaded_by_name(llama: TinyModel, tmp_path: Path) -> None:
    student = load_student(llama, dropped_schedule(llama.identity, {1}), tmp_path / "slim")
    trainable = make_trainable(student, FULL)
    values = {name: torch.full_like(parameter, 2.0) for name, parameter in trainable.parameters().items()}
    trainable.load(values)
    assert all(bool((parameter == 2).all()) for parameter in trainable.parameters().values())
    assert all(isinstance(parameter, nn.Parameter) for parameter in trainable.parameters().values())
