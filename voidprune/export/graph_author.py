"""One graph of one model, part by part: embedding, sublayers, head. What runs when is decided in `onnx_graph.py`, not here.

How a family computes is read from its `GraphArchitecture`; in which operators, is up to the operator set. Shapes as in
`onnx_graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

import voidprune
from voidprune.execution.kv_cache import KvSteps
from voidprune.export.emitter import END, Emitter, Tokens
from voidprune.export.fused_operators import ORT, FusedOperators
from voidprune.export.operators import Cache, Operators
from voidprune.export.rounded_kv import steps_name
from voidprune.export.standard_operators import StandardOperators
from voidprune.export.weights import Rows
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.graph_spec import HeadNorm, Norm
from voidprune.schedule import LayerAction, Phase

OPERATOR_SETS: dict[str, type[Operators]] = {"ort": FusedOperators, "standard": StandardOperators}
OPSET = 24
IR_VERSION = 10


@dataclass(frozen=True)
class Hidden:
    """The residual stream of some tokens: `stream`, plus a sublayer output that the next norm will add to it.

    `shared`: the norm that the MLP of a parallel layer reads, while it is the same as the one that attention read.
    """

    stream: ir.Value
    pending: ir.Value | None
    tokens: Tokens
    shared: ir.Value | None = None


class GraphAuthor:
    """Emits the parts of one graph. Each method takes values and returns values; state is only the tape and the cache."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        phase: Phase,
        slots: Mapping[int, int],
        *,
        operators: str,
        kv_steps: Sequence[KvSteps] | None = None,
    ) -> None:
        """`slots`: layer -> cache slot, of the layers that write K/V in this graph. `operators`: a key of OPERATOR_SETS.

        `kv_steps`: of every slot, where the cache is in 8 bits, which "standard" has no attention for.
        Raises ModelError, CheckpointError.
        """
        self.architecture = describe_graph_architecture(checkpoint.config, checkpoint.architecture.spec)
        self.names = self.architecture.spec.tensors
        self.phase = phase
        self.slots = slots
        self.emit = Emitter(checkpoint)
        self.operators = OPERATOR_SETS[operators](self.emit, self.architecture)
        shape: list[int | str] = ["batch", self.architecture.num_kv_heads, "positions", self.architecture.head_dim]
        self._cache_shape = ir.Shape(shape)
        self._cache_dtype = self.emit.dtype if kv_steps is None else ir.DataType.INT8
        self.cache = {
            slot: Cache(
                self.emit.input(f"past_key_values.{slot}.key", self._cache_dtype, shape),
                self.emit.input(f"past_key_values.{slot}.value", self._cache_dtype, shape),
                None if kv_steps is None else self._store_steps(slot, kv_steps[slot]),
            )
            for slot in slots.values()
        }
        self._past = [value for cache in self.cache.values() for value in (cache.key, cache.value)]

    def _store_steps(self, slot: int, steps: KvSteps) -> tuple[ir.Value, ir.Value]:
        """[1, N, 1, H] each, in the graph itself."""
        key, value = (
            self.emit.weights.constant(steps_name(slot, part), steps_NH[np.newaxis, :, np.newaxis])
            for part, steps_NH in (("key", steps.keys_NH), ("value", steps.values_NH))
        )
        return key, value

    # ---- the residual stream

    def embed(self) -> Hidden:
        """The embedded tokens; not a number in a row whose prompt is padded, which would else be answered wrongly."""
        table = self.emit.weights.matrix([Rows(f"{self.names.embedding}.weight")])
        embedded = self.operators.embed(table, self.emit.input_ids)
        stream = self.emit.scale(embedded, self.architecture.embedding_scale)
        return Hidden(self.emit.op("Add", [stream, self._padding()]), None, self.emit.all_tokens)

    def _padding(self) -> ir.Value:
        """[B, 1, 1]: 0, or NaN for a row with more new tokens than it has tokens: those that are too many are padding."""
        is_padded = self.emit.op("Less", [self.emit.all_tokens.first_position, self.emit.integer(0)])
        choice = self.emit.op("Where", [is_padded, self.emit.number(float("nan")), self.emit.number(0.0)])
        return self.emit.op("Unsqueeze", [choice, self.emit.integers(1, 2)])

    def last_token(self, hidden: Hidden) -> Hidden:
        return self._slice_hidden(hidden, -1, END, self.emit.final_token)

    def split(self, hidden: Hidden) -> tuple[Hidden, Hidden]:
        return self._slice_hidden(hidden, 0, -1, self.emit.earlier_tokens), self.last_token(hidden)

    def _slice_hidden(self, hidden: Hidden, start: int, end: int, tokens: Tokens) -> Hidden:
        parts = (hidden.stream, hidden.pending, hidden.shared)
        stream, pending, shared = (None if part is None else self.emit.slice_tokens(part, start, end) for part in parts)
        assert stream is not None
        return Hidden(stream, pending, tokens, shared)

    def join(self, earlier: Hidden, last: Hidden) -> Hidden:
        """Both parts of a prompt as one again."""

        def concatenate(one: ir.Value, other: ir.Value) -> ir.Value:
            return self.emit.op("Concat", [one, other], axis=1)

        shared = None
        if earlier.shared is not None and last.shared is not None:
            shared = concatenate(earlier.shared, last.shared)
        if earlier.pending is not None and last.pending is not None:
            pending = concatenate(earlier.pending, last.pending)
            return Hidden(concatenate(earlier.stream, last.stream), pending, self.emit.all_tokens, shared)
        streams = self.settle(earlier).stream, self.settle(last).stream
        return Hidden(concatenate(*streams), None, self.emit.all_tokens, shared)

    def settle(self, hidden: Hidden) -> Hidden:
        """With what was pending added."""
        if hidden.pending is None:
            return hidden
        return replace(hidden, stream=self.emit.op("Add", [hidden.stream, hidden.pending]), pending=None)

    # ---- norms

    def normalize(self, hidden: Hidden, weight: str | None) -> tuple[ir.Value, Hidden]:
        """Norm of the stream, and the stream with what was pending added. `weight` None: no norm, the stream itself."""
        if weight is None:
            hidden = self.settle(hidden)
            return hidden.stream, hidden
        if hidden.pending is None or self._widens_norms:
            hidden = self.settle(hidden)
            return self._norm(hidden.stream, weight), hidden
        scale, bias = self._norm_weights(weight)
        if self.architecture.norm is Norm.LAYER:
            normed, stream = self.operators.add_and_layer_norm(hidden.stream, hidden.pending, scale, bias)
        else:
            normed, stream = self.operators.add_and_rms_norm(hidden.stream, hidden.pending, scale)
        return normed, replace(hidden, stream=stream, pending=None)

    @property
    def _widens_norms(self) -> bool:
        """In 16 bits a scale stored as scale - 1 would lose what it is stored so for: such norms are taken in float32."""
        return self.architecture.norm is Norm.RMS_PLUS_ONE and self.emit.dtype is not ir.DataType.FLOAT

    def _norm(self, value: ir.Value, weight: str) -> ir.Value:
        scale, bias = self._norm_weights(weight)
        if self.architecture.norm is Norm.LAYER:
            return self.operators.layer_norm(value, scale, bias)
        if self._widens_norms:
            wide = self.emit.cast(value, ir.DataType.FLOAT)
            return self.emit.cast(self.operators.rms_norm(wide, scale), self.emit.dtype)
        return self.operators.rms_norm(value, scale)

    def _norm_weights(self, weight: str) -> tuple[ir.Value, ir.Value | None]:
        stored = self.emit.weights.stored(f"{weight}.weight")
        bias = self.emit.weights.stored(f"{weight}.bias") if self.architecture.norm_bias else None
        if self.architecture.norm is Norm.RMS_PLUS_ONE:
            one = self.emit.weights.constant("norm_one", np.array(1, np.float32))
            wide = self.emit.cast(stored, ir.DataType.FLOAT) if self._widens_norms else stored
            return self.emit.op("Add", [wide, one]), bias
        return stored, bias

    def _normalize_heads(self, value: ir.Value, layer: int, suffix: str, num_heads: int) -> ir.Value:
        """Queries or keys [B, T, N*H], normalized as the family does it."""
        weight = self.names.layer(layer, suffix)
        if self.architecture.head_norm is HeadNorm.ALL:
            return self._norm(value, weight)
        head_dim = self.architecture.head_dim
        heads = self.emit.reshape(value, 0, 0, num_heads, head_dim)
        if self.architecture.head_norm is HeadNorm.EACH:
            normed = self._norm(heads, weight)
        else:
            ones = self.emit.to_weights_dtype(
                self.emit.weights.constant("head_norm_ones", np.ones(head_dim, np.float32))
            )
            normed = self.emit.op(
                "Mul", [self.operators.layer_norm(heads, ones, None), self._scales(weight, num_heads)]
            )
        return self.emit.reshape(normed, 0, 0, num_heads * head_dim)

    def _scales(self, weight: str, num_heads: int) -> ir.Value:
        """Norm weights [N, H] of heads that each have their own: one tensor, or one a head."""
        if "{head}" not in weight:
            return self.emit.weights.stored(f"{weight}.weight")
        each = [self.emit.weights.stored(f"{weight.format(head=head)}.weight") for head in range(num_heads)]
        return self.emit.reshape(self.emit.op("Concat", each, axis=0), num_heads, self.architecture.head_dim)

    # ---- sublayers

    def layer(self, hidden: Hidden, layer: int, action: LayerAction, *, last_only: bool = False) -> Hidden:
        """One layer for all tokens of `hidden`. With `last_only`, nothing but the last token is needed after its K/V."""
        if action.writes_kv:
            hidden = self.attention(hidden, layer, action, last_only=last_only)
        elif last_only:
            hidden = self.last_token(hidden)
        return self.mlp(hidden, layer) if action.runs_mlp else replace(hidden, shared=None)

    def attention(
        self, hidden: Hidden, layer: int, action: LayerAction, *, last_only: bool = False, is_final_write: bool = True
    ) -> Hidden:
        """The attention sublayer: adds its output where the action attends, writes K/V in any case.

        `is_final_write` is False when another part of the tokens will write into the same slot afterwards.
        """
        slot = self.slots[layer]
        normed, hidden = self.normalize(hidden, self._layer_name(layer, self.names.attention_norm))
        if self.architecture.parallel:
            hidden = replace(hidden, shared=normed)
        if not action.attends:
            key, value = self._project_heads(normed, layer, ("key", "value"))
            self.cache[slot] = self.operators.write_kv(key, value, self.cache[slot], hidden.tokens, layer)
            output = None
        else:
            heads = self._project_heads(normed, layer, ("query", "key", "value"))
            output, self.cache[slot] = self.operators.attend(heads, self.cache[slot], hidden.tokens, layer)
        if is_final_write:
            self._name_present(slot)
        if last_only:
            hidden = self.last_token(hidden)
            output = None if output is None else self.emit.slice_tokens(output, -1, END)
        if output is None:
            return hidden
        name = self.names.layer(layer, self.names.output)
        branch = self._linear(output, [Rows(name)], self.architecture.hidden_size, bias=self.architecture.output_bias)
        return self._add_branch(hidden, branch, layer, self.names.attention_post_norm)

    def _project_heads(self, normed: ir.Value, layer: int, kinds: Sequence[str]) -> Sequence[ir.Value]:
        """Queries, keys, values of `kinds` [B, T, N*H] each, normalized; as one tensor where nothing asks them to be apart."""
        shape = self.architecture
        counts = {"query": shape.num_heads, "key": shape.num_kv_heads, "value": shape.num_kv_heads}
        sizes = [counts[kind] * shape.head_dim for kind in kinds]
        packed = self._linear(normed, self._head_rows(layer, kinds), sum(sizes), bias=shape.qkv_bias)
        if shape.head_norm is HeadNorm.NONE and len(kinds) == 3:
            return [packed]
        norms = {"query": self.names.query_norm, "key": self.names.key_norm}
        return [
            self._normalize_heads(part, layer, norms[kind], counts[kind])
            if kind in norms and shape.head_norm is not HeadNorm.NONE
            else part
            for kind, part in zip(kinds, self.emit.split_last(packed, sizes), strict=True)
        ]

    def _head_rows(self, layer: int, kinds: Sequence[str]) -> list[Rows]:
        """The matrices of queries, keys and values: side by side on disk, so that one product does all."""
        if self.names.fused_qkv is None:
            named = {"query": self.names.query, "key": self.names.key, "value": self.names.value}
            return [Rows(self.names.layer(layer, named[kind])) for kind in kinds]
        queries = self.architecture.num_heads * self.architecture.head_dim
        rows = queries + 2 * self.architecture.num_kv_heads * self.architecture.head_dim
        return [Rows(self.names.layer(layer, self.names.fused_qkv), 0 if "query" in kinds else queries, rows)]

    def mlp(self, hidden: Hidden, layer: int) -> Hidden:
        if hidden.shared is not None:
            normed = hidden.shared
        else:
            name = self.names.attention_norm if self.architecture.parallel else self.names.mlp_norm
            normed, hidden = self.normalize(hidden, self._layer_name(layer, name))
        width, bias = self.architecture.intermediate_size, self.architecture.mlp_bias
        gate, up = self._gate_and_up(layer)
        if gate is None:
            inner = self.operators.activate(self._linear(normed, [up], width, bias=bias))
        else:
            gated, passed = self._project_gate_and_up(normed, gate, up, width, bias=bias)
            inner = self.emit.op("Mul", [self.operators.activate(gated), passed])
        down = [Rows(self.names.layer(layer, self.names.down))]
        branch = self._linear(inner, down, self.architecture.hidden_size, bias=bias)
        return replace(self._add_branch(hidden, branch, layer, self.names.mlp_post_norm), shared=None)

    def _project_gate_and_up(
        self, normed: ir.Value, gate: Rows, up: Rows, width: int, *, bias: bool
    ) -> Sequence[ir.Value]:
        """Packed in blocks, as one product, which rounds the other factor once; all others are as fast apart, without the split."""
        if not self.emit.weights.is_packed_in_blocks(f"{gate.tensor}.weight"):
            return [self._linear(normed, [part], width, bias=bias) for part in (gate, up)]
        return self.emit.split_last(self._linear(normed, [gate, up], 2 * width, bias=bias), [width, width])

    def _gate_and_up(self, layer: int) -> tuple[Rows | None, Rows]:
        names, width = self.names, self.architecture.intermediate_size
        if names.fused_gate_up is not None:
            fused = names.layer(layer, names.fused_gate_up)
            return Rows(fused, 0, width), Rows(fused, width, 2 * width)
        gate = Rows(names.layer(layer, names.gate)) if self.architecture.gated else None
        return gate, Rows(names.layer(layer, names.up))

    def _add_branch(self, hidden: Hidden, branch: ir.Value, layer: int, post_norm: str | None) -> Hidden:
        """What a sublayer gives, on its way into the stream."""
        if post_norm is not None:
            branch = self._norm(branch, self.names.layer(layer, post_norm))
        branch = self.emit.scale(branch, self.architecture.residual_scale)
        if hidden.pending is not None:  # attention of a parallel layer
            branch = self.emit.op("Add", [hidden.pending, branch])
        return replace(hidden, pending=branch)

    def finish(self, hidden: Hidden) -> ir.Model:
        """Final norm and head; the whole graph."""
        shape = self.architecture
        normed, _ = self.normalize(hidden, self.names.final_norm)
        head = self.names.embedding if shape.tied_embeddings else self.names.head
        logits = self._linear(normed, [Rows(head)], shape.vocab_size, bias=False)
        logits = self.emit.scale(logits, shape.logit_scale)
        if shape.logit_softcap is not None:
            capped = self.emit.op("Tanh", [self.emit.scale(logits, 1 / shape.logit_softcap)])
            logits = self.emit.scale(capped, shape.logit_softcap)
        logits.name = "logits"
        logits.type = ir.TensorType(self.emit.dtype)
        logits.shape = ir.Shape(["batch", 1 if self.phase is Phase.PREFILL else "tokens", shape.vocab_size])
        presents = [value for cache in self.cache.values() for value in (cache.key, cache.value)]
        tape = self.emit.tape
        graph = ir.Graph(
            [self.emit.input_ids, self.emit.attention_mask, *self._past],
            [logits, *presents],
            nodes=tape.nodes,
            initializers=tape.initializers,
            opset_imports={"": OPSET, **({ORT: 1} if any(node.domain == ORT for node in tape.nodes) else {})},
            name=str(self.phase),
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="voidprune", producer_version=voidprune.__version__)

    # ---- names and weights

    def _layer_name(self, layer: int, suffix: str | None) -> str | None:
        return None if suffix is None else self.names.layer(layer, suffix)

    def _linear(self, value: ir.Value, parts: Sequence[Rows], width: int, *, bias: bool) -> ir.Value:
        """`value` times matrices that lie one below the other, as one product: [B, T, `width`]."""
        matrix = self.emit.weights.matrix([replace(part, tensor=f"{part.tensor}.weight") for part in parts])
        biases = (
            self.emit.weights.rows([replace(part, tensor=f"{part.tensor}.bias") for part in parts]) if bias else None
        )
        return self.operators.product(value, matrix, biases, width)

    def _name_present(self, slot: int) -> None:
        cache = self.cache[slot]
        for value, part in ((cache.key, "key"), (cache.value, "value")):
            value.name = f"present.{slot}.{part}"
            value.type = ir.TensorType(self._cache_dtype)
            value.shape = self._cache_shape
