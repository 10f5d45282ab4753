"""What a page needs of a benchmark: the one place here that knows the keys of that file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voidprune.quality.spreads import Spread


@dataclass(frozen=True)
class Timing:
    """Of one model, the whole one first: seconds, ratios to the whole model in the same round, bytes."""

    name: str
    ttft: Spread
    tpot: Spread
    ttft_ratio: Spread
    tpot_ratio: Spread
    weight_bytes: int
    peak_resident_bytes: int


@dataclass(frozen=True)
class Timings:
    """`conditions` are what is known of how it was measured, as (what, value); `interval_name` says what all intervals are.

    It is empty of one round: then there are none.
    """

    models: tuple[Timing, ...]
    conditions: tuple[tuple[str, str], ...]
    interval_name: str

    @property
    def whole(self) -> Timing:
        return self.models[0]

    @property
    def pruned(self) -> Timing:
        return self.models[-1]


_CONDITIONS = (
    ("prompt_length", "prompt, tokens"),
    ("context_length", "context, tokens"),
    ("batch_size", "batch"),
    ("num_new_tokens", "new tokens"),
    ("num_rounds", "interleaved rounds"),
    ("provider", "provider"),
    ("threads", "threads"),
    ("seed", "seed"),
    ("runtime", "runtime"),
    ("machine", "machine"),
)


def read_timings(document: Mapping[str, Any]) -> Timings:
    """Of a whole `voidprune.benchmark` document of any version so far."""

    def spread(found: Mapping[str, float]) -> Spread:
        return Spread(float(found["median"]), float(found["low"]), float(found["high"]))

    return Timings(
        models=tuple(
            Timing(
                name=str(one["name"]),
                weight_bytes=int(one["weight_bytes"]),
                peak_resident_bytes=int(one["peak_resident_bytes"]),
                **{key: spread(one[key]) for key in ("ttft", "tpot", "ttft_ratio", "tpot_ratio")},
            )
            for one in document["timings"]
        ),
        conditions=tuple(
            (name, str(document[key])) for key, name in _CONDITIONS if isinstance(document.get(key), str | int | float)
        ),
        interval_name=_interval_name(document),
    )


def _interval_name(document: Mapping[str, Any]) -> str:
    if document.get("num_rounds") == 1:
        return ""
    return f"{document['confidence']:.0%} interval" if "confidence" in document else "interval"
