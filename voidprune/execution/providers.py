"""Opening onnxruntime sessions: threads, packing, one copy of the weights, and no silent fall-back to the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from voidprune.errors import RuntimeProviderError
from voidprune.execution.composition import PHASE_INPUT, compose_graphs
from voidprune.execution.detached_head import DetachedHead
from voidprune.execution.device_weights import DeviceWeights, can_load, load_device_weights, weight_ranges
from voidprune.execution.manifest import Manifest, packs_weights
from voidprune.execution.node_writer import small_model
from voidprune.schedule import Phase

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_COUNTING = frozenset({"Add", "Cast", "Concat", "Range", "ReduceSum", "Shape", "Squeeze", "Sub", "Unsqueeze"})
"""Operators by which a graph counts its tokens and says shapes: a few integers, which onnxruntime itself keeps on the CPU.

It has each of them for CUDA, too, in all types that a graph computes in, so none would be on the CPU for anything larger.
"""


@dataclass(frozen=True)
class OpenSessions:
    """What runs each phase; one session where both are one model or one graph.

    `choices` is what a session of both phases has to be told beside its other inputs: {PHASE_INPUT: whether it is prefill}.
    `last_only` says of which phases logits come for the last token alone. `scored_heads` and `head` are those of
    `composition.ComposedGraphs`. `weight_copies` is how often the weights are in the memory of the device. `device_bytes` is the
    memory that loading took there, weights and sessions together; None on the CPU and where nobody could measure it. `weights` is
    what the sessions point at: it has to live as long as they do. `captures`: steps of decode may be captured
    (`device_bindings.py`).
    """

    by_phase: Mapping[Phase, ort.InferenceSession]
    choices: Mapping[Phase, Mapping[str, Array]]
    last_only: Mapping[Phase, bool]
    scored_heads: int
    head: DetachedHead | None
    weight_copies: int
    device_bytes: int | None
    weights: DeviceWeights | None
    captures: bool = False


def open_sessions(
    folder: Path, manifest: Manifest, *, provider: str, prepack: bool = True, as_exported: bool = False
) -> OpenSessions:
    """Open every graph of a bundle on a provider. Raises RuntimeProviderError.

    On the CPU both graphs are opened as one model, so that onnxruntime packs the weights once for both; without `prepack`
    float32 weights stay pages of their file, which opens at once and decodes more slowly. Packed bits (int4, int8) are always
    laid out: their kernels are made for nothing else. `as_exported` is that of `composition.compose_graphs`. On CUDA every session
    would copy its weights to the device, so they are loaded there once and lent to all sessions; that takes torch.
    """
    graphs = {phase: folder / graph.file for phase, graph in manifest.graphs.items()}
    if provider != "cpu":
        return _open_on_device(graphs, provider=provider)
    packed = manifest.quantization
    if packed is not None and packed.multiplies_rows(Phase.PREFILL) and manifest.operators == "ort":
        require_integer_products(folder.name)
    is_widened = packed is None and packs_weights(manifest.dtype, quantized=False)
    prepack = prepack or is_widened or packed is not None
    is_pair = len(set(graphs.values())) > 1
    # Weights in 16 bits are widened before they are packed, and a branch would widen those from outside at every step.
    if prepack and is_pair and not is_widened:
        composed = compose_graphs(graphs[Phase.PREFILL], graphs[Phase.DECODE], as_exported=as_exported)
        session = open_session(composed.model.SerializeToString(), folder, provider=provider, prepack=True)
        branches = {branch.g.name: branch.g for branch in composed.model.graph.node[-1].attribute}
        return OpenSessions(
            by_phase=dict.fromkeys(Phase, session),
            choices={phase: {PHASE_INPUT: np.array(phase is Phase.PREFILL)} for phase in Phase},
            last_only={phase: _is_last_only(branches[str(phase)].output[0]) for phase in Phase},
            scored_heads=composed.scored_heads,
            head=composed.head,
            weight_copies=1,
            device_bytes=None,
            weights=None,
        )
    opened = {path: open_session(path, folder, provider=provider, prepack=prepack) for path in set(graphs.values())}
    return _apart(graphs, opened, weight_copies=len(opened) if prepack else 1)


def _open_on_device(graphs: Mapping[Phase, Path], *, provider: str) -> OpenSessions:
    before = _free_device_bytes()
    weights = None
    paths = sorted(set(graphs.values()))
    if provider == "cuda":
        refuse_softcap(paths)
    if can_load(provider):
        weights = load_device_weights({path.name: weight_ranges(path) for path in paths}, device=provider)
    lent = {} if weights is None else weights.values
    opened, captures = {}, False
    for path in paths:
        open_lent = functools.partial(open_session, path, path.parent, provider=provider, weights=lent.get(path.name))
        if path == graphs[Phase.DECODE] and weights is not None:
            with contextlib.suppress(_NotCapturedError):
                opened[path], captures = open_lent(captures=True), True
        if path not in opened:
            opened[path] = open_lent()
    after = _free_device_bytes()
    separate = _apart(
        graphs,
        opened,
        weight_copies=len(paths) if weights is None else 1,
        device_bytes=None if before is None or after is None else before - after,
        weights=weights,
    )
    return replace(separate, captures=captures)


def refuse_softcap(graphs: Iterable[Path]) -> None:
    """Raise RuntimeProviderError for attention whose scores are capped (Gemma 2), which would be answered a little wrongly.

    onnxruntime 1.31 leaves the cap out on CUDA, in `GroupQueryAttention` as in the standard's `Attention`: docs/results.md.
    """
    import onnx

    for graph in graphs:
        for node in onnx.load(graph, load_external_data=False).graph.node:
            if any(attribute.name == "softcap" and attribute.f for attribute in node.attribute):
                raise RuntimeProviderError(
                    f"{graph.name} caps attention scores, and onnxruntime leaves that out on CUDA",
                    hint="use --provider cpu",
                )


class _NotCapturedError(RuntimeProviderError):
    """A graph that moves numbers between device and host cannot be captured: those of older exports do."""


def _apart(
    graphs: Mapping[Phase, Path],
    opened: Mapping[Path, ort.InferenceSession],
    *,
    weight_copies: int,
    device_bytes: int | None = None,
    weights: DeviceWeights | None = None,
) -> OpenSessions:
    """A session a graph."""
    return OpenSessions(
        by_phase={phase: opened[path] for phase, path in graphs.items()},
        choices={phase: {} for phase in graphs},
        last_only={phase: opened[path].get_outputs()[0].shape[1] == 1 for phase, path in graphs.items()},
        scored_heads=0,
        head=None,
        weight_copies=weight_copies,
        device_bytes=device_bytes,
        weights=weights,
    )


def _is_last_only(logits: onnx.ValueInfoProto) -> bool:
    return bool(logits.type.tensor_type.shape.dim[1].dim_value == 1)


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


def open_session(
    graph: Path | bytes,
    folder: Path,
    *,
    provider: str = "cpu",
    prepack: bool = True,
    weights: Mapping[str, ort.OrtValue] | None = None,
    captures: bool = False,
) -> ort.InferenceSession:
    """`graph`: a file of the bundle in `folder`, or a model in memory whose weights lie there. Raises RuntimeProviderError.

    `weights` are initializers that are lent: they have to live as long as the session. With `captures`, runs are captured as CUDA
    graphs, unless their options say otherwise.
    """
    name = graph.name if isinstance(graph, Path) else folder.name
    options = ort.SessionOptions()
    options.log_severity_level = 4 if captures else 3  # that it cannot is no error
    with contextlib.suppress(Fail):  # the process has its pool already
        ort.set_global_thread_pool_sizes(0, 1)
    options.use_per_session_threads = False
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if isinstance(graph, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider == "cuda":
        ort.preload_dlls()
    for initializer, value in (weights or {}).items():
        options.add_initializer(initializer, value)
    wanted = PROVIDERS[provider]
    providers = [configured(provider, captures=captures), *([] if provider == "cpu" else [PROVIDERS["cpu"]])]
    try:
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's errors share no narrower public base class
        reason = str(error).strip().splitlines()[0]
        if captures and "graph capture" in reason:
            raise _NotCapturedError(reason) from error
        hint = "export the model again, or upgrade onnxruntime: voidprune is developed with 1.31"
        if provider == "cpu" and "NOT_IMPLEMENTED" in reason:
            hint = "onnxruntime has no bf16 kernels for the CPU: export with --precision fp32, or use --provider cuda"
        raise RuntimeProviderError(f"onnxruntime cannot load {name} on {provider}: {reason}", hint=hint) from error
    session._model_bytes = None  # kept for a fall-back, which is off: of a head in 8 bits, hundreds of megabytes
    if session.get_providers()[0] != wanted:  # onnxruntime falls back to the CPU with a log line only
        raise RuntimeProviderError(
            f"onnxruntime has no working {wanted} here", hint="pip install 'voidprune[cuda]', or use --provider cpu"
        )
    if strays := stray_operators(session, wanted=wanted):
        raise RuntimeProviderError(
            f"onnxruntime would run {', '.join(strays)} of {name} on the CPU, not on {provider}",
            hint="export in another precision (of packed matrices: with --activations fp16), or use --provider cpu",
        )
    return session


def configured(provider: str, *, captures: bool = False) -> str | tuple[str, dict[str, str]]:
    """A provider with its options, as a session takes it.

    On CUDA, float32 stays float32 (by default it is multiplied in TF32, which has 10 bits of its 23), and the arena takes what is
    asked for (by default the next power of two).
    """
    if provider == "cpu":
        return PROVIDERS[provider]
    options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": str(int(captures))}
    return PROVIDERS[provider], options


def require_integer_products(name: str) -> None:
    """Raise RuntimeProviderError where products of 8-bit numbers overflow.

    x86 processors without VNNI add two of them up in 16 bits and keep what fits (onnxruntime, docs: "Quantize ONNX models", "When
    and why do I need to try U8U8?"); a model that is run so answers, and wrongly.
    """
    if _integer_product() != _INTEGER_PRODUCT:
        raise RuntimeProviderError(
            f"{name} multiplies numbers of 8 bits, and this processor's products of them overflow",
            hint="export with --precision int8, which multiplies otherwise",
        )


_INNER = 64
_INTEGER_PRODUCT = float(_INNER * 127 * 127)


def _integer_product() -> float:
    """The largest activations times the largest weights, by the operator that multiplies rows."""
    import onnx

    arrays: dict[str, Array] = {
        "one": np.array(1, np.float32),
        "middle": np.array(128, np.uint8),
        "weights": np.full((16, _INNER), 127, np.int8),
        "scales": np.ones(16, np.float32),
        "zeros": np.zeros(16, np.int8),
    }
    node = onnx.helper.make_node("QGemm", ["value", "one", "middle", *list(arrays)[2:]], ["product"], transB=1)
    node.domain = "com.microsoft"
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("value", onnx.TensorProto.UINT8, [1, _INNER])],
        [onnx.helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, [1, 16])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    session = open_session(small_model(graph), Path())
    (product,) = session.run(None, {"value": np.full((1, _INNER), 255, np.uint8)})
    return float(product[0, 0])


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
