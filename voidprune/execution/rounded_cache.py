"""A cache of transformers that holds keys and values in 8 bits, as `kv_cache.py` says it: what graphs that do so must equal.

Shapes: B rows, N K/V heads, T new tokens, S tokens with the past, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from voidprune.execution.kv_cache import LARGEST, LEAST, KvSteps

MakeCache = Callable[[], DynamicCache]


class RoundedCache(DynamicCache):
    """What it is given comes back rounded, new tokens as well: attention reads nothing else. `steps`: by layer of the model."""

    def __init__(self, steps: Mapping[int, KvSteps]) -> None:
        super().__init__()
        self._steps = {
            layer: tuple(torch.tensor(part).unsqueeze(1) for part in (one.keys_NH, one.values_NH))
            for layer, one in steps.items()
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [B, N, S, H], with the new ones, [B, N, T, H]. A layer without steps keeps its own."""
        if layer_idx in self._steps:
            keys_N1H, values_N1H = self._steps[layer_idx]
            key_states, value_states = _round(key_states, keys_N1H), _round(value_states, values_N1H)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-untyped-call, no-any-return]


def _round(states_BNTH: Tensor, steps_N1H: Tensor) -> Tensor:
    steps = steps_N1H.to(states_BNTH.device)
    return ((states_BNTH.float() / steps).round().clamp(LEAST, LARGEST) * steps).to(states_BNTH.dtype)
