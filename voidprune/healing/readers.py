"""Who reads the residual stream next, and so what a sublayer's output should have been. Pure, from the schedule alone.

Points of the stream of a model with L layers: 2 l is the entry of layer l, which its attention (and whoever only writes keys and
values) reads; 2 l + 1 lies between its sublayers and is read by the MLP; 2 L is the end, which the head reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from voidprune.schedule import Boundary, Phase, Schedule


class Part(StrEnum):
    """The two sublayers of a decoder layer."""

    ATTENTION = "attention"
    MLP = "mlp"


@dataclass(frozen=True)
class Branch:
    """What one sublayer adds to the stream."""

    layer: int
    part: Part

    @property
    def reads(self) -> int:
        """The point at which the sublayer reads the stream."""
        return 2 * self.layer + (self.part is Part.MLP)

    @property
    def gives(self) -> int:
        """The point at which the stream has its output."""
        return self.reads + 1


def runs(schedule: Schedule, phase: Phase, branch: Branch) -> bool:
    """Whether the branch counts for tokens of a phase."""
    action = schedule.actions(phase)[branch.layer]
    return action.attends if branch.part is Part.ATTENTION else action.runs_mlp


def all_branches(schedule: Schedule) -> list[Branch]:
    """Every branch of the model, from bottom to top."""
    return [Branch(layer, part) for layer in range(schedule.num_layers) for part in Part]


def read_points(schedule: Schedule, phase: Phase) -> frozenset[int]:
    """Where the stream of a phase's tokens is read by something that matters to what the model says.

    The head matters to decode, and to prefill where the last prompt token belongs to it; a sublayer to whoever reads the stream
    above it; keys and values to the other phase where that attends. So the last MLP does nothing for a prompt whose last token is
    of decode.
    """
    matters = phase is Phase.DECODE or schedule.boundary is Boundary.PREFILL
    found = {2 * schedule.num_layers} if matters else set()
    (other,) = set(Phase) - {phase}
    for branch in reversed(all_branches(schedule)):
        lends = (
            branch.part is Part.ATTENTION and schedule.actions(other)[branch.layer].attends
        )  # the K/V contract: written, too
        if lends or (found and runs(schedule, phase, branch)):
            found.add(branch.reads)
    return frozenset(found)


def next_reads(schedule: Schedule, phase: Phase, branch: Branch) -> tuple[int, ...]:
    """The points at which the output of a branch is read before the stream of the phase changes again, in order.

    One point, the next sublayer's that runs; before it, those of layers that only write keys and values. Empty where nothing reads
    it, or the branch does not count in the phase.
    """
    if not runs(schedule, phase, branch):
        return ()
    later = (
        other.reads for other in all_branches(schedule) if other.reads > branch.reads and runs(schedule, phase, other)
    )
    last = next(later, 2 * schedule.num_layers)
    return tuple(sorted(point for point in read_points(schedule, phase) if branch.gives <= point <= last))


def read_gap(schedule: Schedule, branch: Branch) -> bool:
    """Whether something that the whole model does is left out between a branch and whoever reads it next."""
    reads = [next_reads(schedule, phase, branch) for phase in Phase]
    return any(points and points[-1] != branch.gives for points in reads)
