"""The table of families against transformers: defaults, module paths, and what each kept layer goes on doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.models.architecture import PerLayer
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.families import FAMILIES, REFUSED, find_family
from voidprune.models.pretrained import load_model


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config that says only what it must: what it leaves out is what transformers assumes."""
    spec = FAMILIES[model_type]
    stock = AutoConfig.for_model(model_type).get_text_config().to_dict()
    for name, value in spec.defaults.items():
        if name in ("rope_theta", "partial_rotary_factor", spec.local_rope_theta):
            rope = stock.get("rope_parameters", stock)
            if "rope_parameters" in stock and "full_attention" in rope:
                rope = rope["sliding_attention" if name == spec.local_rope_theta else "full_attention"]
                name = "rope_theta"
            assert rope[name] == value
        elif name == "sliding_window" and "use_sliding_window" in spec.defaults:
            continue  # transformers sets it to None when use_sliding_window is off
        elif name in spec.layer_lists:
            assert value is None, "a list that is left out is made up"
        elif name == "sliding_window_pattern" and name not in stock:
            assert (
                spec.layer_lists["layer_types"].complete("layer_types", spec.defaults.get, len(stock["layer_types"]))
                == (stock["layer_types"])
            )
        else:
            assert stock[name] == value, name


@pytest.mark.parametrize(
    "model_type", sorted(model_type for model_type in FAMILIES if FAMILIES[model_type].layer_lists)
)
@pytest.mark.parametrize("num_layers", [1, 7, 12])
def test_lists_are_made_up_as_transformers_does_it(model_type: str, num_layers: int) -> None:
    spec = FAMILIES[model_type]
    for name, rule in spec.layer_lists.items():
        if name == "mlp_only_layers":
            continue  # transformers asks decoder_sparse_step beside it: see the layers of the fixtures
        for fields in ({}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 4}):
            given = {key: value for key, value in fields.items() if key in spec.defaults}
            stock = (
                AutoConfig.for_model(model_type, num_hidden_layers=num_layers, **given)
                if not spec.text_config
                else (
                    AutoConfig.for_model(
                        model_type, text_config={"num_hidden_layers": num_layers, **given}
                    ).get_text_config()
                )
            )
            expected = getattr(stock, name)
            lookup = {**spec.defaults, **given}.get
            assert rule.complete(name, lookup, num_layers) == expected


@pytest.mark.parametrize("model_type", ["gemma3n2", "", None, 7])
def test_unknown_family_is_refused(model_type: Any) -> None:
    with pytest.raises(ModelError, match=f"model_type {model_type!r} is not supported") as caught:
        find_family({"model_type": model_type})
    assert caught.value.hint == f"supported: {', '.join(sorted(FAMILIES))} (voidprune families)"


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_known_families_are_refused_with_the_reason(model_type: str) -> None:
    assert model_type not in FAMILIES
    with pytest.raises(ModelError) as caught:
        find_family({"model_type": model_type})
    assert caught.value.message == f"model_type {model_type!r} is not supported: {REFUSED[model_type]}"


def test_every_family_is_keyed_by_its_model_type() -> None:
    for model_type, spec in FAMILIES.items():
        assert spec.model_type == model_type
        assert spec.per_layer["num_hidden_layers"] is PerLayer.COUNT
        assert spec.formats == (("hf",) if spec.graph is None else ("hf", "onnx"))
        assert spec.layer_lists.keys() <= spec.per_layer.keys()


def test_module_paths_are_there(family_model: TinyModel) -> None:
    modules = family_model.checkpoint.architecture.spec.modules
    layers = decoder_layers(family_model.model, modules)
    assert len(layers) == NUM_LAYERS
    for layer in layers:
        for module in (*modules.sublayers(layer), *modules.branches(layer)):
            assert isinstance(module, nn.Module)
        assert hasattr(layer, "residual_multiplier") == (modules.residual_multiplier is not None)


# The layer's number, and EXAONE 4's copy of a config field that only its config class reads.
NOT_A_TRAIT = ("layer_idx", "sliding_window_pattern")


def traits(layer: nn.Module) -> dict[str, Any]:
    """What a layer is beside its weights: the classes of its modules and their plain attributes, without the layer's number."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name] = type(module).__name__
        for attribute, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))) and attribute not in NOT_A_TRAIT:
                found[f"{name}.{attribute}"] = value
    return found


@pytest.mark.parametrize("kept", [(0, 2, 3, 5), (1, 4)])
def test_kept_layers_stay_what_they_were(family_model: TinyModel, tmp_path: Path, kept: tuple[int, ...]) -> None:
    """Windows, rotation, experts or not: all that transformers derives from a layer's number."""
    modules = family_model.checkpoint.architecture.spec.modules
    write_slim_checkpoint(family_model.checkpoint, kept, tmp_path)
    before = decoder_layers(family_model.model, modules)
    after = decoder_layers(load_model(tmp_path), modules)
    assert [traits(layer) for layer in after] == [traits(before[layer]) for layer in kept]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("cohere2", "self_attn.sliding_window"),
        ("deepseek_v3", "mlp"),
        ("exaone4", "self_attn.is_sliding"),
        ("gemma2", "self_attn.sliding_window"),
        ("gemma3", "self_attn.is_sliding"),
        ("gemma3_text", "self_attn.is_sliding"),
        ("gpt_oss", "self_attn.sliding_window"),
        ("olmo3", "self_attn.sliding_window"),
        ("qwen3", "self_attn.sliding_window"),
        ("qwen3_moe", "mlp"),
        ("smollm3", "self_attn.use_rope"),
    ],
)
def test_fixtures_have_layers_of_two_kinds(get_model: Any, name: str, differs: str) -> None:
    source = get_model(name)
    layers = decoder_layers(source.model, source.checkpoint.architecture.spec.modules)
    kinds = [traits(layer)[differs] for layer in layers]
    assert len(set(kinds)) == 2


def test_branches_are_what_joins_the_residual_stream(family_model: TinyModel) -> None:
    """What leaves a layer is what entered it and the outputs of the two branches, times the family's multiplier."""
    modules = family_model.checkpoint.architecture.spec.modules
    layer = decoder_layers(family_model.model, modules)[2]
    attention, mlp = modules.branches(layer)
    caught: dict[str, torch.Tensor] = {}

    def first(output: Any) -> torch.Tensor:  # transformers 4, attention and mixtures of experts give tuples
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    handles = [
        layer.register_forward_pre_hook(lambda _, args: caught.update(entered=args[0])),
        layer.register_forward_hook(lambda _, __, output: caught.update(left=first(output))),
        attention.register_forward_hook(lambda _, __, output: caught.update(one=first(output))),
        mlp.register_forward_hook(lambda _, __, output: caught.update(other=first(output))),
    ]
    with torch.inference_mode():
        family_model.model(torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    multiplier = 1.0 if modules.residual_multiplier is None else getattr(layer, modules.residual_multiplier)
    assert multiplier == (0.6 if family_model.name == "granite" else 1.0)
    added = multiplier * (caught["one"] + caught["other"])
    torch.testing.assert_close(caught["left"], caught["entered"] + added, atol=1e-4, rtol=1e-5)
    assert added.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 3}),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": 2}),
        ("gemma2", {}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}),
        ("gpt_oss", {}),
        ("olmo3", {}),
        ("qwen3", {}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ],
)
def test_layers_stay_what_they_were_where_the_config_lists_none(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    """Published configs give a period, or nothing at all."""
    source = build_model(name, tmp_path / "source", **fields)
    spec = source.checkpoint.architecture.spec
    config = json.loads((source.folder / "config.json").read_text())
    short = {key: value for key, value in config.items() if key not in spec.layer_lists and not key.startswith("_")}
    (source.folder / "config.json").write_text(
        json.dumps({**short, **{k: v for k, v in fields.items() if v is not None}})
    )
    kept = (1, 2, 5)
    (tmp_path / "slim").mkdir()
    write_slim_checkpoint(open_checkpoint(source.folder), kept, tmp_path / "slim")
    before = decoder_layers(load_model(source.folder), spec.modules)
    after = decoder_layers(load_model(tmp_path / "slim"), spec.modules)
    assert [traits(layer) for layer in after] == [traits(before[layer]) for layer in kept]
    assert len({str(traits(layer)) for layer in before}) == 2
