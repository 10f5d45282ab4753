"""The heart: what each decoder layer does in prefill and in decode. Pure values, no model.

A `Schedule` cannot be constructed invalid, so nothing downstream checks again. What an action *means* in terms of tensors is
said once, in `execution/reference.py`; how a schedule is chosen is the business of `planning`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError, ScheduleError

KIND, VERSION = "schedule", 1

Scalar = str | int | float | bool | None


class Phase(StrEnum):
    """Prompt processing, or response generation."""

    PREFILL = "prefill"
    DECODE = "decode"


class Boundary(StrEnum):
    """Which phase the last prompt token belongs to: the token that produces the first output token."""

    DECODE = "decode"
    PREFILL = "prefill"


class LayerAction(StrEnum):
    """What one layer does in one phase: {attention: run | K/V only | skip} x {MLP: run | skip}."""

    FULL = "full"
    SKIP_MLP = "skip_mlp"
    SKIP_ATTENTION = "skip_attention"
    KV_MLP = "kv_mlp"
    KV_ONLY = "kv_only"
    SKIP = "skip"

    @property
    def attends(self) -> bool:
        """The attention output is added to the residual stream."""
        return self in (LayerAction.FULL, LayerAction.SKIP_MLP)

    @property
    def writes_kv(self) -> bool:
        """Keys and values of the stream that enters the layer are put into the cache."""
        return self.attends or self in (LayerAction.KV_MLP, LayerAction.KV_ONLY)

    @property
    def runs_mlp(self) -> bool:
        """The MLP output is added to the residual stream."""
        return self in (LayerAction.FULL, LayerAction.SKIP_ATTENTION, LayerAction.KV_MLP)

    @property
    def executes(self) -> bool:
        """The layer changes the residual stream, so it counts as kept."""
        return self.attends or self.runs_mlp

    def writing_kv(self) -> LayerAction:
        """The nearest action that also writes K/V: what the K/V contract turns this one into."""
        match self:
            case LayerAction.SKIP:
                return LayerAction.KV_ONLY
            case LayerAction.SKIP_ATTENTION:
                return LayerAction.KV_MLP
            case _:
                return self


Actions = tuple[LayerAction, ...]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a profile or schedule speaks of.

    `fingerprint` covers the names and shapes of all tensors and the `model_type`: two fine-tunings of one model share it, so
    a schedule made on one may be tried on the other; a model of other dimensions is refused.
    """

    name: str
    model_type: str
    num_layers: int
    fingerprint: str

    def to_document(self) -> artifacts.Document:
        return {
            "name": self.name,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_document(cls, document: Any, *, place: str) -> ModelIdentity:
        if not isinstance(document, dict):
            raise ArtifactError(f"{place}: model is not an object")
        artifacts.check_keys(document, required=cls.__dataclass_fields__, place=f"{place}: model")
        types = {"name": str, "model_type": str, "num_layers": int, "fingerprint": str}
        for key, expected in types.items():
            if type(document[key]) is not expected:
                raise ArtifactError(f"{place}: model.{key} is not of type {expected.__name__}")
        return cls(**document)


@dataclass(frozen=True)
class Schedule:
    """The actions of all layers in both phases.

    `prefill[l]` and `decode[l]` are the actions of layer l (0-based, of the original model). `single_turn` gives up prompts
    after generated tokens, and with them the duty of decode to write K/V that only prefill reads. `origin` says how the
    schedule came to be; it has no influence on what it means.

    Raises ScheduleError, naming the layer and the mend, when a rule is broken:

    - both phases list every layer of the model, and at least one layer executes in each phase;
    - a layer that attends in decode writes K/V in prefill;
    - a layer that attends in prefill writes K/V in decode, unless `single_turn`.
    """

    model: ModelIdentity
    prefill: Actions
    decode: Actions
    boundary: Boundary = Boundary.DECODE
    single_turn: bool = False
    origin: Mapping[str, Scalar] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefill", tuple(LayerAction(action) for action in self.prefill))
        object.__setattr__(self, "decode", tuple(LayerAction(action) for action in self.decode))
        object.__setattr__(self, "boundary", Boundary(self.boundary))
        object.__setattr__(self, "origin", MappingProxyType(dict(self.origin)))
        for phase in Phase:
            actions = self.actions(phase)
            if len(actions) != self.model.num_layers:
                raise ScheduleError(
                    f"{phase} lists {len(actions)} layers; {self.model.name} has {self.model.num_layers}",
                    hint="list one action for every layer of the model",
                )
            if not any(action.executes for action in actions):
                raise ScheduleError(f"no layer executes in {phase}", hint=f'make at least one layer of {phase} "full"')
        for layer, (in_prefill, in_decode) in enumerate(zip(self.prefill, self.decode, strict=True)):
            if in_decode.attends and not in_prefill.writes_kv:
                raise ScheduleError(
                    f"layer {layer} attends in decode but prefill writes no K/V for it",
                    hint=f'make prefill[{layer}] "{in_prefill.writing_kv()}", or decode[{layer}] "skip"',
                )
            if in_prefill.attends and not in_decode.writes_kv and not self.single_turn:
                raise ScheduleError(
                    f"layer {layer} attends in prefill but decode writes no K/V for it, so a second turn would miss them",
                    hint=f'make decode[{layer}] "{in_decode.writing_kv()}", or set single_turn',
                )

    def actions(self, phase: Phase) -> Actions:
        return self.prefill if phase is Phase.PREFILL else self.decode

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    @property
    def is_full(self) -> bool:
        """Every layer runs whole in both phases: the unpruned model."""
        return all(action is LayerAction.FULL for action in self.prefill + self.decode)

    def actions_equal(self, other: Schedule) -> bool:
        """Whether another schedule does the same in every layer and phase, wherever it came from."""
        return (self.prefill, self.decode) == (other.prefill, other.decode)

    @property
    def union(self) -> tuple[int, ...]:
        """Layers present in at least one phase: what a checkpoint for this schedule holds."""
        return tuple(
            layer
            for layer in range(self.num_layers)
            if (self.prefill[layer], self.decode[layer]) != (LayerAction.SKIP, LayerAction.SKIP)
        )

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers that write K/V in either phase; the position in this tuple is the cache slot."""
        return tuple(
            layer for layer in range(self.num_layers) if self.prefill[layer].writes_kv or self.decode[layer].writes_kv
        )

    def num_executed(self, phase: Phase) -> int:
        """Layers that change the residual stream in a phase: what the keep ratio counts."""
        return sum(action.executes for action in self.actions(phase))

    def check_model(self, model: ModelIdentity, *, place: str) -> None:
        """Raise ScheduleError unless this schedule was made for (a model shaped like) `model`."""
        if self.model.num_layers != model.num_layers or self.model.fingerprint != model.fingerprint:
            raise ScheduleError(
                f"{place} is for {self.model.name} ({self.model.model_type}, {self.model.num_layers} layers), "
                f"not for {model.name} ({model.model_type}, {model.num_layers} layers)",
                hint="profile and plan the model that you export",
            )

    def on_slim_model(self, slim: ModelIdentity) -> Schedule:
        """The same schedule for the checkpoint that holds only `union`, with layers renumbered 0, 1, ..."""
        return Schedule(
            model=slim,
            prefill=tuple(self.prefill[layer] for layer in self.union),
            decode=tuple(self.decode[layer] for layer in self.union),
            boundary=self.boundary,
            single_turn=self.single_turn,
            origin=self.origin,
        )

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key(KIND, VERSION),
            "model": self.model.to_document(),
            "prefill": [str(action) for action in self.prefill],
            "decode": [str(action) for action in self.decode],
            "boundary": str(self.boundary),
            "single_turn": self.single_turn,
            "origin": dict(self.origin),
        }

    @classmethod
    def from_document(cls, document: artifacts.Document, *, place: str) -> Schedule:
        """Raises ArtifactError when the document is not of this form, ScheduleError when the schedule breaks a rule."""
        artifacts.check_keys(
            document,
            required={"schema", "model", "prefill", "decode", "boundary", "single_turn", "origin"},
            place=place,
        )
        model = ModelIdentity.from_document(document["model"], place=place)
        if type(document["single_turn"]) is not bool:
            raise ArtifactError(f"{place}: single_turn is not true or false")
        origin = document["origin"]
        if not isinstance(origin, dict) or not all(isinstance(value, Scalar) for value in origin.values()):
            raise ArtifactError(f"{place}: origin is not an object of plain values")
        if document["boundary"] not in tuple(Boundary):
            raise ArtifactError(
                f"{place}: boundary is {document['boundary']!r}", hint=f"write one of {', '.join(Boundary)}"
            )
        try:
            return cls(
                model=model,
                prefill=_parse_actions(document["prefill"], phase=Phase.PREFILL, place=place),
                decode=_parse_actions(document["decode"], phase=Phase.DECODE, place=place),
                boundary=Boundary(document["boundary"]),
                single_turn=document["single_turn"],
                origin=origin,
            )
        except ScheduleError as error:
            raise ScheduleError(f"{error.message} ({place})", hint=error.hint) from error


def _parse_actions(values: Any, *, phase: Phase, place: str) -> Actions:
    if not isinstance(values, list):
        raise ArtifactError(f"{place}: {phase} is not a list of actions")
    for layer, value in enumerate(values):
        if value not in tuple(LayerAction):
            raise ArtifactError(
                f"{place}: {phase}[{layer}] is {value!r}", hint=f"write one of {', '.join(LayerAction)}"
            )
    return tuple(LayerAction(value) for value in values)


def full_schedule(model: ModelIdentity, *, boundary: Boundary = Boundary.DECODE) -> Schedule:
    """The unpruned model: every layer runs whole in both phases."""
    full = (LayerAction.FULL,) * model.num_layers
    return Schedule(model=model, prefill=full, decode=full, boundary=boundary, origin={"criterion": "none"})


def dropped_schedule(model: ModelIdentity, dropped: Iterable[int]) -> Schedule:
    """Layers left out in both phases."""
    dropped = set(dropped)
    actions = tuple(LayerAction.SKIP if layer in dropped else LayerAction.FULL for layer in range(model.num_layers))
    return Schedule(model=model, prefill=actions, decode=actions, origin={"criterion": "explicit"})


def satisfy_kv_contract(
    prefill: Sequence[LayerAction], decode: Sequence[LayerAction], *, single_turn: bool = False
) -> tuple[Actions, Actions]:
    """Add the K/V writes that a pair of phases needs and nothing else: SKIP becomes KV_ONLY, SKIP_ATTENTION becomes KV_MLP."""
    new_prefill = tuple(
        in_prefill.writing_kv() if in_decode.attends else in_prefill
        for in_prefill, in_decode in zip(prefill, decode, strict=True)
    )
    new_decode = tuple(
        in_decode.writing_kv() if in_prefill.attends and not single_turn else in_decode
        for in_prefill, in_decode in zip(prefill, decode, strict=True)
    )
    return new_prefill, new_decode


def read_schedule(path: Path) -> Schedule:
    document = artifacts.read_document(path, kind=KIND, version=VERSION)
    return Schedule.from_document(document, place=str(path))


def write_schedule(path: Path, schedule: Schedule, *, overwrite: bool = False) -> None:
    artifacts.write_file(path, artifacts.canonical_bytes(schedule.to_document()), overwrite=overwrite)


def schedule_hash(schedule: Schedule) -> str:
    """`sha256:<hex>` of the schedule's canonical bytes: of the file that `write_schedule` writes."""
    return "sha256:" + hashlib.sha256(artifacts.canonical_bytes(schedule.to_document())).hexdigest()
