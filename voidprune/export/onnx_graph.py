"""One phase's graph, authored from config and safetensors header. No tracing, no torch, no weights in memory.

Every weight of a graph is external data *into* the checkpoint's own safetensors file, so two graphs cost two small files.
`operators` chooses in which operators they are written: a key of `graph_author.OPERATOR_SETS`.

The contract of the graphs (B rows, T new tokens, S tokens with the past, M positions of the K/V buffers, N K/V heads, H head
size, V vocabulary):

- inputs `input_ids` [B, T] and `attention_mask` [B, S], int64; the ones of a mask row count that row's tokens, the new ones
  included. The T new tokens are real in every row: rows with prompts of different length are prefilled apart. A padded row's
  logits are not numbers, so that nobody takes them for an answer.
- inputs `past_key_values.{slot}.key|value` and outputs `present.{slot}.key|value`, [B, N, M, H]: one buffer, bound to both.
  Slots count the layers that write K/V in either phase, without gaps. A graph has only the slots that it writes. They are of the
  dtype of the logits, or int8 (`execution/kv_cache.py`), with the steps of the channels as initializers.
- `prefill.onnx` is all that a prompt needs: prefill actions on all tokens but the last, decode actions on the last (with the
  boundary "prefill": prefill actions on all). Output `logits` [B, 1, V]. With the boundary "decode", T is at least 2: a
  prompt of one token is a decode step.
- `decode.onnx` runs the decode actions on all T tokens. Output `logits` [B, T, V].

Dead parts are never emitted: prefill of the tokens before the last ends with the last K/V that it must write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from voidprune.execution.kv_cache import KvSteps
from voidprune.export.graph_author import GraphAuthor, Hidden
from voidprune.models.checkpoint import Checkpoint
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule


def author_prefill(
    checkpoint: Checkpoint, schedule: Schedule, *, operators: str = "ort", kv_steps: Sequence[KvSteps] | None = None
) -> ir.Model:
    """The prefill graph of a checkpoint that holds exactly the layers of `schedule`; `kv_steps`: see `GraphAuthor`."""
    author = _start_graph(checkpoint, schedule, Phase.PREFILL, operators, kv_steps)
    prefill, decode = schedule.prefill, schedule.decode
    everything = author.embed()
    writers = [layer for layer, action in enumerate(prefill) if action.writes_kv]
    final = writers[-1] if writers else -1
    if schedule.boundary is Boundary.PREFILL:
        hidden = everything if writers else author.last_token(everything)
        for layer, action in enumerate(prefill):
            hidden = author.layer(hidden, layer, action, last_only=layer == final)
        return author.finish(hidden)
    streams = _Streams(author, joined=everything)
    for layer in range(final + 1):
        # Above the last K/V that prefill writes, nothing of the earlier tokens is read: there it writes K/V and no more.
        earlier = LayerAction.KV_ONLY if layer == final else prefill[layer]
        streams = streams.layer(layer, earlier, decode[layer])
    hidden = streams.last
    for layer in range(final + 1, schedule.num_layers):
        hidden = author.layer(hidden, layer, decode[layer])
    return author.finish(hidden)


def author_decode(
    checkpoint: Checkpoint, schedule: Schedule, *, operators: str = "ort", kv_steps: Sequence[KvSteps] | None = None
) -> ir.Model:
    """The decode graph of a checkpoint that holds exactly the layers of `schedule`; `kv_steps`: see `GraphAuthor`."""
    author = _start_graph(checkpoint, schedule, Phase.DECODE, operators, kv_steps)
    hidden = author.embed()
    for layer, action in enumerate(schedule.decode):
        hidden = author.layer(hidden, layer, action)
    return author.finish(hidden)


def graph_slots(schedule: Schedule, phase: Phase) -> tuple[int, ...]:
    """The cache slots that a phase's graph reads and writes."""
    writes = [action.writes_kv for action in schedule.actions(phase)]
    if phase is Phase.PREFILL and schedule.boundary is Boundary.DECODE:
        writes = [write or action.writes_kv for write, action in zip(writes, schedule.decode, strict=True)]
    return tuple(slot for slot, layer in enumerate(schedule.kv_layers) if writes[layer])


def _start_graph(
    checkpoint: Checkpoint, schedule: Schedule, phase: Phase, operators: str, kv_steps: Sequence[KvSteps] | None
) -> GraphAuthor:
    slots = {schedule.kv_layers[slot]: slot for slot in graph_slots(schedule, phase)}
    return GraphAuthor(checkpoint, phase, slots, operators=operators, kv_steps=kv_steps)


def round_activations(model: ir.Model) -> None:
    """Let the products with packed matrices round what they multiply, block by block, to 8 bits: faster, and 0.6 % off.

    Products with matrices whose rows are blocks always do, token by token.
    """
    _set_accuracy_level(model, 4)


def multiply_exactly(model: ir.Model) -> None:
    """Let no product round what it multiplies: the same matrices, slowly. To see what rounding changes."""
    _set_accuracy_level(model, 0)
    for product in [node for node in model.graph if node.op_type == "QGemm"]:
        rounding = _made_by(product.inputs[0])
        (scaling,) = product.outputs[0].consumers()
        numbers = ir.node("Cast", [product.inputs[3]], {"to": ir.DataType.FLOAT})
        one = _made_by(scaling.inputs[1]).inputs[1]
        column = ir.node("Unsqueeze", [product.inputs[4], one])
        matrix = ir.node("Mul", [numbers.outputs[0], column.outputs[0]])
        exact = ir.node("Gemm", [rounding.inputs[0], matrix.outputs[0]], {"transB": 1})
        model.graph.insert_after(scaling, [numbers, column, matrix, exact])
        ir.convenience.replace_all_uses_with(scaling.outputs[0], exact.outputs[0])
        model.graph.remove([scaling, product], safe=True)


def _made_by(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def _set_accuracy_level(model: ir.Model, level: int) -> None:
    """`accuracy_level` of onnxruntime's `MatMulNBits`: 4 rounds, 0 does not."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def save_graph(model: ir.Model, path: Path) -> None:
    ir.save(model, path)


@dataclass(frozen=True)
class _Streams:
    """The tokens of a prompt on their way through prefill: one tensor while both parts do the same, two where they differ."""

    author: GraphAuthor
    joined: Hidden | None = None
    parts: tuple[Hidden, Hidden] | None = None

    @property
    def together(self) -> Hidden:
        if self.joined is not None:
            return self.joined
        assert self.parts is not None
        return self.author.join(*self.parts)

    @property
    def apart(self) -> tuple[Hidden, Hidden]:
        if self.parts is not None:
            return self.parts
        assert self.joined is not None
        return self.author.split(self.joined)

    @property
    def last(self) -> Hidden:
        return self.author.last_token(self.joined) if self.joined is not None else self.apart[1]

    def layer(self, layer: int, earlier: LayerAction, last: LayerAction) -> _Streams:
        """One layer: the action `earlier` for all tokens but the last, `last` for the last."""
        return self._attention(layer, earlier, last)._mlp(layer, earlier, last)

    def _attention(self, layer: int, earlier: LayerAction, last: LayerAction) -> _Streams:
        if not earlier.writes_kv and not last.writes_kv:
            return self
        if (earlier.writes_kv, earlier.attends) == (last.writes_kv, last.attends):
            return replace(self, joined=self.author.attention(self.together, layer, earlier), parts=None)
        before, final = self.apart
        if earlier.writes_kv:
            before = self.author.attention(before, layer, earlier, is_final_write=not last.writes_kv)
        if last.writes_kv:
            final = self.author.attention(final, layer, last)
        return replace(self, joined=None, parts=(before, final))

    def _mlp(self, layer: int, earlier: LayerAction, last: LayerAction) -> _Streams:
        if earlier.runs_mlp and last.runs_mlp and self._share_alike:
            return replace(self, joined=self.author.mlp(self.together, layer), parts=None)
        if not earlier.runs_mlp and not last.runs_mlp:
            return self._leave_layer()
        before, final = self.apart
        if earlier.runs_mlp:
            before = self.author.mlp(before, layer)
        if last.runs_mlp:
            final = self.author.mlp(final, layer)
        return replace(self, joined=None, parts=(before, final))._leave_layer()

    @property
    def _share_alike(self) -> bool:
        """Whether both parts, or neither, have the norm that a parallel layer's MLP shares with attention."""
        return self.parts is None or (self.parts[0].shared is None) == (self.parts[1].shared is None)

    def _leave_layer(self) -> _Streams:
        """Without the norm that only this layer's MLP could have shared."""
        if self.joined is not None:
            return replace(self, joined=replace(self.joined, shared=None))
        before, final = self.apart
        return replace(self, parts=(replace(before, shared=None), replace(final, shared=None)))
