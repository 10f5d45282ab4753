"""The configs of a slim checkpoint: `config.json` for the layers that are left, and a `generation_config.json` that loads.

Pure values. What a field says about layers stands in the family's `per_layer`; nothing is guessed from a field's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voidprune.errors import ModelError
from voidprune.models.architecture import (
    Config,
    ConfigReader,
    FamilySpec,
    PerLayer,
    layer_list,
    refuse_unknown_layer_fields,
    text_config,
)
from voidprune.models.layer_lists import FULL, SLIDING
from voidprune.models.quantization import Renumbering, check_quantization, renumber_module_names

# transformers refuses to save or warns of these while `do_sample` is off, or there is one beam (its
# generation/configuration_utils.py, GenerationConfig.validate); many published models have them.
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS_ONLY = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")


def remap_config(config: Config, spec: FamilySpec, kept: Sequence[int]) -> dict[str, Any]:
    """The config of the checkpoint that holds only the layers `kept` (ascending, original numbers).

    Lists that transformers would otherwise derive from a layer's number are written out, and what only 5.x reads is written
    as 4.57 reads it too, where it has words for it. Raises ModelError on what cannot be said of the layers that are left.
    """
    text = text_config(config, spec)
    refuse_unknown_layer_fields(text, spec)
    check_quantization(config.get("quantization_config"))
    new = {**_spelling_of_transformers_4(text, spec), **text}
    for name in spec.layer_lists:
        new[name] = layer_list(text, spec, name)
    for name, kind in spec.per_layer.items():
        if kind is PerLayer.THRESHOLD and spec.defaults.get(name) is not None:
            new.setdefault(name, spec.defaults[name])  # left out, it would mean as much of the slim model
        if new.get(name) is not None:
            _remap_field(new, name, kind, spec, kept)
    if spec.text_config is not None:
        new = {**config, spec.text_config: new}
    if new.get("quantization_config"):
        new_index = {layer: position for position, layer in enumerate(kept)}
        renumbering = Renumbering(new_index, (spec.tensors.layers, spec.modules.layers))
        new["quantization_config"] = renumber_module_names(new["quantization_config"], renumbering)
    return new


def _remap_field(new: dict[str, Any], name: str, kind: PerLayer, spec: FamilySpec, kept: Sequence[int]) -> None:
    value = new[name]
    match kind:
        case PerLayer.COUNT:
            new[name] = len(kept)
        case PerLayer.LIST:
            new[name] = [value[layer] for layer in kept]
        case PerLayer.INDICES:
            new[name] = [position for position, layer in enumerate(kept) if layer in value]
        case PerLayer.THRESHOLD:
            new[name] = sum(layer < value for layer in kept)
        case PerLayer.PERIOD:
            if spec.layer_lists:  # the lists say it now, layer by layer
                del new[name]
            elif value != 1:
                raise ModelError(
                    f"{name} in config.json is {value!r}: which layers that means cannot be said once layers are dropped"
                )
        case PerLayer.EXTRA:
            new[name] = 0
        case PerLayer.SHARING:
            if value:
                raise ModelError(f"{name} in config.json is {value!r}: layers use the keys and values of others")
        case PerLayer.INERT:
            pass


def _spelling_of_transformers_4(config: Config, spec: FamilySpec) -> dict[str, Any]:
    """Fields that 5.x renamed, as 4.57 reads them. Both spellings mean the same to 5.x."""
    fields = {}
    for one, other in spec.aliases:
        if (one in config) != (other in config):
            fields[one if other in config else other] = config[other if other in config else one]
    return {**fields, **_rope_of_transformers_4(config, spec)}


def _rope_of_transformers_4(config: Config, spec: FamilySpec) -> dict[str, Any]:
    """`rope_parameters` as 4.57 spells it: without, it would silently fall back to an unscaled base of 10,000.

    Nothing where 4.57 has no words for it (two kinds of layers with different scaled embeddings).
    """
    written: Any = config.get("rope_parameters")
    if not isinstance(written, dict):
        return {}
    fields: dict[str, Any] = {}
    if FULL in written or SLIDING in written:
        written, local = written.get(FULL), written.get(SLIDING)
        if isinstance(local, dict):
            if local.get("rope_type", "default") != "default":
                return {}
            if spec.local_rope_theta is not None:
                fields[spec.local_rope_theta] = local.get("rope_theta")
            elif not isinstance(written, dict) or local.get("rope_theta") != written.get("rope_theta"):
                return {}
    if not isinstance(written, dict) or "rope_theta" not in written:
        return {}
    fields["rope_theta"] = written["rope_theta"]
    if "partial_rotary_factor" in written:
        fields["partial_rotary_factor"] = written["partial_rotary_factor"]
    rest = {name: value for name, value in written.items() if name not in fields}
    if rest.get("rope_type", "default") == "default":
        return {**fields, "rope_scaling": None}
    if spec.rope_scaling_fields is None:
        return {**fields, "rope_scaling": rest}
    rest = {"type": rest["rope_type"], **rest}
    implied = {"rope_type", "original_max_position_embeddings"}
    if rest.keys() - implied != set(spec.rope_scaling_fields):
        return {}
    return {**fields, "rope_scaling": {name: rest[name] for name in spec.rope_scaling_fields}}


def loadable_generation_config(generation: dict[str, Any]) -> dict[str, Any]:
    """A generation config without the fields that say nothing in its own mode, which transformers refuses to save."""
    dropped: set[str] = set()
    if generation.get("do_sample") is not True:
        dropped |= set(_SAMPLING_ONLY)
    if generation.get("num_beams") in (None, 1):
        dropped |= set(_BEAMS_ONLY)
    return {name: value for name, value in generation.items() if name not in dropped}


def is_spelled_for_transformers_4(config: Config, spec: FamilySpec) -> bool:
    """Whether 4.57 reads the rotary embedding of this config as 5.x does."""
    text = text_config(config, spec)
    if not isinstance(text.get("rope_parameters"), dict):
        return True
    wanted = _rope_of_transformers_4(text, spec)
    return bool(wanted) and all(ConfigReader(text, spec).lookup(name) == value for name, value in wanted.items())
