"""The least that a bundle has to do: bytes that it must read, products that it must multiply. Read from its files, not run.

Bytes are those of the weights that the graph of a phase refers to, as they are stored, each once, and of the K/V that attention
looks at. Of a table that tokens are looked up in, only the rows that are looked up count; a tied head reads all of it.
Greedy decoding reads a head that is screened (`execution/heads.py`) in 8 bits: `BundleWork.greedily`.
Arithmetic is that of matrix products (two operations a weight and token) and of attention, whatever the graph does beyond that:
tokens before the last need nothing above the last K/V that prefill writes. Sliding windows are counted as windows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from voidprune.execution.detached_head import MOST_ROWS, find_common_head
from voidprune.execution.device_weights import WeightRange, overlapping_groups, weight_ranges
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.models.families import read_architecture
from voidprune.models.graph_architecture import GraphArchitecture, describe_graph_architecture
from voidprune.schedule import Boundary, LayerAction, Phase

_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})


@dataclass(frozen=True)
class Work:
    """What one prefill, or one step of decode, has to do: bytes to read, and operations (a product and a sum are two)."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class BundleWork:
    """What a bundle has to do.

    `weight_bytes[phase]`: what its graph reads each time; `kv_bytes`: of one token in one layer; `spared_bytes`: of the weights,
    what need not be read where only the likeliest tokens of a few rows are asked for.
    """

    manifest: Manifest
    architecture: GraphArchitecture
    weight_bytes: Mapping[Phase, int]
    kv_bytes: int
    spared_bytes: int
    screens: bool = False

    def greedily(self) -> BundleWork:
        """The same for a runner that screens the head."""
        return replace(self, screens=True)

    def _read(self, phase: Phase, num_rows: int) -> int:
        return self.weight_bytes[phase] - (self.spared_bytes if self.screens and num_rows <= MOST_ROWS else 0)

    def prefill(self, length: int, *, num_rows: int) -> Work:
        """Of `num_rows` prompts of `length` tokens each, at least two."""
        flops = 2 * self.architecture.vocab_size * self.architecture.hidden_size
        for layer, (earlier, last) in enumerate(self._prefill_actions()):
            window = self.architecture.windows[layer] or length
            seen = sum(min(position, window) for position in range(1, length)) if earlier.attends else 0
            flops += (length - 1) * self._layer_flops(earlier) + 4 * seen * self.architecture.attention_width
            flops += self._step_flops(layer, last, length)
        return Work(self._read(Phase.PREFILL, num_rows), num_rows * flops)

    def decode(self, context: int, *, num_rows: int) -> Work:
        """Of a step with `context` tokens in the cache, the new one included."""
        shape = self.architecture
        flops, positions = 2 * shape.vocab_size * shape.hidden_size, 0
        for layer, action in enumerate(self._actions(Phase.DECODE)):
            flops += self._step_flops(layer, action, context)
            if action.attends:
                positions += min(context, shape.windows[layer] or context)
        return Work(self._read(Phase.DECODE, num_rows) + num_rows * positions * self.kv_bytes, num_rows * flops)

    def _actions(self, phase: Phase) -> list[LayerAction]:
        schedule = self.manifest.schedule
        return [schedule.actions(phase)[layer] for layer in schedule.union]

    def _prefill_actions(self) -> Iterator[tuple[LayerAction, LayerAction]]:
        """Of each layer: what tokens before the last must run, and what the last one runs."""
        prefill = self._actions(Phase.PREFILL)
        final = max((layer for layer, action in enumerate(prefill) if action.writes_kv), default=-1)
        boundary = self.manifest.schedule.boundary
        ends = self._actions(Phase.DECODE if boundary is Boundary.DECODE else Phase.PREFILL)
        for layer, (action, last) in enumerate(zip(prefill, ends, strict=True)):
            earlier = action if layer < final else LayerAction.KV_ONLY if layer == final else LayerAction.SKIP
            yield earlier, last

    def _step_flops(self, layer: int, action: LayerAction, context: int) -> int:
        """Of one token that sees `context` tokens."""
        seen = min(context, self.architecture.windows[layer] or context) if action.attends else 0
        return self._layer_flops(action) + 4 * seen * self.architecture.attention_width

    def _layer_flops(self, action: LayerAction) -> int:
        shape = self.architecture
        kv = shape.hidden_size * shape.kv_width
        attention = kv + 2 * shape.hidden_size * shape.attention_width
        weights = attention if action.attends else kv if action.writes_kv else 0
        if action.runs_mlp:
            weights += (3 if shape.gated else 2) * shape.hidden_size * shape.intermediate_size
        return 2 * weights


def measure_work(folder: Path) -> BundleWork:
    """What the bundle in a folder has to do. Raises ModelError, ArtifactError."""
    manifest = read_manifest(folder)
    config = json.loads((folder / "config.json").read_bytes())
    return BundleWork(
        manifest=manifest,
        architecture=describe_graph_architecture(config, read_architecture(config).spec),
        weight_bytes={phase: _bytes_read(folder / graph.file) for phase, graph in manifest.graphs.items()},
        kv_bytes=_kv_bytes(folder / manifest.graphs[Phase.DECODE].file),
        spared_bytes=_spared_bytes({folder / graph.file for graph in manifest.graphs.values()}),
    )


def _bytes_read(graph: Path) -> int:
    """Of the weight files, by one run of a graph: each byte once, but for tables that rows are looked up in."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    multiplied = {name for node in nodes if node.op_type not in _LOOKUPS for name in node.input}
    read = [weight for weight in weight_ranges(graph) if weight.name in multiplied]
    return sum(_span(group) for group in overlapping_groups(read))


def _spared_bytes(graphs: Collection[Path]) -> int:
    """Of a head that both graphs have: it is read in 8 bits with its bounds, but for few rows."""
    import onnx

    head = find_common_head(onnx.load(graph, load_external_data=False).graph for graph in graphs)
    return 0 if head is None or len(graphs) == 1 else head.num_bytes - head.screened_bytes


def _kv_bytes(graph: Path) -> int:
    """Of one token in one layer; 0 where no layer attends."""
    import onnx

    for value in onnx.load(graph, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values."):
            held = value.type.tensor_type
            _, num_kv_heads, _, head_dim = (dimension.dim_value for dimension in held.shape.dim)
            return int(2 * num_kv_heads * head_dim * onnx.helper.tensor_dtype_to_np_dtype(held.elem_type).itemsize)
    return 0


def _span(group: list[WeightRange]) -> int:
    return max(weight.offset + weight.num_bytes for weight in group) - group[0].offset
