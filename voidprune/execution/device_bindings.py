"""What a session on CUDA reads and writes, in tensors of torch on the device; and steps of decode that are captured.

A step of decode is hundreds of small kernels, and starting them takes longer than running them. onnxruntime captures them as a CUDA
graph, which starts at once, if all that a step reads and writes stays in its place: so a captured step has tensors of its own,
which are written in place, and its mask is as wide as the K/V buffers, whatever is in them.

torch and onnxruntime have streams of their own, so each waits for what the other does: torch's copies are done before a run, and
a run is done when it returns.

Shapes: B rows, T new tokens, S columns of the mask, X what the graphs give a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from voidprune.execution.bindings import HostBinding, element_type
from voidprune.execution.detached_head import LOGITS
from voidprune.execution.row_lengths import MASK
from voidprune.schedule import Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = np.ndarray[Any, Any]
BindingKey = tuple[Phase, int, int, bool]
"""Phase, first row, last row + 1, and whether it is of steps behind the first."""

STRIDE = 128
"""K/V buffers have a multiple of so many positions: the next conversation is the likelier to fit into them."""
MOST_CAPTURES = 64
"""Of a session. onnxruntime 1.31 forgets none before the session ends; further conversations take the slower way."""
_NO_CAPTURE = -1
"""The `gpu_graph_id` of runs that are neither captured nor replayed."""


@dataclass(frozen=True)
class DeviceBuffers:
    """K/V buffers [B, N, M, H] on a device, and what was bound to them: for one conversation after the other."""

    tensors: Mapping[str, Tensor]
    bindings: dict[BindingKey, Binding] = field(default_factory=dict)

    @classmethod
    def make(cls, shapes: Mapping[str, Sequence[int]], dtype: np.dtype[Any], *, device: str) -> DeviceBuffers:
        import torch

        return cls(
            {name: torch.zeros(*shape, dtype=_torch_dtype(dtype), device=device) for name, shape in shapes.items()}
        )

    def clear(self) -> None:
        """What is behind a row's tokens is read and multiplied by 0, so it has to be numbers."""
        for tensor in self.tensors.values():
            tensor.zero_()


class DeviceBinding:
    """As `bindings.HostBinding`, with inputs and result on a device of torch. `capture`: a number of its own for captured steps."""

    def __init__(self, session: ort.InferenceSession, *, device: str, capture: int | None = None) -> None:
        self.bound = session.io_binding()
        self._session, self._device = session, device
        self._tensors: dict[str, Tensor] = {}
        self.is_captured = capture is not None
        self._options = ort.RunOptions()
        if device == "cuda":
            self._options.add_run_config_entry("gpu_graph_id", str(_NO_CAPTURE if capture is None else capture))

    def feed(self, name: str, array: Array) -> None:
        """An input of whole numbers, which are copied: in place, where there was one of the same shape."""
        import torch

        source = torch.tensor(np.asarray(array, np.int64))
        known = self._tensors.get(name)
        if known is not None and known.shape == source.shape:
            known.copy_(source)
            return
        self._bind(name, source.to(self._device))

    def feed_mask(self, lengths: Sequence[int], width: int) -> None:
        """MASK, [B, `width`]: ones for the tokens of each row, made where they are read."""
        import torch

        known = self._tensors.get(MASK)
        if known is None or known.shape != (len(lengths), width):
            known = torch.empty((len(lengths), width), dtype=torch.int64, device=self._device)
            self._bind(MASK, known)
        columns = self._tensors.get("columns")
        if columns is None or len(columns) != width:
            columns = self._tensors["columns"] = torch.arange(width, device=self._device)
        torch.lt(columns, torch.tensor(lengths, device=self._device)[:, None], out=known)

    def _bind(self, name: str, tensor: Tensor) -> None:
        self._tensors.pop(name, None)  # whatever interrupts this, nothing is written to that is not bound
        self.bound.bind_input(name, self._device, 0, np.int64, list(tensor.shape), tensor.data_ptr())
        self._tensors[name] = tensor

    def bind_result(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], *, reuse: bool) -> Tensor:
        """Where the result will be. With `reuse`, and always of a captured step, that is where it was before."""
        import torch

        result = self._tensors.get(LOGITS)
        if (reuse or self.is_captured) and result is not None and result.shape == tuple(shape):
            return result
        self._tensors.pop(LOGITS, None)
        del result  # before there is another one
        made = torch.empty(tuple(shape), dtype=_torch_dtype(dtype), device=self._device)
        self.bound.bind_output(name, self._device, 0, element_type(dtype), list(shape), made.data_ptr())
        self._tensors[LOGITS] = made
        return made

    def run(self) -> None:
        import torch

        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()
        self._session.run_with_iobinding(self.bound, self._options)


Binding = HostBinding | DeviceBinding


class DevicePool:
    """What the conversations of a session have on a device: K/V buffers, one after the other, and numbers for captured steps."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], dtype: np.dtype[Any], *, device: str, captures: bool
    ) -> None:
        """`shapes`: heads and head size of each buffer."""
        self.captures_left = MOST_CAPTURES if captures else 0
        self._dtype, self._device, self._shapes = dtype, device, shapes
        self._spare: tuple[tuple[int, int], DeviceBuffers] | None = None

    def take(self, num_rows: int, num_positions: int) -> DeviceBuffers:
        """Those of the last conversation that ended, where they fit."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == (num_rows, num_positions):
            spare[1].clear()
            return spare[1]
        del spare  # what does not fit makes room
        shapes = {name: (num_rows, heads, num_positions, width) for name, (heads, width) in self._shapes.items()}
        return DeviceBuffers.make(shapes, self._dtype, device=self._device)

    def keep(self, num_rows: int, num_positions: int, buffers: DeviceBuffers) -> None:
        """For the next conversation."""
        self._spare = (num_rows, num_positions), buffers

    def bind(self, session: ort.InferenceSession, *, captures: bool) -> DeviceBinding:
        """`captures`: if there is a number left."""
        capture = None
        if captures and self.captures_left:
            capture = self.captures_left = self.captures_left - 1
        return DeviceBinding(session, device=self._device, capture=capture)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, dtype.name)
    return found


class DeviceHead:
    """Of graphs that give logits on a device: of the likeliest token, only its number comes to the host."""

    is_screened = False
    output = LOGITS

    def __init__(self, vocab_size: int) -> None:
        self.width = self.vocab_size = vocab_size

    def logits(self, outputs_BTX: Tensor) -> Array:
        """[B, T, V], in memory of their own."""
        import torch

        if outputs_BTX.dtype != torch.bfloat16:
            return outputs_BTX.to("cpu", copy=True).numpy()
        return outputs_BTX.view(torch.int16).to("cpu", copy=True).numpy().view(ml_dtypes.bfloat16)

    def likeliest(self, outputs_BTX: Tensor) -> Array:
        """The token with the greatest logit: [B, T]."""
        found: Array = outputs_BTX.argmax(-1).cpu().numpy()
        return found

    def join(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        import torch

        return torch.cat(list(parts), dim=axis)
