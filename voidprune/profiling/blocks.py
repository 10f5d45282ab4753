"""What samples measured, added up in the blocks of their groups. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voidprune.profiling.calibration import Sample
from voidprune.profiling.profile import MEASURES, NUM_BLOCKS, Blocks, LayerStatistics
from voidprune.schedule import Phase

Array = np.ndarray[Any, np.dtype[np.float64]]


def num_traced(sample: Sample) -> tuple[int, int]:
    """How many tokens of prefill and of decode are traced: the last token of a response is never fed."""
    return len(sample.prompt), max(0, len(sample.response or ()) - 1)


class BlockSums:
    """Adds up samples in the blocks of their groups, in any order."""

    def __init__(self, samples: Sequence[Sample], *, num_layers: int) -> None:
        self.num_layers = num_layers
        members: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            members.setdefault(sample.group, []).append(index)
        self._num_tokens = [num_traced(sample) for sample in samples]
        self._blocks = {
            group: [indices[first::NUM_BLOCKS] for first in range(NUM_BLOCKS)] for group, indices in members.items()
        }
        self._cells = {
            index: (group, block)
            for group, blocks in self._blocks.items()
            for block, indices in enumerate(blocks)
            for index in indices
        }
        width = len(MEASURES) * num_layers + num_layers * (num_layers + 1) // 2
        self._sums = {group: np.zeros((NUM_BLOCKS, len(Phase), width)) for group in members}

    def add(self, indices: Sequence[int], sums_BPS: Array) -> None:
        for index, sums_PS in zip(indices, sums_BPS, strict=True):
            group, block = self._cells[index]
            self._sums[group][block] += sums_PS

    def groups(self) -> Mapping[str, Mapping[Phase, Blocks]]:
        return {
            group: {
                phase: tuple(self._block(group, block, number) for block in range(NUM_BLOCKS))
                for number, phase in enumerate(Phase)
            }
            for group in self._sums
        }

    def _block(self, group: str, block: int, phase: int) -> LayerStatistics:
        counts = [self._num_tokens[index][phase] for index in self._blocks[group][block]]
        sums_S = self._sums[group][block, phase]
        layers_S, spans = sums_S[: len(MEASURES) * self.num_layers], sums_S[len(MEASURES) * self.num_layers :]
        sums = dict(zip(MEASURES, layers_S.reshape(len(MEASURES), -1).tolist(), strict=True))
        return LayerStatistics(
            num_tokens=sum(counts),
            active=tuple(map(int, sums.pop("active"))),
            **{name: tuple(values) for name, values in sums.items()},
            num_spans=sum(count > 0 for count in counts),
            span_distance=tuple(spans.tolist()),
        )
