"""Rotary embeddings against transformers' own: every kind, spelling and part of a head, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.tiny_models import BASE, GRAPH_SHAPES, TRANSFORMERS, TinyModel, spell_for_transformers_4
from voidprune.errors import ModelError
from voidprune.models.architecture import Config, ConfigReader
from voidprune.models.families import find_family
from voidprune.models.layer_lists import FULL, SLIDING
from voidprune.models.rope import Rope, read_ropes

LLAMA_CONFIG = {**BASE, "model_type": "llama"}


def read(config: Config, *, head_dim: int = 16) -> Rope:
    return read_ropes(ConfigReader(config, find_family(config)), head_dim=head_dim, interleaved=False)[FULL]


def plain(theta: float, head_dim: int = 16) -> Rope:
    return read({**LLAMA_CONFIG, "rope_theta": theta}, head_dim=head_dim)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize("head_dim", [8, 16, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
        {**LLAMA3, "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.5, "original_max_position_embeddings": 64},
        YARN,
        {**YARN, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    ],
)
def test_frequencies_and_scale_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = {**LLAMA_CONFIG, "head_dim": head_dim, "rope_parameters": rope}
    if TRANSFORMERS < 5:
        config = spell_for_transformers_4(config)
    stock = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
    found = read(config, head_dim=head_dim)
    assert found.width == head_dim
    assert found.scale == pytest.approx(stock.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(found.frequencies, stock.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("beside", [False, True])
def test_longrope_has_two_sets_of_frequencies(beside: bool) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0, 27.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    fields: dict[str, Any] = {"original_max_position_embeddings": 40} if beside else {}
    if not beside:
        rope["original_max_position_embeddings"] = 40
    config = {**BASE, "model_type": "phi3", "hidden_size": 32, "rope_parameters": rope, **fields}
    found = read(config, head_dim=8)
    assert found.long_from == 40
    periods = 10000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(found.frequencies, 1 / (periods * factors["short_factor"]), rtol=1e-6)
    np.testing.assert_allclose(found.long_frequencies, 1 / (periods * factors["long_factor"]), rtol=1e-6)
    assert found.scale == pytest.approx(math.sqrt(1 + math.log(160 / 40) / math.log(40)))


@pytest.mark.parametrize("name", sorted(GRAPH_SHAPES))
def test_every_family_has_the_buffers_of_its_model(get_model: Callable[[str], TinyModel], name: str) -> None:
    source = get_model(name)
    spec = source.checkpoint.architecture.spec
    config = source.checkpoint.config
    config = config if spec.text_config is None else config[spec.text_config]
    head_dim = source.checkpoint.architecture.head_dim
    ropes = read_ropes(ConfigReader(config, spec), head_dim=head_dim, interleaved=False)
    found = {name: buffer.numpy() for name, buffer in source.model.named_buffers() if name.endswith("inv_freq")}
    # 5.x keeps those of the config beside those in use, which change with the length where there are two sets.
    buffers = {name: values for name, values in found.items() if "original" in name} or found
    assert buffers
    for name, buffer in buffers.items():
        kind = SLIDING if SLIDING in name or "local" in name else FULL
        np.testing.assert_allclose(ropes[kind].frequencies, buffer, rtol=1e-6)


def test_llama3_scaling_has_three_bands() -> None:
    """Short waves are kept, long ones are slowed by the factor, those between lie between."""
    rope = {**LLAMA3, "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64}
    unscaled = np.array(plain(500.0, 64).frequencies)
    ratio = unscaled / np.array(read({**LLAMA_CONFIG, "rope_parameters": rope}, head_dim=64).frequencies)
    waves = 2 * math.pi / unscaled
    np.testing.assert_allclose(ratio[waves < 16], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[waves > 64], 8.0, rtol=1e-6)
    between = ratio[(waves > 17) & (waves < 60)]
    assert between.size > 2
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ],
)
def test_spellings_of_transformers_4_and_5_mean_the_same(fields: dict[str, Any]) -> None:
    expected = np.array(plain(5000.0).frequencies) / 4
    np.testing.assert_allclose(read({**LLAMA_CONFIG, **fields}).frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": None}, {"rope_theta": 10000.0}])
def test_rope_that_is_not_written_is_the_family_s(fields: dict[str, Any]) -> None:
    assert read({**LLAMA_CONFIG, **fields}) == plain(10000.0)


def test_sliding_layers_may_have_a_base_of_their_own() -> None:
    """Gemma 3, as 4.x and as 5.x spells it."""
    gemma = {**BASE, "model_type": "gemma3_text"}
    spellings: list[dict[str, Any]] = [
        {"rope_theta": 5000.0, "rope_local_base_freq": 300.0},
        {"rope_parameters": {FULL: {"rope_theta": 5000.0}, SLIDING: {"rope_theta": 300.0}}},
    ]
    for fields in spellings:
        config = {**gemma, **fields}
        ropes = read_ropes(ConfigReader(config, find_family(config)), head_dim=16, interleaved=False)
        assert ropes == {FULL: plain(5000.0), SLIDING: plain(300.0)}


@pytest.mark.parametrize("spelling", [4, 5])
def test_only_full_layers_of_olmo_3_are_scaled(spelling: int) -> None:
    """As the published configs say it, in the words of 4.57: `rope_scaling` is not of layers with a window.

    With their base: 5.23 gives layers with a window 500,000 in any case (models/olmo3, convert_rope_params_to_dict).
    """
    scaling, theta = {name: value for name, value in YARN.items() if name != "rope_theta"}, {"rope_theta": 500000.0}
    fields: dict[str, Any] = {**theta, "rope_scaling": scaling}
    if spelling == 5:
        fields = {"rope_parameters": {FULL: {**YARN, **theta}, SLIDING: {"rope_type": "default", **theta}}}
    config = {**BASE, "model_type": "olmo3", "sliding_window": 4, **fields}
    ropes = read_ropes(ConfigReader(config, find_family(config)), head_dim=16, interleaved=False)
    assert ropes == {FULL: read({**LLAMA_CONFIG, "rope_parameters": {**YARN, **theta}}), SLIDING: plain(500000.0)}
    if TRANSFORMERS < 5 and spelling == 5:
        return  # 4.57 does not read it
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found = {name: values.numpy() for name, values in model.named_buffers() if name.endswith("inv_freq")}
    assert len(found) >= 2
    for name, values in found.items():
        np.testing.assert_allclose(ropes[SLIDING if SLIDING in name else FULL].frequencies, values, rtol=1e-6)


def test_gemma_3_scales_full_layers_and_leaves_the_local_base() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    config = {
        **BASE, "model_type": "gemma3_text", "rope_theta": 5000.0, "rope_local_base_freq": 300.0, "rope_scaling": linear,
    }  # fmt: skip
    ropes = read_ropes(ConfigReader(config, find_family(config)), head_dim=16, interleaved=False)
    assert ropes[SLIDING] == plain(300.0)
    np.testing.assert_allclose(ropes[FULL].frequencies, np.array(plain(5000.0).frequencies) / 8, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "mrope", "proportional"])
def test_rope_of_unknown_type_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"with a rotary embedding of type '{kind}'"):
        read({**LLAMA_CONFIG, "rope_scaling": {"rope_type": kind, "factor": 2.0}})


def test_part_of_a_head_is_rotated() -> None:
    assert (
        read({**LLAMA_CONFIG, "partial_rotary_factor": 0.5}, head_dim=16).frequencies == plain(10000.0, 8).frequencies
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "factor": 8.0, "short_factor": [1.0], "long_factor": [1.0]},
        {"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 40},
        {"rope_theta": "big"},
        "linear",
        [1],
    ],
)
def test_broken_rope_is_a_named_error(rope: Any) -> None:
    with pytest.raises(ModelError):
        read({**LLAMA_CONFIG, "rope_scaling": rope})
