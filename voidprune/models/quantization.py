"""Checkpoints that are quantized already: which can be cut between layers, and what their config says of layers by name.

A method is listed when its tensors belong to one linear layer each and lie beside it (`qweight`, `scales`, `weight_scale` ...):
then a layer is cut out like any other, byte for byte, and only names of modules in `quantization_config` change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voidprune.errors import ModelError

SELF_CONTAINED = ("awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4")
"""Values of `quant_method`."""

_SIDE_TENSORS = ("scales", "qzeros", "g_idx", "scale", "scale_inv", "zero_point", "shape", "bias")
_PACKED = ("qweight", "weight_packed", "_blocks")
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)(?=\.|$)")
# A pattern over module names with a number in it, as in "re:.*layers\.(0|1)\." or GPTQ's "-:.*\.18\.".
_PATTERN = re.compile(r"^(?:re|[+-]):|[\\^$*+?()\[\]{}|]")
_NUMBER_IN_PATTERN = re.compile(r"layers\b\W*\d|\.\d|\d\\?\.|\[\d")


def check_quantization(quantization: Any) -> None:
    """Raise ModelError where layers of a checkpoint with this `quantization_config` cannot be cut apart."""
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in SELF_CONTAINED:
        raise ModelError(
            f"the checkpoint is quantized by {method!r} (quantization_config); its layers cannot be cut apart",
            hint=f"start from the checkpoint that was quantized; of quantized ones {', '.join(SELF_CONTAINED)} are supported",
        )


@dataclass(frozen=True)
class Renumbering:
    """Kept layer -> its new number, and the names of the layer list, in files and in modules (`model.layers`).

    A name may leave out how the list's name begins, or have more before it. Layers of another list (a vision tower's) stay.
    """

    new_index: Mapping[int, int]
    layer_lists: tuple[str, ...]

    def is_ours(self, found: str) -> bool:
        return any(f".{name}".endswith(f".{found}") or f".{found}".endswith(f".{name}") for name in self.layer_lists)


def renumber_module_names(document: Any, renumbering: Renumbering) -> Any:
    """`quantization_config` with the layer numbers in its names of modules changed, and names of dropped layers gone.

    Raises ModelError on a pattern that holds numbers: what it would match after the
    change is not to be known.
    """
    if isinstance(document, dict):
        entries = ((_renumber(key, renumbering), value) for key, value in document.items())
        return {key: renumber_module_names(value, renumbering) for key, value in entries if key is not None}
    if isinstance(document, list):
        kept = [_renumber(entry, renumbering) if isinstance(entry, str) else entry for entry in document]
        return [renumber_module_names(entry, renumbering) for entry in kept if entry is not None]
    return document


def _renumber(name: str, renumbering: Renumbering) -> str | None:
    if _PATTERN.search(name):
        if _NUMBER_IN_PATTERN.search(name):
            raise ModelError(
                f"quantization_config names modules by the pattern {name!r}, which may depend on the number of the layer",
                hint="list the modules by their full names instead",
            )
        return name
    found = _LAYER.search(name)
    if found is None or not renumbering.is_ours(name[: found.start(1) - 1]):
        return name
    new = renumbering.new_index.get(int(found[1]))
    return None if new is None else f"{name[: found.start(1)]}{new}{name[found.end(1) :]}"


def weights_in(name: str, shape: tuple[int, ...], quantization: Any) -> int:
    """How many weights of matrices a tensor holds: 0 for norms, biases and scales; packed integers are counted apart."""
    if len(shape) < 2 or name.endswith(_SIDE_TENSORS):
        return 0
    numbers = 1
    for size in shape:
        numbers *= size
    if name.endswith(_PACKED):
        return numbers * (8 if name.endswith("_blocks") else 32) // _bits(quantization)
    return numbers


def _bits(quantization: Any) -> int:
    """Bits of a packed weight: `bits` of GPTQ and AWQ, `num_bits` in a group of compressed-tensors, 4 for MXFP4."""
    config = quantization or {}
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    found = [config.get("bits"), config.get("w_bit"), *(group.get("num_bits") for group in groups)]
    return next((bits for bits in found if type(bits) is int and bits > 0), 4)
