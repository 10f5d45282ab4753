"""Opening onnxruntime sessions: threads, packing, one copy of the weights, and no silent fall-back to the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from voidprune.errors import RuntimeProviderError
from voidprune.execution.device_weights import DeviceWeights, can_load, load_device_weights, weight_ranges
from voidprune.execution.manifest import Manifest, packs_weights

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_COUNTING = frozenset({"Add", "Cast", "Range", "ReduceSum", "Shape", "Squeeze", "Sub", "Unsqueeze"})
"""Operators by which a graph counts its tokens: a few integers, which onnxruntime itself keeps on the CPU."""


@dataclass(frozen=True)
class OpenSessions:
    """The sessions of some graphs, by file name.

    `weight_copies` is how often the weights are in the memory of the device. `device_bytes` is the memory that loading took
    there, weights and sessions together; None on the CPU and where nobody could measure it. `weights` is what the sessions
    point at: it has to live as long as they do.
    """

    by_file: Mapping[str, ort.InferenceSession]
    weight_copies: int
    device_bytes: int | None
    weights: DeviceWeights | None


def open_sessions(folder: Path, manifest: Manifest, *, provider: str) -> OpenSessions:
    """Open every graph of a bundle on a provider. Raises RuntimeProviderError.

    On the CPU onnxruntime maps the weight files, and sessions that do not pack share those pages. On CUDA every session would
    copy its weights to the device, so they are loaded there once and lent to all sessions; that takes torch.
    """
    files = sorted({graph.file for graph in manifest.graphs.values()})
    packs = packs_weights(manifest.dtype, quantized=manifest.quantization is not None)
    if provider == "cpu":
        sessions = {name: _open_session(folder / name, provider=provider, packs=packs) for name in files}
        return OpenSessions(sessions, len(files) if packs else 1, None, None)
    before = _free_device_bytes()
    weights = None
    if can_load(provider):
        weights = load_device_weights({name: weight_ranges(folder / name) for name in files}, device=provider)
    lent = {} if weights is None else weights.values
    sessions = {
        name: _open_session(folder / name, provider=provider, packs=packs, weights=lent.get(name)) for name in files
    }
    after = _free_device_bytes()
    taken = None if before is None or after is None else before - after
    return OpenSessions(sessions, len(files) if weights is None else 1, taken, weights)


def size_thread_pool(threads: int) -> None:
    """Set how many threads all sessions of this process share; by default onnxruntime takes one a core.

    Two sessions with pools of their own would fight for the cores, because a pool that waits for work spins. Raises
    RuntimeProviderError once a session was opened: then the pool is there.
    """
    try:
        ort.set_global_thread_pool_sizes(threads, 1)
    except Fail as error:
        raise RuntimeProviderError(
            "onnxruntime has its threads already", hint="set their number before the first session is opened"
        ) from error


def _open_session(
    path: Path, *, provider: str, packs: bool, weights: Mapping[str, ort.OrtValue] | None = None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with contextlib.suppress(Fail):  # the process has its pool already
        ort.set_global_thread_pool_sizes(0, 1)
    options.use_per_session_threads = False
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "cpu" and not packs:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider == "cuda":
        ort.preload_dlls()
    for name, value in (weights or {}).items():
        options.add_initializer(name, value)
    wanted = PROVIDERS[provider]
    providers = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's errors share no narrower public base class
        reason = str(error).strip().splitlines()[0]
        hint = "export the model again, or upgrade onnxruntime: voidprune is developed with 1.31"
        if provider == "cpu" and "NOT_IMPLEMENTED" in reason:
            hint = "onnxruntime has no bf16 kernels for the CPU: export with --precision fp32, or use --provider cuda"
        raise RuntimeProviderError(f"onnxruntime cannot load {path.name} on {provider}: {reason}", hint=hint) from error
    if session.get_providers()[0] != wanted:  # onnxruntime falls back to the CPU with a log line only
        raise RuntimeProviderError(
            f"onnxruntime has no working {wanted} here", hint="pip install 'voidprune[cuda]', or use --provider cpu"
        )
    if strays := stray_operators(session, wanted=wanted):
        raise RuntimeProviderError(
            f"onnxruntime would run {', '.join(strays)} of {path.name} on the CPU, not on {provider}",
            hint="export in another precision, or use --provider cpu",
        )
    return session


def stray_operators(session: ort.InferenceSession, *, wanted: str) -> Sequence[str]:
    """The operators of a session that another provider than `wanted` runs, but for the counting of tokens.

    The session was opened with `session.record_ep_graph_assignment_info`. Its sharper sister, `session.disable_cpu_ep_fallback`,
    refuses every graph that counts anything, because it knows no exception for integers.
    """
    elsewhere = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != wanted
        for node in part.get_nodes()
    }
    return sorted(elsewhere - _COUNTING)


def _free_device_bytes() -> int | None:
    if not can_load("cuda"):
        return None
    import torch

    return int(torch.cuda.mem_get_info()[0])
