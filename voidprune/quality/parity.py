"""Does an export equal its reference? Logits of prefill, decode steps and a second turn, at batch 1 and 2.

The reference is the *source* model under the schedule; compared with it are the slim checkpoint in stock transformers under
the renumbered schedule, and the graphs under onnxruntime. All are driven with the same token ids, so that one difference does
not hide the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
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
from voidprune.models.checkpoint import Checkpoint, open_checkpoint, precision_name, stored_bytes
from voidprune.models.pretrained import load_model
from voidprune.quality.layer_streaming import largest_part, streamed_model
from voidprune.schedule import Schedule

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-4
"""Largest absolute difference of float32 logits that counts as equal."""
_HEADROOM = 1.25
"""Memory that a model takes while it runs, per byte of its weights."""


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
    if script.second_BU.size and not session.manifest.schedule.single_turn:
        logits.append(conversation.prefill(script.second_BU.tolist()))
    return np.stack(logits).astype(np.float32)


def verify_bundle(
    folder: Path,
    *,
    source: Checkpoint,
    schedule: Schedule,
    provider: str = "cpu",
    seed: int = 0,
    available_bytes: int | None = None,
) -> Parity:
    """Compare a staged bundle with the checkpoint that it was made of, in as much memory as there is.

    Source and copy are never in memory together. Where one of them does not fit into `available_bytes` (by default what the
    machine has free), or only the kept layers of the source are on this disk, decoder layers are loaded one at a time.
    Raises ParityError, ModelError.
    """
    device = "cuda" if provider == "cuda" else "cpu"
    dtype = read_manifest(folder).dtype
    if available_bytes is None:
        available_bytes = free_memory(device)
    needed = max(_loaded_bytes(source, dtype), _loaded_bytes(open_checkpoint(folder), "F32"))
    if source.revision is None and needed * _HEADROOM <= available_bytes:
        return _check_whole(
            folder,
            lambda: load_model(source.folder, dtype=precision_name(dtype), device=device),
            schedule=schedule,
            provider=provider,
            seed=seed,
        )
    if (part := largest_part(source)) * _HEADROOM > available_bytes:
        raise ParityError(
            f"one layer of {source.name} takes {part:,} bytes in float32; {available_bytes:,} are free",
            hint="nothing unverified is published: export on a machine with more memory",
        )
    return check_layers(folder, source=source, schedule=schedule, provider=provider, seed=seed)


def _loaded_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(stored_bytes(record, dtype) for record in checkpoint.tensors.values())


def free_memory(device: str) -> int:
    """Bytes that a model may take on a device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    status = Path("/proc/meminfo")
    if status.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_layers(
    folder: Path, *, source: Checkpoint, schedule: Schedule, provider: str = "cpu", seed: int = 0
) -> Parity:
    """Compare a bundle with its source, one decoder layer in memory at a time.

    One pass over prompts and responses in which every token runs the actions of its phase equals prefill and cached decode (a
    test of `execution/reference.py`), so each side is read once. Both are run in float32, with the weights as the bundle stores
    them. Layers that run in neither phase are left out, and need not be there. Raises ParityError.
    """
    manifest, slim = read_manifest(folder), open_checkpoint(folder)
    renumbered = schedule.on_slim_model(slim.identity)
    device = "cuda" if provider == "cuda" else "cpu"
    context = slim.architecture.context_length
    lengths = [length for length in (1, 2, 9, 13) if length + 4 <= context]
    if not lengths:
        raise ParityError(f"a context of {context} tokens is too short to verify anything")
    width = max(lengths) + 4
    tokens_BT = np.random.default_rng(seed).integers(0, slim.architecture.vocab_size, (len(lengths), width))
    is_decode_BT = torch.tensor([decode_mask(length, width, schedule.boundary) for length in lengths])

    def run(checkpoint: Checkpoint, actions: Schedule, *, dtype: str = "F32") -> Array:
        dropped = set(range(actions.num_layers)) - set(actions.union)
        with (
            streamed_model(checkpoint, through=manifest.dtype, dtype=dtype, device=device, dropped=dropped) as model,
            scheduled(model, actions) as running,
        ):
            logits_BTV = running.forward(torch.from_numpy(tokens_BT), is_decode_BT=is_decode_BT)
        return np.asarray(logits_BTV.float().cpu().numpy())

    expected_BTV = run(source, schedule)
    _require_finite([expected_BTV], name=source.name)
    hf = _largest_difference([run(slim, renumbered)], [expected_BTV])
    _require(hf, TOLERANCE, what="the slim checkpoint in transformers")
    onnx, tolerance = None, TOLERANCE
    if manifest.graphs:
        if manifest.dtype != "F32":
            stored_BTV = run(slim, renumbered, dtype=manifest.dtype)
            tolerance = max(TOLERANCE, 2 * _largest_difference([stored_BTV], [expected_BTV]))
        session = BundleSession(folder, provider=provider)
        differences = []
        for row, length in enumerate(lengths):
            row_BT = tokens_BT[row : row + 1]
            script = Script(row_BT[:, :length], row_BT[:, length:], row_BT[:, :0])
            found_KV = run_session(session, script)[:, 0]
            differences.append(_largest_difference([found_KV], [expected_BTV[row, length - 1 :]]))
        onnx = max(differences)
        _require(onnx, tolerance, what=f"the ONNX graphs on {provider}")
    return Parity(
        hf=hf, onnx=onnx, tolerance=tolerance, num_prompts=len(lengths), num_decode_steps=4, layer_streamed=True
    )


def check_bundle(
    folder: Path, *, source: PreTrainedModel, schedule: Schedule, provider: str = "cpu", seed: int = 0
) -> Parity:
    """`verify_bundle` with a source that is loaded already, in the dtype of the bundle, because it serves several checks."""
    return _check_whole(folder, lambda: source, schedule=schedule, provider=provider, seed=seed)


def _check_whole(
    folder: Path, load_source: Callable[[], PreTrainedModel], *, schedule: Schedule, provider: str, seed: int
) -> Parity:
    """Raises ParityError, saying what differs and by how much.

    In float32 all differences stay within TOLERANCE. In 16 bits two right answers differ with the order of sums, so there the
    graphs are compared with the slim checkpoint run in float32, and may be twice as far from it as torch is when it runs the
    same weights in 16 bits.
    """
    manifest = read_manifest(folder)
    slim = open_checkpoint(folder)
    renumbered = schedule.on_slim_model(slim.identity)
    scripts = make_scripts(slim.architecture.vocab_size, seed=seed, context_length=slim.architecture.context_length)
    if not scripts:
        raise ParityError(f"a context of {slim.architecture.context_length} tokens is too short to verify anything")

    def run_source() -> tuple[list[Array], str]:
        source = load_source()
        with scheduled(source, schedule) as reference:
            return [run_reference(reference, script) for script in scripts], str(source.device)

    def run_slim(dtype: str) -> list[Array]:
        with scheduled(load_model(folder, dtype=dtype, device=device), renumbered) as copy:
            return [run_reference(copy, script) for script in scripts]

    expected, device = run_source()  # and the source is out of memory again, where nobody else holds it
    if manifest.dtype == "F32":
        _require_finite(expected, name=manifest.source)
    stored = run_slim(precision_name(manifest.dtype))
    truth, tolerance = expected, TOLERANCE
    if manifest.dtype != "F32":
        truth = run_slim("fp32")
        tolerance = 2 * _largest_difference(stored, truth)
        if not np.isfinite(tolerance):
            raise ParityError(
                f"the weights in {manifest.dtype} give logits that are not finite",
                hint="export with --precision fp32; if that says so too, it is the source",
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


def _require_finite(expected: Sequence[Array], *, name: str) -> None:
    if not all(np.isfinite(logits).all() for logits in expected):
        raise ParityError(
            f"the logits of {name} itself are not finite, so nothing can be compared with them",
            hint="nothing was published; its weights hold NaN or infinity, or were made for another config.json",
        )


def _require(difference: float, tolerance: float, *, what: str) -> None:
    if not difference <= tolerance:  # NaN fails too
        raise ParityError(
            f"the logits of {what} differ from the reference by {difference:.3g}; allowed is {tolerance:.3g}"
        )
