"""Rows of weights in blocks of whole numbers: each rounded to nearest, with the range of every block that leaves the least error.

Shapes: R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from voidprune.models.packed import BlockFormat

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_VALUES = 1 << 19  # weights that one thread works on at a time
_RANGES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8)
"""Ranges of a block that are tried, as shares of the one that its extremes ask for.

Below 1, outliers are clipped and all others are nearer; above, the extreme of the other sign is nearer. Relative weight error of
the demo model in 4 bits, blocks of 32: 9.8 % with the largest magnitude at 7, 8.7 % with it at -8, 8.2 % with the best of these.
"""


class Rounded(NamedTuple):
    """What rows become: whole numbers [R, blocks, block size], scales [R, blocks], and zero points [R, blocks] if there are any."""

    numbers: Bytes
    scales: Floats
    zero_points: Bytes | None

    def rows(self, start: int, stop: int) -> Rounded:
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return Rounded(self.numbers[start:stop], self.scales[start:stop], zero_points)


def restore_rows(weights: Floats, blocks: BlockFormat) -> Floats:
    """What packing leaves of a matrix [N, K]: the weights that it would mean, packed."""
    return np.concatenate(
        [
            restore_numbers(quantize_rows(weights[start:stop], blocks), blocks)[:, : weights.shape[1]]
            for start, stop in cut_rows(weights.shape)
        ]
    )


def restore_numbers(rounded: Rounded, blocks: BlockFormat) -> Floats:
    """What rounded rows mean, with the padding of their last blocks: [R, all numbers of all blocks]."""
    centred = rounded.numbers.astype(np.float32)
    centred -= blocks.middle if rounded.zero_points is None else rounded.zero_points[:, :, np.newaxis]
    centred *= rounded.scales[:, :, np.newaxis]
    return centred.reshape(len(centred), -1)


def quantize_rows(weights: Floats, blocks: BlockFormat) -> Rounded:
    """Rows [R, K], each weight rounded to nearest.

    Of the ranges in _RANGES, each block takes the one with the least square error, its scale being the least-squares one for the
    numbers that rounding gave. Without zero points, the weight of largest magnitude goes to the end of the numbers that reaches
    further, -2^(bits-1).
    """
    rows, columns = weights.shape
    num_blocks, length = blocks.num_blocks(columns), blocks.numbers_in_block(columns)
    padded = np.zeros((rows, num_blocks * length), np.float32)
    padded[:, :columns] = weights
    values = padded.reshape(rows, num_blocks, length)
    magnitudes = np.abs(values).max(-1)
    values = _divide(values, magnitudes[:, :, np.newaxis])  # so that squares stay within float32, whatever the weights
    low = np.minimum(values.min(-1), 0)
    high = np.maximum(values.max(-1), 0)
    best = _Nearest.start(values)
    for share in _RANGES:
        if blocks.zero_points:
            scales = (high - low) * np.float32(share / blocks.largest)
            zero_points = np.clip(np.rint(_divide(-low * np.float32(share), scales)), 0, blocks.largest)
        else:
            scales = np.where(high > -low, high, low) * np.float32(-share / blocks.middle)
            zero_points = np.full_like(scales, blocks.middle)
        best.improve(values, scales, zero_points, blocks)
    return Rounded(best.numbers, best.scales * magnitudes, best.zero_points if blocks.zero_points else None)


@dataclass
class _Nearest:
    """The best way found so far to round each block."""

    numbers: Bytes
    scales: Floats
    zero_points: Bytes
    errors: Floats

    @classmethod
    def start(cls, values: Floats) -> _Nearest:
        shape = values.shape[:-1]
        return cls(
            np.zeros(values.shape, np.uint8),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.uint8),
            np.full(shape, np.inf, np.float32),
        )

    def improve(self, values: Floats, scales: Floats, zero_points: Floats, blocks: BlockFormat) -> None:
        """Take the blocks over that these scales and zero points round with less error."""
        centred = values * _divide(np.ones_like(scales), scales)[:, :, np.newaxis]
        np.rint(centred, out=centred)
        np.clip(centred, -zero_points[:, :, np.newaxis], blocks.largest - zero_points[:, :, np.newaxis], out=centred)
        scales = _divide((centred * values).sum(-1), (centred * centred).sum(-1))
        errors = np.square(values - centred * scales[:, :, np.newaxis]).sum(-1)
        better = errors < self.errors
        centred += zero_points[:, :, np.newaxis]
        self.numbers[better] = centred[better].astype(np.uint8)
        self.scales[better] = scales[better]
        self.zero_points[better] = zero_points[better].astype(np.uint8)
        self.errors[better] = errors[better]


def _divide(dividend: Floats, divisor: Floats) -> Floats:
    """0 where the divisor is 0: of blocks that are all zeros."""
    return np.divide(dividend, divisor, out=np.zeros_like(dividend), where=divisor != 0)


def cut_rows(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of rows that hold about _VALUES weights each; an empty tensor has one without rows."""
    rows, *rest = shape
    step = max(1, _VALUES // max(1, int(np.prod(rest, dtype=np.int64))))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] or [(0, 0)]
