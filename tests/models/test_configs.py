"""Configs of slim checkpoints: every kind of per-layer field, both spellings of rotary embeddings, generation configs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.tiny_models import BASE, FULL, NUM_LAYERS, SLIDING, TinyModel
from voidprune.errors import ModelError
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.models.architecture import FamilySpec, PerLayer
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.configs import is_spelled_for_transformers_4, loadable_generation_config, remap_config
from voidprune.models.families import FAMILIES
from voidprune.models.layer_lists import EveryNth
from voidprune.models.sizes import measure_sizes

SPEC = FamilySpec(
    model_type="made_up",
    title="A family with every kind of field",
    per_layer={
        "num_hidden_layers": PerLayer.COUNT,
        "mlp_layer_types": PerLayer.LIST,
        "moe_layers": PerLayer.INDICES,
        "first_k_dense_replace": PerLayer.THRESHOLD,
        "layer_scale_kind": PerLayer.INERT,
    },
    defaults={},
)
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 6,
    "mlp_layer_types": ["a", "b", "c", "d", "e", "f"],
    "moe_layers": [1, 3, 5],
    "first_k_dense_replace": 3,
    "layer_scale_kind": 9,
    "hidden_size": 64,
}


# ---- fields that depend on the layer


def test_each_kind_of_field_is_remapped_in_its_way() -> None:
    assert remap_config(CONFIG, SPEC, (0, 3, 4)) == {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["a", "d", "e"],
        "moe_layers": [1],
        "first_k_dense_replace": 1,
        "layer_scale_kind": 9,
        "hidden_size": 64,
    }
    assert remap_config(CONFIG, SPEC, range(6)) == CONFIG


@given(st.sets(st.integers(0, 5), min_size=1))
def test_remapping_says_of_each_kept_layer_what_was_said_before(kept_set: set[int]) -> None:
    kept = sorted(kept_set)
    new = remap_config(CONFIG, SPEC, kept)
    assert new["num_hidden_layers"] == len(kept)
    for position, layer in enumerate(kept):
        assert new["mlp_layer_types"][position] == CONFIG["mlp_layer_types"][layer]
        assert (position in new["moe_layers"]) == (layer in CONFIG["moe_layers"])
        assert (position < new["first_k_dense_replace"]) == (layer < CONFIG["first_k_dense_replace"])


def test_remapping_leaves_absent_and_null_fields_alone() -> None:
    config = {"num_hidden_layers": 4, "moe_layers": None}
    assert remap_config(config, SPEC, (1, 2)) == {"num_hidden_layers": 2, "moe_layers": None}


def test_remapping_changes_a_copy() -> None:
    before = json.dumps(CONFIG)
    remap_config(CONFIG, SPEC, (1,))
    assert json.dumps(CONFIG) == before


# ---- periods, layers behind the last, shared keys and values


def test_a_period_gives_way_to_the_list() -> None:
    spec = dataclasses.replace(
        SPEC,
        per_layer={"num_hidden_layers": PerLayer.COUNT, "layer_types": PerLayer.LIST, "every": PerLayer.PERIOD},
        layer_lists={"layer_types": EveryNth("every")},
    )
    assert remap_config({"num_hidden_layers": 6, "every": 3}, spec, (1, 2, 5)) == {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, FULL],
    }


def test_a_period_that_nothing_else_can_say_is_refused() -> None:
    spec = FAMILIES["deepseek_v2"]
    config = {**BASE, "model_type": "deepseek_v2", "first_k_dense_replace": 1}
    assert remap_config({**config, "moe_layer_freq": 1}, spec, (0, 3))["moe_layer_freq"] == 1
    with pytest.raises(ModelError, match=r"moe_layer_freq in config\.json is 2"):
        remap_config({**config, "moe_layer_freq": 2}, spec, (0, 3))


def test_a_threshold_that_is_left_out_is_written() -> None:
    """DeepSeek V3 has three dense layers where nothing is said; of the slim model that would be three as well."""
    config = {**BASE, "model_type": "deepseek_v3"}
    assert remap_config(config, FAMILIES["deepseek_v3"], (0, 3, 5))["first_k_dense_replace"] == 1


def test_layers_for_multi_token_prediction_are_left_out(get_model: Callable[[str], TinyModel], tmp_path: Path) -> None:
    """DeepSeek V3 stores them behind the last layer; stock transformers runs none of them."""
    source = shutil.copytree(get_model("deepseek_v3").folder, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    last = f"model.layers.{NUM_LAYERS - 1}."
    extra = {
        name.replace(last, f"model.layers.{NUM_LAYERS}."): value for name, value in tensors.items() if last in name
    }
    extra[f"model.layers.{NUM_LAYERS}.eh_proj.weight"] = torch.ones(32, 64)
    safetensors.torch.save_file(
        {**tensors, **{name: value.clone() for name, value in extra.items()}}, source / "model.safetensors"
    )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    checkpoint = open_checkpoint(source)
    assert measure_sizes(checkpoint) == measure_sizes(get_model("deepseek_v3").checkpoint)
    (tmp_path / "slim").mkdir()
    write_slim_checkpoint(checkpoint, (0, 2, 5), tmp_path / "slim")
    slim = open_checkpoint(tmp_path / "slim")
    assert slim.config["num_nextn_predict_layers"] == 0
    places = [slim.architecture.spec.tensors.layer_of(name) for name in slim.tensors]
    assert {place[0] for place in places if place is not None} == {0, 1, 2}
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(ModelError, match=r"tensors of layer 6, beyond the 6 layers") as caught:
        open_checkpoint(source)
    assert "num_nextn_predict_layers" in str(caught.value.hint)


def test_shared_keys_and_values_are_refused() -> None:
    spec = dataclasses.replace(SPEC, per_layer={**SPEC.per_layer, "num_kv_shared_layers": PerLayer.SHARING})
    assert remap_config({**CONFIG, "num_kv_shared_layers": 0}, spec, (0, 1))["num_kv_shared_layers"] == 0
    with pytest.raises(ModelError, match="layers use the keys and values of others"):
        remap_config({**CONFIG, "num_kv_shared_layers": 2}, spec, (0, 1))


def test_nested_config_is_changed_where_the_layers_are(get_model: Callable[[str], TinyModel]) -> None:
    source = get_model("gemma3").checkpoint
    new = remap_config(source.config, source.architecture.spec, (1, 4))
    assert new["text_config"]["num_hidden_layers"] == 2
    assert new["text_config"]["layer_types"] == [FULL, SLIDING]
    assert "num_hidden_layers" not in new
    assert new["vision_config"] == source.config["vision_config"]


# ---- rotary embeddings in the words of transformers 4 and 5


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])).logits
    return found


def test_the_spelling_of_4_means_the_same(family_model: TinyModel, tmp_path: Path) -> None:
    """Take away what 5.x wrote and 4.x does not read: the rest gives the same logits."""
    write_slim_checkpoint(family_model.checkpoint, (0, 2, 3, 5), tmp_path)
    spec = family_model.checkpoint.architecture.spec
    config = json.loads((tmp_path / "config.json").read_text())
    assert is_spelled_for_transformers_4(config, spec)
    expected = logits(tmp_path)
    stripped = config if spec.text_config is None else config[spec.text_config]
    stripped.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(tmp_path), expected)


NESTED = {FULL: {"rope_theta": 9.0, "rope_type": "default"}, SLIDING: {"rope_theta": 4.0, "rope_type": "default"}}
LONGROPE = {"rope_type": "longrope", "rope_theta": 9.0, "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("model_type", "written", "expected"),
    [
        ("llama", {"rope_theta": 9.0, "rope_type": "default"}, {"rope_theta": 9.0, "rope_scaling": None}),
        (
            "llama",
            {"rope_theta": 9.0, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 9.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            "glm4",
            {"rope_theta": 9.0, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 9.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        ("gemma3_text", NESTED, {"rope_theta": 9.0, "rope_local_base_freq": 4.0, "rope_scaling": None}),
        (
            "gemma3_text",
            {**NESTED, FULL: {"rope_theta": 9.0, "rope_type": "linear", "factor": 8.0}},
            {
                "rope_theta": 9.0,
                "rope_local_base_freq": 4.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("olmo3", {**NESTED, SLIDING: NESTED[FULL]}, {"rope_theta": 9.0, "rope_scaling": None}),
        (
            "phi3",
            {**LONGROPE, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0},
            {
                "rope_theta": 9.0,
                "partial_rotary_factor": 1.0,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
        ),
        # 4.57 has no words for these.
        ("olmo3", NESTED, {}),
        ("gemma3_text", {**NESTED, SLIDING: {"rope_theta": 4.0, "rope_type": "linear", "factor": 2.0}}, {}),
        ("phi3", {**LONGROPE, "attention_factor": 1.2}, {}),
    ],
)
def test_rope_as_4_reads_it(model_type: str, written: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = dataclasses.replace(FAMILIES[model_type], layer_lists={})
    config = {"num_hidden_layers": 2, "rope_parameters": written}
    new = remap_config(config, spec, (0,))
    assert new["rope_parameters"] == written
    assert {name: value for name, value in new.items() if "rope" in name or "rotary" in name} == {
        "rope_parameters": written,
        **expected,
    }
    assert is_spelled_for_transformers_4(new, spec) == bool(expected)
    assert not is_spelled_for_transformers_4(config, spec)


def test_names_that_5_changed_are_written_twice() -> None:
    for one, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        assert remap_config({"num_hidden_layers": 2, one: 4}, FAMILIES["qwen3_moe"], (0,))[other] == 4


# ---- generation config


@pytest.mark.parametrize("do_sample", [True, False, None])
@pytest.mark.parametrize("num_beams", [1, 2, None])
def test_generation_config_is_one_that_transformers_saves(
    tmp_path: Path, do_sample: bool | None, num_beams: int | None
) -> None:
    published: dict[str, Any] = {
        "eos_token_id": [2, 3],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.01,
        "early_stopping": True,
        "length_penalty": 2.0,
        "repetition_penalty": 1.1,
    }
    if do_sample is not None:
        published["do_sample"] = do_sample
    if num_beams is not None:
        published["num_beams"] = num_beams
    found = loadable_generation_config(published)
    GenerationConfig(**found).save_pretrained(tmp_path)
    assert found["eos_token_id"] == [2, 3]
    assert found["repetition_penalty"] == 1.1
    assert ("temperature" in found) == bool(do_sample)
    assert ("early_stopping" in found) == (num_beams == 2)
