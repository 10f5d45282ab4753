"""What a session reads and writes, bound once: arrays on the host are written in place for as long as their shapes stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from voidprune.execution.row_lengths import MASK

Array = np.ndarray[Any, Any]


class HostBinding:
    """An `IOBinding` whose small inputs, and whose result, lie on the host.

    Elsewhere than on the CPU, onnxruntime copies an input when it is bound (1.31: IOBinding::BindInput), so there each is bound
    anew; where torch has the device, `device_bindings.py` leaves them there.
    """

    def __init__(self, session: ort.InferenceSession, *, on_cpu: bool) -> None:
        self.bound = session.io_binding()
        self._session, self._on_cpu = session, on_cpu
        self._inputs: dict[str, Array] = {}
        self._result: Array | None = None

    def feed(self, name: str, array: Array) -> None:
        """An input of whole numbers, which are copied."""
        known = self._inputs.get(name)
        if known is not None and known.shape == array.shape and self._on_cpu:
            known[...] = array
            return
        self._inputs.pop(name, None)  # whatever interrupts this, nothing is written to that is not bound
        copied = array.astype(np.int64, order="C")
        self.bound.bind_cpu_input(name, copied)
        self._inputs[name] = copied

    def feed_mask(self, lengths: Sequence[int], width: int) -> None:
        """MASK, [B, `width`]: ones for the tokens of each row."""
        self.feed(MASK, np.arange(width) < np.array(lengths)[:, np.newaxis])

    def bind_result(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], *, reuse: bool) -> Array:
        """Where the result will be. With `reuse` that is where it was before: new memory of some size costs more than its use."""
        result = self._result
        if reuse and result is not None and result.shape == tuple(shape):
            return result
        self._result = None
        result = np.empty(shape, dtype)
        self.bound.bind_output(name, "cpu", 0, element_type(dtype), shape, result.ctypes.data)
        if reuse:
            self._result = result
        return result

    def run(self) -> None:
        self._session.run_with_iobinding(self.bound)


def find_cache(sessions: Iterable[ort.InferenceSession]) -> tuple[dict[str, tuple[int, int]], str]:
    """K/V heads and head size of every buffer, by the name of its input; and the type of all of them, "" where there is none."""
    past = {
        argument.name: argument
        for session in sessions
        for argument in session.get_inputs()
        if argument.name.startswith("past_key_values.")
    }
    kinds = {argument.type for argument in past.values()} or {""}
    assert len(kinds) == 1, "the exporter writes all in one"
    return {name: (argument.shape[1], argument.shape[3]) for name, argument in past.items()}, kinds.pop()


def element_type(dtype: np.dtype[Any]) -> Any:
    """A dtype as `IOBinding` takes it: numpy's own as it is, bfloat16 by its number in ONNX."""
    return 16 if dtype == ml_dtypes.bfloat16 else dtype.type
