"""How fast this machine reads memory and multiplies matrices at best: what no bundle can beat, measured in the same run.

Nobody knows the limit of a machine, so each rate is the best of several ways, each way the best of several tries. Memory is
read by as many threads as the sessions have, out of a buffer as large as what a step of decode reads (at most LARGEST_BUFFER),
so that what fits into a cache is judged by the speed of that cache. Matrices are multiplied by onnxruntime, on the threads and
the provider of the sessions; for packed matrices as they are packed, as whole numbers of 8 bits, and as floats, whichever is
fastest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from voidprune.execution.bindings import element_type
from voidprune.execution.manifest import Manifest
from voidprune.execution.node_writer import small_model
from voidprune.execution.providers import configured
from voidprune.models.packed import activation_dtype
from voidprune.models.tensors import numpy_dtype
from voidprune.quality.work import Work
from voidprune.schedule import Phase

Array = np.ndarray[Any, Any]

LARGEST_BUFFER = 2**29
"""Bytes: beyond this a buffer is in no cache, and what it is read with does not change."""
_LEAST_SECONDS = 0.01
"""For which a buffer is read again and again, so that starting threads does not count."""
_TRIES = 2
_SHAPES = ((512, 1024, 4096), (512, 2048, 2048), (512, 896, 4864))
"""Rows, inner and outer size of products: those of a prompt and a layer.

The last is of no powers of two, at which rows fall into the same places of a cache: on a Xeon (Cascade Lake) it is multiplied
at 249 GFLOP/s in float32, the others at 190.
"""
_CUDA_SHAPES = ((4096, 4096, 16384), (8192, 8192, 8192))


@dataclass(frozen=True)
class Rates:
    """What the machine does at best: bytes read a second, operations of matrix products a second, and by which way each."""

    bytes_per_second: Mapping[str, float]
    flops_per_second: Mapping[str, float]

    def seconds(self, work: Work) -> float:
        """The floor: nothing that has this work to do can take less."""
        return max(self.reading_seconds(work), self.multiplying_seconds(work))

    def reading_seconds(self, work: Work) -> float:
        return work.bytes / max(self.bytes_per_second.values())

    def multiplying_seconds(self, work: Work) -> float:
        return work.flops / max(self.flops_per_second.values())


class RateMeter:
    """Measures the rates of this machine for one bundle: prepared once, measured in every round.

    `step_bytes`: what a step of decode reads.
    """

    def __init__(self, manifest: Manifest, *, provider: str, threads: int | None, step_bytes: int) -> None:
        self._threads = threads or _num_cores()
        self._readers = (_cuda_readers if provider == "cuda" else _cpu_readers)(step_bytes, self._threads)
        self._products = _products(manifest, provider)

    def measure(self) -> Rates:
        return Rates(
            {name: max(read() for _ in range(_TRIES)) for name, read in self._readers.items()},
            {name: max(max(run() for run in runs) for _ in range(_TRIES)) for name, runs in self._products.items()},
        )


Measure = Callable[[], float]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- reading


def _cpu_readers(step_bytes: int, threads: int) -> Mapping[str, Measure]:
    """Reductions that look at every byte once, in numpy, which lets other threads run meanwhile."""
    size = max(threads * 4096, min(step_bytes, LARGEST_BUFFER)) // (threads * 64) * (threads * 64)
    buffer = np.empty(size, np.uint8)
    buffer.fill(1)  # memory that was never written to is one page of zeros, many times over
    ways: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
        "largest of 32 bits": (np.int32, np.max),
        "or of 64 bits": (np.uint64, np.bitwise_or.reduce),
        "dot product": (np.float32, lambda part: np.dot(part, part)),
    }
    pool = ThreadPoolExecutor(threads)

    def reader(dtype: Any, reduce: Callable[[Any], Any]) -> Measure:
        parts = np.array_split(buffer.view(dtype), threads)

        def read_once(part: Any, times: int) -> None:
            for _ in range(times):
                reduce(part)

        def measure() -> float:
            times, seconds = 1, 0.0
            while True:
                started = time.perf_counter()
                for done in [pool.submit(read_once, part, times) for part in parts]:
                    done.result()
                seconds = time.perf_counter() - started
                if seconds >= _LEAST_SECONDS:
                    return times * size / seconds
                times = max(times + 1, int(1.2 * times * _LEAST_SECONDS / max(seconds, 1e-9)))

        return measure

    return {name: reader(dtype, reduce) for name, (dtype, reduce) in ways.items()}


def _cuda_readers(step_bytes: int, _threads: int) -> Mapping[str, Measure]:
    """A sum of a buffer, and a copy, which reads and writes; timed by events of the device."""
    import torch

    events: Any = torch.cuda.Event  # without types
    size = max(2**24, min(step_bytes, 8 * LARGEST_BUFFER)) // 8
    buffer, target = (torch.ones(size, dtype=torch.float64, device="cuda") for _ in range(2))

    def measure(run: Callable[[], Any], num_bytes: int) -> float:
        start, end = events(enable_timing=True), events(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(num_bytes / (start.elapsed_time(end) / 1000))

    return {
        "sum": lambda: measure(buffer.sum, buffer.nbytes),
        "copy": lambda: measure(lambda: target.copy_(buffer), 2 * buffer.nbytes),
    }


# ---- multiplying


def _products(manifest: Manifest, provider: str) -> Mapping[str, Sequence[Measure]]:
    """Ways to multiply what a bundle multiplies, and for each some shapes."""
    shapes = _CUDA_SHAPES if provider == "cuda" else _SHAPES
    packed = manifest.quantization
    stored = manifest.dtype if packed is None else activation_dtype(packed.activations)
    floats = numpy_dtype(stored if provider == "cuda" else "F32").name
    found: dict[str, list[Measure]] = {floats: [_float_product(shape, floats, provider) for shape in shapes]}
    if packed is not None:
        in_blocks = not packed.multiplies_rows(Phase.DECODE)
        bits = {number for pair in packed.layer_bits for number in pair}
        for number in sorted(bits if in_blocks else ()):
            found[f"{number} bits in blocks of {packed.block_size}"] = [
                _packed_product(shape, number, packed.block_size, packed.activations, floats, provider)
                for shape in shapes
            ]
        if packed.activations == "int8" and provider == "cpu":
            found["8 by 8 bits"] = [_integer_product(shape) for shape in shapes]
    return found


def _float_product(shape: tuple[int, int, int], dtype: str, provider: str) -> Measure:
    import onnx

    rows, inner, outer = shape
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    return _timed_product(
        node, dtype, (rows, inner, outer), [_initializer("b", _noise((inner, outer), dtype))], provider
    )


def _packed_product(
    shape: tuple[int, int, int], bits: int, block_size: int, activations: str, dtype: str, provider: str
) -> Measure:
    import onnx

    rows, inner, outer = shape
    weight = _noise((outer, inner // block_size, block_size * bits // 8), "uint8")
    scales = _noise((outer, inner // block_size), dtype)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["a", "b", "scales"],
        ["c"],
        domain="com.microsoft",
        K=inner,
        N=outer,
        bits=bits,
        block_size=block_size,
        accuracy_level=4 if activations == "int8" else 0,
    )
    initializers = [_initializer("b", weight), _initializer("scales", scales)]
    return _timed_product(node, dtype, (rows, inner, outer), initializers, provider)


def _integer_product(shape: tuple[int, int, int]) -> Measure:
    import onnx

    rows, inner, outer = shape
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    weight = _initializer("b", _noise((inner, outer), "int8"))
    return _timed_product(node, "uint8", (rows, inner, outer), [weight], "cpu")


def _noise(shape: tuple[int, ...], dtype: str) -> Array:
    """Random numbers, over and over: a device multiplies zeros faster than anything else, for it takes less power."""
    random = np.random.default_rng(0).integers(-99, 100, 2**16)
    return np.resize((random if "int" in dtype else random / 100).astype(dtype), shape)


def _initializer(name: str, array: Array) -> Any:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())


def _timed_product(
    node: Any, dtype: str, shape: tuple[int, int, int], initializers: Sequence[Any], provider: str
) -> Measure:
    """Operations a second of a session with one product, whose factors and result stay on its device."""
    import onnx

    rows, inner, outer = shape
    factors = _noise((rows, inner), dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(factors.dtype)
    result = onnx.TensorProto.INT32 if node.op_type == "MatMulInteger" else kind
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("a", kind, [rows, inner])],
        [onnx.helper.make_tensor_value_info("c", result, [rows, outer])],
        list(initializers),
    )
    options = ort.SessionOptions()
    with contextlib.suppress(Fail):  # the process has its pool already
        ort.set_global_thread_pool_sizes(0, 1)
    options.use_per_session_threads = False
    session = ort.InferenceSession(small_model(graph), options, providers=[configured(provider)])
    binding = session.io_binding()
    # numpy's bfloat16 is not onnxruntime's, and its bits are nobody's.
    bits = factors.view(np.uint16) if factors.itemsize == 2 else factors
    factor = ort.OrtValue.ortvalue_from_numpy(bits, provider)
    binding.bind_input("a", provider, 0, element_type(factors.dtype), factor.shape(), factor.data_ptr())
    binding.bind_output("c", provider)
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()

    def measure() -> float:
        assert factor.has_value()  # it has to live as long as the binding
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return 2 * rows * inner * outer / (time.perf_counter() - started)

    return measure
