"""Lists with one entry a layer that transformers makes up from other fields where `config.json` leaves them out.

A rule says how. When layers go, the list is written out, because a layer's new number would give it another entry. Pure
values; which family follows which rule stands in the tables of families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voidprune.errors import ModelError

Lookup = Callable[[str], Any]
"""The value of a config field, or its default in the family, or None."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class EveryNth:
    """Layers n, 2n, 3n ... (counted from one) have the entry `nth`, the others `other`.

    `period` is n, or the config field that holds it.
    """

    period: int | str
    nth: Any = FULL
    other: Any = SLIDING

    def complete(self, name: str, lookup: Lookup, num_layers: int) -> list[Any]:
        if lookup(name) is not None:
            return _checked(name, lookup(name), num_layers)
        period = read_period(self.period, lookup)
        return [self.other if (layer + 1) % period else self.nth for layer in range(num_layers)]


@dataclass(frozen=True)
class FromThreshold:
    """Layers from number `threshold` (a config field) up have the entry `above`, where all fields of `switches` are set."""

    threshold: str
    switches: tuple[str, ...]
    above: Any = SLIDING
    below: Any = FULL

    def complete(self, name: str, lookup: Lookup, num_layers: int) -> list[Any]:
        if lookup(name) is not None:
            return _checked(name, lookup(name), num_layers)
        first = lookup(self.threshold) if all(lookup(switch) for switch in self.switches) else num_layers
        if type(first) is not int or first < 0:
            raise ModelError(f"{self.threshold} in config.json is {first!r}, not a whole number from 0 up")
        return [self.above if layer >= first else self.below for layer in range(num_layers)]


@dataclass(frozen=True)
class WhereZero:
    """Layers whose entry in another list (`source`, itself completed by `rule`) is 0, where all of `switches` are set."""

    source: str
    rule: EveryNth
    switches: tuple[str, ...]
    zero: Any = SLIDING
    other: Any = FULL

    def complete(self, name: str, lookup: Lookup, num_layers: int) -> list[Any]:
        if lookup(name) is not None:
            return _checked(name, lookup(name), num_layers)
        on = all(lookup(switch) for switch in self.switches)
        entries = self.rule.complete(self.source, lookup, num_layers)
        return [self.zero if on and not entry else self.other for entry in entries]


@dataclass(frozen=True)
class AndNotEveryNth:
    """A list of layer numbers, to which all layers but n, 2n, 3n ... (counted from one) belong as well."""

    period: str

    def complete(self, name: str, lookup: Lookup, num_layers: int) -> list[Any]:
        listed = lookup(name) or []
        if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
            raise ModelError(f"{name} in config.json is no list of layer numbers")
        period = read_period(self.period, lookup)
        return [layer for layer in range(num_layers) if layer in listed or (layer + 1) % period]


LayerListRule = EveryNth | FromThreshold | WhereZero | AndNotEveryNth


def read_period(period: int | str, lookup: Lookup) -> int:
    value = lookup(period) if isinstance(period, str) else period
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{period} in config.json is {value!r}, not a whole number from 1 up",
            hint="list the layers in layer_types instead",
        )
    return value


def _checked(name: str, listed: Any, num_layers: int) -> list[Any]:
    if not isinstance(listed, list) or len(listed) != num_layers:
        raise ModelError(f"{name} in config.json is no list with an entry for each of {num_layers} layers")
    if name == "layer_types" and not all(kind in (FULL, SLIDING) for kind in listed):
        raise ModelError(
            f"{name} in config.json does not say {FULL} or {SLIDING} for each of {num_layers} layers",
            hint="layers that carry a state of another kind are not supported",
        )
    return listed
