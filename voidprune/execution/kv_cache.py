"""How graphs hold keys and values, where that is not as they compute them: a part of `voidprune.json`, and what 8 bits mean.

In "int8", every channel (one number of a K/V head) has a step of its own, the same for all tokens: x is held as round(x / step),
from -128 to 127, half to even, and read as that times the step. Keys are held as they are after they were turned to their
position. This is what onnxruntime's `GroupQueryAttention` does with `k_quant_type` and `v_quant_type` PER_CHANNEL
(docs/ContribOperators.md); steps are the `k_scale` and `v_scale` there.

Shapes: N K/V heads, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from voidprune.execution.packing_record import Fidelity

KV_CACHES = ("keep", "int8")
"""As the command line names them; "keep" is the dtype that graphs compute in."""
LEAST, LARGEST = -128, 127

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class KvSteps:
    """What 1 stands for in the keys and values of a layer, [N, H] each, in float32."""

    keys_NH: Array
    values_NH: Array

    @classmethod
    def reaching(cls, keys_NH: Array, values_NH: Array) -> KvSteps:
        """For keys and values up to these sizes."""
        return cls(_steps(keys_NH), _steps(values_NH))


def _steps(largest_NH: Array) -> Array:
    """A channel that was 0 throughout has the step of the largest of all: what it may be one day, nothing says."""
    some = float(largest_NH.max(initial=0.0)) or 1.0
    steps: Array = (np.where(largest_NH > 0, largest_NH, some) / LARGEST).astype(np.float32)
    return np.maximum(steps, np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class KvCache:
    """The record of it. `bytes_per_token`: of one layer. `prompts`: hashes of those that steps were measured on (see
    `healing.training_data.prompt_hash`), which may not be evaluated on.

    `fidelity`: the graphs beside the source under the same schedule in float32, on held-out samples; None where weights are packed,
    whose record has what both changed, and where steps were given.
    """

    dtype: str
    bytes_per_token: int
    prompts: tuple[str, ...]
    fidelity: Fidelity | None = None

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.dtype not in KV_CACHES[1:]:
            raise ValueError(f"kv_cache.dtype is {self.dtype!r}")
        if type(self.bytes_per_token) is not int or self.bytes_per_token < 0:
            raise ValueError(f"kv_cache.bytes_per_token is {self.bytes_per_token!r}")
        if not self.prompts or not all(type(prompt) is str for prompt in self.prompts):
            raise ValueError(f"kv_cache.prompts is {self.prompts!r}")

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> KvCache:
        """Raises TypeError, ValueError, KeyError."""
        fidelity = document["fidelity"]
        if not isinstance(document["prompts"], (list, tuple)):
            raise ValueError(f"kv_cache.prompts is {document['prompts']!r}")
        values = {
            **document,
            "prompts": tuple(document["prompts"]),
            "fidelity": None if fidelity is None else Fidelity(**fidelity),
        }
        return cls(**values)

    def to_document(self) -> dict[str, Any]:
        return asdict(self)
