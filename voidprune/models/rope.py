"""Rotary position embedding, as `config.json` says it: which frequencies, of how much of a head, scaled how.

Formulas: transformers `modeling_rope_utils.py` (5.23), the functions named below, in float32 at every step as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from voidprune.errors import ModelError
from voidprune.models.architecture import ConfigReader
from voidprune.models.layer_lists import FULL, SLIDING

if TYPE_CHECKING:
    import numpy as np

    Frequencies = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layer.

    `frequencies`: radians a position, one for each pair of rotated numbers of a head; the numbers behind them stay as they are.
    `scale` multiplies cosines and sines. `interleaved`: a pair are neighbours, not a number of either half. In a sequence of
    more than `long_from` tokens, `long_frequencies` take their place (LongRoPE).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    long_frequencies: tuple[float, ...] = ()
    long_from: int = 0

    @property
    def width(self) -> int:
        """How many numbers of a head are rotated."""
        return 2 * len(self.frequencies)


def read_ropes(reader: ConfigReader, *, head_dim: int, interleaved: bool) -> Mapping[str, Rope]:
    """The embedding of layers with full and with sliding attention. Raises ModelError on what cannot be computed exactly."""
    # transformers 5 writes rope_parameters, by kind of layer where they differ; 4.x rope_theta and rope_scaling.
    config, local_theta = reader.config, reader.spec.local_rope_theta
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(written, dict):
        raise ModelError("rope_parameters or rope_scaling in config.json is not an object")
    if FULL in written or SLIDING in written:
        by_kind = {kind: written.get(kind) or {} for kind in (FULL, SLIDING)}
    else:
        by_kind = {FULL: written, SLIDING: written}
    graph = reader.spec.graph
    if graph is not None and graph.scales_full_layers_only and by_kind[SLIDING] is written:
        by_kind[SLIDING] = {name: written[name] for name in ("rope_theta",) if name in written}
    if local_theta is not None and not by_kind[SLIDING].get("rope_theta"):
        by_kind[SLIDING] = {"rope_theta": reader.value(local_theta)}
    return {
        kind: _RopeReader(reader, fields, head_dim=head_dim, interleaved=interleaved).read()
        for kind, fields in by_kind.items()
    }


class _RopeReader:
    """One embedding from its fields."""

    def __init__(self, reader: ConfigReader, fields: Any, *, head_dim: int, interleaved: bool) -> None:
        if not isinstance(fields, dict):
            raise ModelError("rope_parameters in config.json is not an object for each kind of layer")
        self.reader, self.fields, self.interleaved = reader, fields, interleaved
        self.kind = fields.get("rope_type", fields.get("type", "default"))
        self.width = int(
            head_dim * self._number("partial_rotary_factor", reader.lookup("partial_rotary_factor") or 1.0)
        )
        self.theta = self._number("rope_theta", None if fields.get("rope_theta") else reader.value("rope_theta"))

    def read(self) -> Rope:
        match self.kind:
            case "default":
                return self._rope(1 / self._periods())
            case "linear":
                return self._rope(1 / self._periods() / _float32(self._number("factor")))
            case "llama3":
                return self._rope(self._llama3())
            case "yarn":
                return self._rope(self._yarn(), scale=self._yarn_scale())
            case "longrope":
                return self._longrope()
            case _:
                raise ModelError(
                    f"no ONNX graphs are made with a rotary embedding of type {self.kind!r}; "
                    "with default, linear, llama3, yarn and longrope",
                    hint="export with --format hf",
                )

    def _rope(self, frequencies: Frequencies, *, scale: float = 1.0) -> Rope:
        return Rope(_tuple(frequencies), scale=scale, interleaved=self.interleaved)

    def _periods(self) -> Frequencies:
        """Positions a radian."""
        import numpy as np

        periods: Frequencies = _float32(self.theta) ** (np.arange(0, self.width, 2, dtype=np.float32) / self.width)
        return periods

    def _llama3(self) -> Frequencies:
        """`_compute_llama3_parameters`: long waves are slowed by the factor, short ones kept, those between are blended."""
        import numpy as np

        frequencies, factor = 1 / self._periods(), self._number("factor")
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        wavelengths = _float32(2 * math.pi) / frequencies
        kept = np.clip((self._original_context() / wavelengths - low) / (high - low), 0.0, 1.0)
        blended: Frequencies = ((1 - kept) * frequencies / factor + kept * frequencies).astype(np.float32)
        return blended

    def _yarn(self) -> Frequencies:
        """`_compute_yarn_parameters`: dimensions that turn often are kept, those that turn rarely slowed, a ramp between."""
        import numpy as np

        def dimension(turns: float) -> float:
            """The dimension that turns so often in the original context."""
            return (self.width * math.log(self._original_context() / (turns * 2 * math.pi))) / (
                2 * math.log(self.theta)
            )

        first = dimension(self._number("beta_fast", 32.0))
        last = dimension(self._number("beta_slow", 1.0))
        if self.fields.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.width - 1)
        span = last - first if last != first else 0.001
        slowed = np.clip((np.arange(self.width // 2, dtype=np.float32) - _float32(first)) / _float32(span), 0.0, 1.0)
        periods = self._periods()
        mixed: Frequencies = (1 / (_float32(self._factor()) * periods)) * slowed + (1 / periods) * (1 - slowed)
        return mixed

    def _yarn_scale(self) -> float:
        if self.fields.get("attention_factor") is not None:
            return self._number("attention_factor")

        def gain(weight: float) -> float:
            return 1.0 if self._factor() <= 1 else 0.1 * weight * math.log(self._factor()) + 1.0

        if self.fields.get("mscale") and self.fields.get("mscale_all_dim"):
            return gain(self._number("mscale")) / gain(self._number("mscale_all_dim"))
        return gain(1.0)

    def _longrope(self) -> Rope:
        """`_compute_longrope_parameters`: a factor for each frequency, and others beyond the original context."""
        import numpy as np

        original, factor = self._original_context(), self._factor()
        if self.fields.get("attention_factor") is not None:
            scale = self._number("attention_factor")
        else:
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (
            1 / (np.array(self._numbers(name), np.float32) * self._periods())
            for name in ("short_factor", "long_factor")
        )
        return Rope(_tuple(short), scale, self.interleaved, _tuple(long), int(original))

    def _factor(self) -> float:
        if self.fields.get("factor") is not None:
            return self._number("factor")
        return self.reader.integer("max_position_embeddings") / self._original_context()

    def _original_context(self) -> float:
        name = "original_max_position_embeddings"
        if self.reader.config.get(name) is not None:  # Phi-3 writes it beside the embedding; there it counts first
            return self.reader.integer(name)
        return self._number(name, self.reader.integer("max_position_embeddings"))

    def _number(self, name: str, otherwise: float | None = None) -> float:
        value = self.fields.get(name)
        if value is None and otherwise is not None:
            return otherwise
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"config.json scales its rotary embedding by {self.kind!r} but gives no number for {name}")
        return float(value)

    def _numbers(self, name: str) -> list[float]:
        values = self.fields.get(name)
        if not isinstance(values, list) or len(values) != self.width // 2:
            raise ModelError(
                f"{name} of the rotary embedding in config.json is not a list of {self.width // 2} numbers"
            )
        return [float(value) for value in values]


def _float32(number: float) -> Any:
    import numpy as np

    return np.float32(number)


def _tuple(frequencies: Frequencies) -> tuple[float, ...]:
    return tuple(frequencies.astype("float32").tolist())
