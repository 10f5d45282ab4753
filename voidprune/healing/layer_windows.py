"""A few layers of a scheduled model at a time, over streams that are held between calls.

Whoever walks up a model layer by layer, and changes weights on the way, runs every layer a few times instead of the whole model
once for every layer.

Shapes: B rows, T tokens, H width of the stream, F features of a projection.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from voidprune.execution.reference import ScheduledModel, decode_mask, decoder_layers
from voidprune.healing.readers import Branch, Part
from voidprune.models.architecture import FamilySpec
from voidprune.models.families import find_family
from voidprune.profiling.calibration import Sample
from voidprune.profiling.tracing import PaddedBatch, batch_by_length, pad_sequences
from voidprune.schedule import Boundary, Phase


@dataclass(frozen=True, eq=False)
class PhasedBatch:
    """Padded sequences, and which of their tokens run the decode schedule."""

    padded: PaddedBatch
    is_decode_BT: Tensor

    def counted_BT(self, phases: Collection[Phase]) -> Tensor:  # noqa: N802  the shape of what it gives
        """The tokens of some phases that are no padding."""
        in_phases_BT = (self.is_decode_BT & (Phase.DECODE in phases)) | (~self.is_decode_BT & (Phase.PREFILL in phases))
        return in_phases_BT & self.padded.attention_mask_BT.bool()

    @property
    def fed_back_BT(self) -> Tensor:  # noqa: N802  the shape of what it gives
        """The tokens of responses: what the decode graph runs, whatever schedule the last prompt token runs."""
        return self.padded.counted_PBT[1]


def phased_batches(samples: Sequence[Sample], boundary: Boundary, *, batch_size: int) -> Iterator[PhasedBatch]:
    """All samples, those of similar length together."""
    lengths = [len(sample.prompt) + len(sample.response or ()) for sample in samples]
    for indices in batch_by_length(lengths, batch_size):
        padded = pad_sequences([samples[index] for index in indices])
        width = padded.input_ids_BT.shape[1]
        masks = [decode_mask(len(samples[index].prompt), width, boundary) for index in indices]
        yield PhasedBatch(padded, torch.tensor(masks))


@dataclass
class Seen:
    """What a window saw: the stream at the points that were asked for, and what a projection was given."""

    points_BTH: dict[int, Tensor] = field(default_factory=dict)
    features_BTF: Tensor | None = None


def run_window(
    running: ScheduledModel,
    batch: PhasedBatch,
    *,
    first: int,
    last: int,
    entry_BTH: Tensor | None,
    points: Collection[int],
    features_of: Branch | None = None,
) -> Seen:
    """Run layers `first` to `last` (exclusive) on the stream `entry_BTH`, or on the embedding where that is None.

    `points` are points of the stream from 2 first to 2 last (see `readers`); `features_of` is a branch of these layers whose output
    projection is watched.
    """
    seen = Seen()
    with _window(running, seen, first=first, last=last, entry_BTH=entry_BTH, points=points, features_of=features_of):
        running.forward(
            batch.padded.input_ids_BT,
            is_decode_BT=batch.is_decode_BT,
            attention_mask_BS=batch.padded.attention_mask_BT,
            last_only=True,
        )
    return seen


@contextmanager
def _window(
    running: ScheduledModel,
    seen: Seen,
    *,
    first: int,
    last: int,
    entry_BTH: Tensor | None,
    points: Collection[int],
    features_of: Branch | None,
) -> Iterator[None]:
    spec = find_family(running.model.config.to_dict())
    layers = decoder_layers(running.model, spec.modules)
    is_tuple: list[bool] = []

    def pass_through(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        # transformers 4 returns a tuple in places; the layers of a model all do it alike.
        return (hidden_states,) if is_tuple and is_tuple[0] else hidden_states

    def enter(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream_BTH = args[0] if args else kwargs["hidden_states"]
            if layer == first and entry_BTH is not None:
                stream_BTH = entry_BTH.to(stream_BTH)
                args, kwargs = (
                    ((stream_BTH, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream_BTH})
                )
            seen.points_BTH[2 * layer] = stream_BTH
            return args, kwargs

        return hook

    def leave_attention(layer: int) -> Callable[..., None]:
        factor = branch_factor(layers[layer], spec)

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.points_BTH[2 * layer + 1] = seen.points_BTH[2 * layer] + factor * _first(output)

        return hook

    def leave(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            is_tuple[:] = [isinstance(output, tuple)]
            seen.points_BTH[2 * layer + 2] = _first(output)

        return hook

    def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.features_BTF = args[0]

    handles = []
    try:
        for number, layer in enumerate(layers):
            if first <= number < last:
                attention, _ = spec.modules.branches(layer)
                handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
                handles.append(attention.register_forward_hook(leave_attention(number)))
                handles.append(layer.register_forward_hook(leave(number)))
            else:
                layer.forward = pass_through
        if features_of is not None:
            projection = output_projection(layers[features_of.layer], spec, features_of.part)
            handles.append(projection.register_forward_pre_hook(watch))
        yield
        for point in seen.points_BTH.keys() - set(points):
            del seen.points_BTH[point]
    finally:
        for handle in handles:
            handle.remove()
        for number, layer in enumerate(layers):
            if not first <= number < last:
                del layer.forward


def output_projection(layer: nn.Module, spec: FamilySpec, part: Part) -> nn.Linear:
    """The last matrix of a sublayer: what it gives is what the branch adds."""
    name = spec.tensors.output if part is Part.ATTENTION else spec.tensors.down
    found = operator.attrgetter(name)(layer)
    assert isinstance(found, nn.Linear), "the caller asks `refuse_unfoldable` first"
    return found


def branch_factor(layer: nn.Module, spec: FamilySpec) -> float:
    """What branches are multiplied by before they are added."""
    name = spec.modules.residual_multiplier
    return 1.0 if name is None else float(getattr(layer, name))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
