"""The same token ids for a model in torch and for graphs in onnxruntime, and how far apart their logits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache

from voidprune.errors import ParityError
from voidprune.execution.reference import ScheduledModel, decode_mask
from voidprune.execution.rounded_cache import MakeCache
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import Checkpoint
from voidprune.schedule import Boundary

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits that counts as equal."""


@dataclass(frozen=True)
class Script:
    """Token ids to drive a model with: `first_BT`, then the columns of `steps_BK` one by one, then `second_BU` if not empty."""

    first_BT: Array
    steps_BK: Array
    second_BU: Array


def make_scripts(
    vocab_size: int, *, seed: int = 0, num_steps: int = 4, lengths: Sequence[int] = (1, 2, 13), context_length: int
) -> list[Script]:
    """Random token ids: prompts of each length at batch 1 and 2, and a second turn of three tokens."""
    random = np.random.default_rng(seed)
    scripts = []
    for rows in (1, 2):
        for length in lengths:
            if length + num_steps + 3 <= context_length:
                shapes = [(rows, length), (rows, num_steps), (rows, 3)]
                scripts.append(Script(*(random.integers(0, vocab_size, shape) for shape in shapes)))
    return scripts


def run_reference(model: ScheduledModel, script: Script, make_cache: MakeCache = DynamicCache) -> Array:
    """Logits after the prompt, after each step, and after the second turn, [2 + K, B, V], cached as a runtime would."""
    boundary, cache, logits = model.schedule.boundary, make_cache(), []

    def advance(tokens_BT: Array, is_decode: list[bool]) -> None:
        ids_BT = torch.from_numpy(tokens_BT)
        is_decode_BT = torch.tensor(is_decode).expand_as(ids_BT)
        step = model.forward(ids_BT, is_decode_BT=is_decode_BT, cache=cache, last_only=True)
        logits.append(step[:, -1].float().cpu().numpy())

    num_first, num_second = script.first_BT.shape[1], script.second_BU.shape[1]
    advance(script.first_BT, decode_mask(num_first, num_first, boundary))
    for column in range(script.steps_BK.shape[1]):
        advance(script.steps_BK[:, column : column + 1], [True])
    if num_second and not model.schedule.single_turn:
        advance(script.second_BU, decode_mask(num_second, num_second, boundary))
    return np.stack(logits)


def run_session(session: BundleSession, script: Script) -> Array:
    """The same, by onnxruntime."""
    widths = (script.first_BT.shape[1], script.steps_BK.shape[1], script.second_BU.shape[1])
    conversation = session.start(len(script.first_BT), max_positions=sum(widths))
    logits = [conversation.prefill(script.first_BT.tolist())]
    for column in range(script.steps_BK.shape[1]):
        logits.append(conversation.decode(script.steps_BK[:, column : column + 1])[:, -1])
    if script.second_BU.size and not session.manifest.schedule.single_turn:
        logits.append(conversation.prefill(script.second_BU.tolist()))
    return np.stack(logits).astype(np.float32)


class Drive(Protocol):
    """The same tokens for a model in torch and for graphs: both give logits at the same places."""

    @property
    def counts(self) -> dict[str, Any]:
        """What `Parity` says of it."""

    def run_reference(self, model: ScheduledModel, make_cache: MakeCache | None = None) -> list[Array]:
        """`make_cache`: for one that changes what it is given."""

    def run_session(self, session: BundleSession) -> list[Array]: ...


@dataclass(frozen=True)
class Cached:
    """Prompts, decode steps and a second turn, with a cache as a runtime would have it."""

    scripts: Sequence[Script]
    layer_streamed: bool = False

    @classmethod
    def choose(cls, slim: Checkpoint, *, seed: int) -> Cached:
        context_length = slim.architecture.context_length
        scripts = make_scripts(slim.architecture.vocab_size, seed=seed, context_length=context_length)
        if not scripts:
            raise ParityError(f"a context of {context_length} tokens is too short to verify anything")
        return cls(scripts)

    @property
    def counts(self) -> dict[str, Any]:
        return {
            "num_prompts": len(self.scripts),
            "num_decode_steps": self.scripts[0].steps_BK.shape[1],
            "layer_streamed": self.layer_streamed,
        }

    def run_reference(self, model: ScheduledModel, make_cache: MakeCache | None = None) -> list[Array]:
        return [run_reference(model, script, make_cache or DynamicCache) for script in self.scripts]

    def run_session(self, session: BundleSession) -> list[Array]:
        return [run_session(session, script) for script in self.scripts]


@dataclass(frozen=True)
class OnePass:
    """Prompts of `lengths` and responses, one a row: in torch one pass without a cache, which reads every weight once."""

    tokens_BT: Array
    lengths: Sequence[int]
    boundary: Boundary

    @classmethod
    def choose(cls, slim: Checkpoint, boundary: Boundary, *, seed: int) -> OnePass:
        context = slim.architecture.context_length
        lengths = [length for length in (1, 2, 9, 13) if length + 4 <= context]
        if not lengths:
            raise ParityError(f"a context of {context} tokens is too short to verify anything")
        shape = (len(lengths), max(lengths) + 4)
        return cls(np.random.default_rng(seed).integers(0, slim.architecture.vocab_size, shape), lengths, boundary)

    @property
    def counts(self) -> dict[str, Any]:
        return {"num_prompts": len(self.lengths), "num_decode_steps": 4, "layer_streamed": True}

    def run_reference(self, model: ScheduledModel, make_cache: MakeCache | None = None) -> list[Array]:
        width = self.tokens_BT.shape[1]
        is_decode_BT = torch.tensor([decode_mask(length, width, self.boundary) for length in self.lengths])
        cache = None if make_cache is None else make_cache()
        found_BTV = model.forward(torch.from_numpy(self.tokens_BT), is_decode_BT=is_decode_BT, cache=cache)
        logits_BTV = found_BTV.float().cpu().numpy()
        return [logits_BTV[row, length - 1 :] for row, length in enumerate(self.lengths)]

    def in_phases(self) -> Cached:
        """The shortest and the longest of the prompts with some of their responses, token by token and with a cache: for a
        reference that is read anew for each, because its phases have weights of their own."""
        scripts = []
        for row in sorted({0, len(self.lengths) - 1}):
            row_BT, length = self.tokens_BT[row : row + 1], self.lengths[row]
            scripts.append(Script(row_BT[:, :length], row_BT[:, length : length + 2], row_BT[:, :0]))
        return Cached(scripts, layer_streamed=True)

    def run_session(self, session: BundleSession) -> list[Array]:
        found = []
        for row, length in enumerate(self.lengths):
            row_BT = self.tokens_BT[row : row + 1]
            found.append(run_session(session, Script(row_BT[:, :length], row_BT[:, length:], row_BT[:, :0]))[:, 0])
        return found


def largest_difference(one: Sequence[Array], other: Sequence[Array]) -> float:
    """Largest absolute difference of a logit."""
    return max(float(np.abs(first - second).max()) for first, second in zip(one, other, strict=True))


def require_finite(expected: Sequence[Array], *, name: str) -> None:
    """Raise ParityError where the reference itself gives logits that are not finite."""
    if not all(np.isfinite(logits).all() for logits in expected):
        raise ParityError(
            f"the logits of {name} itself are not finite, so nothing can be compared with them",
            hint="nothing was published; its weights hold NaN or infinity, or were made for another config.json",
        )


def require_finite_tolerance(tolerance: float, *, dtype: str, hint: str) -> None:
    """Raise ParityError where torch, run in 16 bits, gives logits that are not finite: then nothing says what is allowed."""
    if not np.isfinite(tolerance):
        raise ParityError(f"the weights in {dtype} give logits that are not finite", hint=hint)


def require(difference: float, tolerance: float, *, what: str) -> None:
    """Raise ParityError where a difference is not within its tolerance."""
    if not difference <= tolerance:  # NaN fails too
        raise ParityError(
            f"the logits of {what} differ from the reference by {difference:.3g}; allowed is {tolerance:.3g}"
        )
