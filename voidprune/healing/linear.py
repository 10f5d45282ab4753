"""Healing in closed form: the output projections of the sublayers that stay, fitted to the stream that the whole model has.

After ReplaceMe (arXiv 2505.02819), which replaces a span of layers by one linear map, found by least squares and folded into the
down projection before the span. Here, too, nothing is trained and nothing grows. What is different, because it was measured to be
better (docs/results.md):

- The projection itself is fitted, not a map behind it: every map behind a projection is one of its values.
- So is every sublayer above the first gap, attention as well as MLP, from bottom to top, on the stream of the healed student as
  it really comes in: each one also makes up for what those below it could not.
- Each token counts in its phase. The target of a token is the whole model's stream where that phase reads it next, relative to
  its length, because the norm in front of every reader takes the length away. So one projection serves prefill and decode as well
  as one matrix can.

The two streams of all tokens are kept in memory, on the CPU, in the dtype of the model: 4 bytes * tokens * width in 16 bits. All
else is a layer's: the model is walked once, each layer run a few times.

Shapes: B rows, T tokens, N tokens of a kind, F features of a projection (with a last one that is 1 where there is a bias), H width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from voidprune.errors import HealingError, ModelError
from voidprune.execution.reference import ScheduledModel, decoder_layers, scheduled
from voidprune.healing.layer_windows import (
    PhasedBatch,
    branch_factor,
    output_projection,
    phased_batches,
    run_window,
)
from voidprune.healing.least_squares import RIDGES, NormalEquations, fit_weights
from voidprune.healing.readers import Branch, Part, next_reads, read_gap
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.families import find_family
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Phase, Schedule, full_schedule

_ROUNDING = 2
"""Errors of a stream, in units of its dtype's last place, below which there is nothing to fit but rounding."""


@dataclass(frozen=True)
class FittedBranch:
    """How well a projection fits, on held-out tokens: mean square of the error, relative to the length of the stream.

    `ridge` is None where no fit was better than the projection as it was, which then stays.
    """

    layer: int
    part: Part
    num_tokens: int
    ridge: float | None
    error_before: float
    error_after: float

    def to_document(self) -> dict[str, Any]:
        return {**asdict(self), "part": str(self.part)}


@dataclass(frozen=True, eq=False)
class Fitted:
    """`state`: the weights that changed, by their names in the checkpoint of the *whole* model, on the CPU, in its dtype."""

    state: Mapping[str, Tensor]
    branches: tuple[FittedBranch, ...]


def check_foldable(checkpoint: Checkpoint) -> None:
    """Raise HealingError where the output projections of a model cannot be fitted, with the reason."""
    hint = "heal it with --method distill"
    architecture = checkpoint.architecture
    names, reason = architecture.spec.tensors, architecture.spec.unfoldable
    mlp_norm = None if names.mlp_norm is None else f"{names.layer(0, names.mlp_norm)}.weight"
    if checkpoint.config.get("quantization_config"):
        reason = "its weights are quantized, and a fitted projection is not"
        hint = "heal the checkpoint that was quantized, then quantize it again"
    elif architecture.experts_per_token:
        reason = "it has a mixture of experts, and so no single down projection"
    elif reason is None and mlp_norm not in checkpoint.tensors:
        reason = "its attention and MLP read the same stream side by side"
    if reason is not None:
        raise HealingError(
            f"{checkpoint.name} ({checkpoint.config['model_type']}) cannot be healed in closed form: {reason}",
            hint=hint,
        )


def fit_projections(
    model: PreTrainedModel,
    schedule: Schedule,
    fitting: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _amount: None,
) -> Fitted:
    """Fit the output projections of the layers that `schedule` keeps, in place.

    `model` is the whole model; it ends as the healed one. Each ridge is chosen on `held_out`, and what is not better there is not
    kept. `advance` is told of every layer done. The caller has asked `check_foldable`. Raises ModelError where streams overflow.
    """
    walk = _Walk(model, schedule, fitting, held_out, batch_size=batch_size)
    for layer in range(schedule.num_layers):
        for part in Part:
            walk.fit(Branch(layer, part))
        walk.step(layer)
        advance(1)
    return Fitted(walk.state, tuple(walk.found))


@dataclass(eq=False)
class _Streams:
    """A batch, and the streams of teacher and student where the walk stands: [B, T, H], None before layer 0."""

    batch: PhasedBatch
    is_held_out: bool
    teacher_BTH: Tensor | None = None
    student_BTH: Tensor | None = None


class _Walk:
    """From bottom to top. `found` and `state` grow as branches are fitted; `_original` is what the teacher needs of this layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        schedule: Schedule,
        fitting: Sequence[Sample],
        held_out: Sequence[Sample],
        *,
        batch_size: int,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.whole = full_schedule(schedule.model, boundary=schedule.boundary)
        self.spec = find_family(model.config.to_dict())
        self.layers = decoder_layers(model, self.spec.modules)
        self.found: list[FittedBranch] = []
        self.state: dict[str, Tensor] = {}
        self._has_gap = False  # whether the student's stream may differ from the teacher's
        self._original: dict[Part, Tensor] = {}
        self._streams = [
            _Streams(batch, is_held_out=samples is held_out)
            for samples in (fitting, held_out)
            for batch in phased_batches(samples, schedule.boundary, batch_size=batch_size)
        ]

    def fit(self, branch: Branch) -> None:
        """Fit one branch, if it counts and there is anything to make up for."""
        targets = {phase: reads[-1] for phase in Phase if (reads := next_reads(self.schedule, phase, branch))}
        if not targets or not (self._has_gap or read_gap(self.schedule, branch)):
            return
        projection = output_projection(self.layers[branch.layer], self.spec, branch.part)
        start_FH = _read_weights(projection)
        fitting, held_out = (NormalEquations(*start_FH.shape, device=start_FH.device) for _ in range(2))
        for streams in self._streams:
            self._add(held_out if streams.is_held_out else fitting, branch, streams, targets)
        if not all(math.isfinite(sums.square) for sums in (fitting, held_out)):
            raise ModelError("the model's hidden states overflow", hint="heal with --dtype bf16 or fp32")
        rounding = (_ROUNDING * torch.finfo(projection.weight.dtype).eps) ** 2 * held_out.num_tokens
        ridges = RIDGES if held_out.error(start_FH) > rounding else ()
        fit = fit_weights(fitting, held_out, start_FH, ridges=ridges)
        if fit.ridge is not None:
            self._original[branch.part] = start_FH
            self._has_gap = True
            _write_weights(projection, fit.weights_FH)
            names = self.spec.tensors
            name = names.layer(branch.layer, names.output if branch.part is Part.ATTENTION else names.down)
            for kind, weight in projection.named_parameters():
                self.state[f"{name}.{kind}"] = weight.detach().cpu().clone()
        self.found.append(
            FittedBranch(
                layer=branch.layer,
                part=branch.part,
                num_tokens=fitting.num_tokens,
                ridge=fit.ridge,
                error_before=fit.start_error / max(held_out.num_tokens, 1),
                error_after=fit.error / max(held_out.num_tokens, 1),
            )
        )

    def step(self, layer: int) -> None:
        """Bring both streams behind a layer."""
        actions = {self.schedule.actions(phase)[layer] for phase in Phase}
        after = 2 * layer + 2
        for streams in self._streams:
            student_BTH = streams.student_BTH
            if any(action.executes for action in actions) or student_BTH is None:
                with scheduled(self.model, self.schedule) as running:
                    student_BTH = self._run(running, streams, student_BTH, layer, {after})[after]
            if self._has_gap or actions != {LayerAction.FULL}:
                with self._teaching(layer) as running:
                    streams.teacher_BTH = self._run(running, streams, streams.teacher_BTH, layer, {after})[after]
            else:
                streams.teacher_BTH = student_BTH
            streams.student_BTH = student_BTH
        self._has_gap = self._has_gap or actions != {LayerAction.FULL}
        self._original.clear()

    def _add(self, sums: NormalEquations, branch: Branch, streams: _Streams, targets: Mapping[Phase, int]) -> None:
        """Add a batch to the sums: what the projection is given, and what it should have made of it."""
        with self._teaching(branch.layer) as running:
            wanted = self._run(running, streams, streams.teacher_BTH, branch.layer, set(targets.values()))
        with scheduled(self.model, self.schedule) as running:
            seen = run_window(
                running,
                streams.batch,
                first=branch.layer,
                last=branch.layer + 1,
                entry_BTH=streams.student_BTH,
                points={branch.reads},
                features_of=branch,
            )
        assert seen.features_BTF is not None
        projection = output_projection(self.layers[branch.layer], self.spec, branch.part)
        factor = branch_factor(self.layers[branch.layer], self.spec)
        for phase, point in targets.items():
            counted_BT = streams.batch.counted_BT({phase}).to(sums.device)
            target_NH, before_NH, features_NF = (
                found_BTX.to(sums.device)[counted_BT].double()
                for found_BTX in (wanted[point], seen.points_BTH[branch.reads], seen.features_BTF)
            )
            if projection.bias is not None:
                features_NF = torch.cat([features_NF, features_NF.new_ones(len(features_NF), 1)], dim=-1)
            length_N1 = target_NH.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            sums.add(factor * features_NF / length_N1, (target_NH - before_NH) / length_N1)

    def _run(
        self, running: ScheduledModel, streams: _Streams, entry_BTH: Tensor | None, layer: int, points: set[int]
    ) -> dict[int, Tensor]:
        """The stream at some points above the entry of a layer, on the CPU."""
        seen = run_window(
            running,
            streams.batch,
            first=layer,
            last=(max(points) + 1) // 2,
            entry_BTH=entry_BTH,
            points=points,
        )
        return {point: stream_BTH.cpu() for point, stream_BTH in seen.points_BTH.items()}

    @contextmanager
    def _teaching(self, layer: int) -> Iterator[ScheduledModel]:
        """The whole model, with the projections of a layer as they were. Above that layer nothing has been fitted yet."""
        fitted = {}
        for part, weights_FH in self._original.items():
            projection = output_projection(self.layers[layer], self.spec, part)
            fitted[part] = _read_weights(projection)
            _write_weights(projection, weights_FH)
        try:
            with scheduled(self.model, self.whole) as running:
                yield running
        finally:
            for part, weights_FH in fitted.items():
                _write_weights(output_projection(self.layers[layer], self.spec, part), weights_FH)


def _read_weights(projection: nn.Linear) -> Tensor:
    """Weights and, below them, the bias of a projection: [F, H] in float64; on the CPU where its device has no float64."""
    rows = [projection.weight.detach().mT]
    if projection.bias is not None:
        rows.append(projection.bias.detach().unsqueeze(0))
    weights_FH = torch.cat(rows)
    return (weights_FH.cpu() if weights_FH.device.type == "mps" else weights_FH).to(torch.float64)


def _write_weights(projection: nn.Linear, weights_FH: Tensor) -> None:
    with torch.no_grad():
        projection.weight.copy_(weights_FH[: projection.in_features].mT)
        if projection.bias is not None:
            projection.bias.copy_(weights_FH[-1])
