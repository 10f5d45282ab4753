"""What a schedule may cost, in every unit that a user thinks in: layers, bytes, K/V, arithmetic, bytes read a token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal

from voidprune.errors import BudgetError
from voidprune.models.sizes import ModelSizes
from voidprune.planning.costs import schedule_costs
from voidprune.schedule import Phase, Scalar, Schedule

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Budget:
    """Upper limits; None is no limit. `keep` is the share of layers that run in a phase, in (0, 1].

    `max_bytes` of the checkpoint; `max_kv_bytes_per_token` of the cache; `max_prefill_flops` for a prompt of
    `costs.PROMPT_LENGTH` tokens; `max_decode_bytes` read for one token after such a prompt. Layers in `protected` run whole in
    both phases, those in `dropped` in neither. With `shared` both phases run the same layers.

    Raises BudgetError where it can be met by no schedule of any model.
    """

    keep_prefill: float | None = None
    keep_decode: float | None = None
    max_bytes: int | None = None
    max_kv_bytes_per_token: int | None = None
    max_prefill_flops: int | None = None
    max_decode_bytes: int | None = None
    protected: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()
    shared: bool = False

    def __post_init__(self) -> None:
        for keep in (self.keep_prefill, self.keep_decode):
            if keep is not None and not 0 < keep <= 1:  # NaN is outside, too
                raise BudgetError(
                    f"a keep ratio of {keep:g} is outside of (0, 1]",
                    hint="--keep 0.5 keeps half of the layers in each phase",
                )
        for name in ("max_bytes", "max_kv_bytes_per_token", "max_prefill_flops", "max_decode_bytes"):
            if (limit := getattr(self, name)) is not None and limit <= 0:
                raise BudgetError(
                    f"--{name.replace('_', '-')} {limit:,} is no limit that a model can meet", hint="give more than 0"
                )
        if self.shared and None not in (self.keep_prefill, self.keep_decode) and self.keep_prefill != self.keep_decode:
            raise BudgetError("shared phases cannot have different keep ratios", hint="use --keep, or --phases split")
        if both := self.protected & self.dropped:
            raise BudgetError(f"layer {min(both)} is both protected and dropped", hint="name it in one of the two")

    @property
    def is_limited(self) -> bool:
        """Whether anything is limited: else the whole model is the answer."""
        return any(getattr(self, field.name) is not None for field in fields(self)[:6]) or bool(self.dropped)

    @property
    def counts_only(self) -> bool:
        """Whether layers are all that is limited, so that no sizes are needed."""
        return all(getattr(self, field.name) is None for field in fields(self)[2:6])

    def check_layers(self, num_layers: int) -> None:
        """Raise BudgetError at a protected or dropped layer that a model of `num_layers` does not have."""
        if unknown := [layer for layer in sorted(self.protected | self.dropped) if not 0 <= layer < num_layers]:
            raise BudgetError(
                f"there is no layer {unknown[0]}; the model has {num_layers}", hint=f"layers are 0 to {num_layers - 1}"
            )

    def to_origin(self) -> dict[str, Scalar]:
        """What is limited, for the origin of a schedule."""
        origin: dict[str, Scalar] = {
            field.name: getattr(self, field.name) for field in fields(self)[:6] if getattr(self, field.name) is not None
        }
        for name in ("protected", "dropped"):
            if layers := getattr(self, name):
                origin[name] = format_layers(layers)
        return {**origin, "phases": "shared" if self.shared else "split"}

    def limits(self, num_layers: int) -> dict[str, int]:
        """The limits that are set, by the name of what they limit, in the units of `spent`."""
        shares = {"layers in prefill": self.keep_prefill, "layers in decode": self.keep_decode}
        limits = {name: num_kept(keep, num_layers) for name, keep in shares.items() if keep is not None}
        costs = {
            "bytes": self.max_bytes,
            "K/V bytes per token": self.max_kv_bytes_per_token,
            "prefill FLOPs": self.max_prefill_flops,
            "decode bytes": self.max_decode_bytes,
        }
        return limits | {name: limit for name, limit in costs.items() if limit is not None}

    def overshoot(self, schedule: Schedule, sizes: ModelSizes | None) -> float:
        """How far a schedule is above the limits: the sum of the shares by which it exceeds each; 0 where it meets all."""
        limits = self.limits(schedule.num_layers)
        costs = spent(schedule, sizes)
        return sum(max(0.0, costs[name] / max(limit, 1) - 1) for name, limit in limits.items())


def spent(schedule: Schedule, sizes: ModelSizes | None) -> dict[str, int]:
    """What a schedule costs, by the names of `Budget.limits`; without sizes the layers only."""
    layers = {f"layers in {phase}": schedule.num_executed(phase) for phase in Phase}
    if sizes is None:
        return layers
    costs = schedule_costs(sizes, schedule)
    return layers | {
        "bytes": costs.weight_bytes,
        "K/V bytes per token": costs.kv_bytes_per_token,
        "prefill FLOPs": costs.prefill_flops,
        "decode bytes": costs.decode_bytes,
    }


def num_kept(keep: float, num_layers: int) -> int:
    """`max(1, round(keep * num_layers))`, half rounds up, for a keep ratio in (0, 1]."""
    exact = Decimal(str(keep)) * num_layers  # 0.29 of 50 layers is 14.5, not the 14.4999... of binary fractions
    return max(1, int(exact.quantize(Decimal(1), rounding=ROUND_HALF_UP)))


def parse_amount(text: str) -> int:
    """A whole number with an optional unit: 700000000, 700MB, 1.5GiB, 2T. Raises BudgetError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)(?:b|flops?)?\s*", text, flags=re.IGNORECASE)
    if found is None or found[2].lower() not in _SUFFIXES:
        raise BudgetError(f"{text!r} is no amount", hint="write 700MB, 1.5GiB or 2T")
    return int(Decimal(found[1]) * _SUFFIXES[found[2].lower()])


def parse_layers(text: str) -> frozenset[int]:
    """Layers by number, from 0, ranges inclusive: "3,7,11-14". Raises BudgetError."""
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)  # no model has more; 0-9999999999 is a slip
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise BudgetError(
                f"{text!r} is no list of layers", hint="write 3,7,11-14: numbers from 0, ranges inclusive"
            )
        layers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(layers)


def format_layers(layers: Iterable[int]) -> str:
    """The inverse of `parse_layers`: {3, 7, 11, 12, 13} is "3,7,11-13"."""
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in contiguous_runs(layers))


def contiguous_runs(layers: Iterable[int]) -> list[list[int]]:
    """Layers in ascending order, those that follow each other together."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
