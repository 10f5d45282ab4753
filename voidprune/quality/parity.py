"""Does an export equal its reference? Logits of prefill, decode steps and a second turn, at batch 1 and 2.

The reference is the *source* model under the schedule; compared with it are the slim checkpoint in stock transformers under
the renumbered schedule, and the graphs under onnxruntime. All are driven with the same token ids, so that one difference does
not hide the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from voidprune.errors import ParityError
from voidprune.execution.manifest import Parity, read_manifest
from voidprune.execution.reference import ScheduledModel, decode_mask, scheduled
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import open_checkpoint, precision_name
from voidprune.models.pretrained import load_model
from voidprune.schedule import Schedule

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits that counts as equal."""


@dataclass(frozen=True)
class Script:
    """Token ids to drive a model with: `first_BT`, then the columns of `steps_BK` one by one, then `second_BU`."""

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


def run_reference(model: ScheduledModel, script: Script) -> Array:
    """Logits after the prompt, after each step, and after the second turn, [2 + K, B, V], cached as a runtime would."""
    boundary, cache, logits = model.schedule.boundary, DynamicCache(), []

    def advance(tokens_BT: Array, is_decode: list[bool]) -> None:
        ids_BT = torch.from_numpy(tokens_BT)
        is_decode_BT = torch.tensor(is_decode).expand_as(ids_BT)
        step = model.forward(ids_BT, is_decode_BT=is_decode_BT, cache=cache, last_only=True)
        logits.append(step[:, -1].float().cpu().numpy())

    num_first, num_second = script.first_BT.shape[1], script.second_BU.shape[1]
    advance(script.first_BT, decode_mask(num_first, num_first, boundary))
    for column in range(script.steps_BK.shape[1]):
        advance(script.steps_BK[:, column : column + 1], [True])
    if not model.schedule.single_turn:
        advance(script.second_BU, decode_mask(num_second, num_second, boundary))
    return np.stack(logits)


def run_session(session: BundleSession, script: Script) -> Array:
    """The same, by onnxruntime."""
    widths = (script.first_BT.shape[1], script.steps_BK.shape[1], script.second_BU.shape[1])
    conversation = session.start(len(script.first_BT), max_positions=sum(widths))
    logits = [conversation.prefill(script.first_BT.tolist())]
    for column in range(script.steps_BK.shape[1]):
        logits.append(conversation.decode(script.steps_BK[:, column : column + 1])[:, -1])
    if not session.manifest.schedule.single_turn:
        logits.append(conversation.prefill(script.second_BU.tolist()))
    return np.stack(logits).astype(np.float32)


def check_bundle(
    folder: Path, *, source: PreTrainedModel, schedule: Schedule, provider: str = "cpu", seed: int = 0
) -> Parity:
    """Compare a staged or finished bundle with its source. Raises ParityError, saying what differs and by how much.

    In float32 all differences stay within TOLERANCE. In 16 bits two right answers differ with the order of sums, so there the
    graphs are compared with the slim checkpoint run in float32, and may be twice as far from it as torch is when it runs the
    same weights in 16 bits. The source is loaded by the caller, in the dtype of the bundle, because it may serve several checks.
    """
    manifest = read_manifest(folder)
    slim = open_checkpoint(folder)
    renumbered = schedule.on_slim_model(slim.identity)
    device = str(source.device)
    scripts = make_scripts(slim.architecture.vocab_size, seed=seed, context_length=slim.architecture.context_length)

    if not scripts:
        raise ParityError(f"a context of {slim.architecture.context_length} tokens is too short to verify anything")

    def run_slim(dtype: str) -> list[Array]:
        with scheduled(load_model(folder, dtype=dtype, device=device), renumbered) as copy:
            return [run_reference(copy, script) for script in scripts]

    with scheduled(source, schedule) as reference:
        expected = [run_reference(reference, script) for script in scripts]
    stored = run_slim(precision_name(manifest.dtype))
    truth, tolerance = expected, TOLERANCE
    if manifest.dtype != "F32":
        truth = run_slim("fp32")
        tolerance = 2 * _largest_difference(stored, truth)
        if not np.isfinite(tolerance):
            raise ParityError(
                f"the weights in {manifest.dtype} give logits that are not finite", hint="export with --precision fp32"
            )
    hf = _largest_difference(stored, expected)
    _require(hf, tolerance, what="the slim checkpoint in transformers")
    onnx = None
    if manifest.graphs:
        session = BundleSession(folder, provider=provider)
        onnx = _largest_difference([run_session(session, script) for script in scripts], truth)
        _require(onnx, tolerance, what=f"the ONNX graphs on {provider}")
    return Parity(
        hf=hf,
        onnx=onnx,
        tolerance=tolerance,
        num_prompts=len(scripts),
        num_decode_steps=scripts[0].steps_BK.shape[1],
    )


def _largest_difference(one: Sequence[Array], other: Sequence[Array]) -> float:
    return max(float(np.abs(first - second).max()) for first, second in zip(one, other, strict=True))


def _require(difference: float, tolerance: float, *, what: str) -> None:
    if not difference <= tolerance:  # NaN fails too
        raise ParityError(
            f"the logits of {what} differ from the reference by {difference:.3g}; allowed is {tolerance:.3g}"
        )
