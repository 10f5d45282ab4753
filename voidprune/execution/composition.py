"""The two graphs of a bundle as one model, whose `If` chooses the phase: onnxruntime then packs the weights that both use once.

onnxruntime lays out matrices anew for its kernels when a session is opened, and shares what it laid out between the branches of
one model but not, in Python, between sessions (1.31: `PrepackedWeightsContainer` is not exposed). Graphs are composed in memory,
when they are loaded; the files of a bundle stay two, for runtimes that choose the phase themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from voidprune.execution.buffer_attention import rewrite_decode, rewrite_prefill
from voidprune.execution.detached_head import DetachedHead, detach_head, find_common_head
from voidprune.execution.row_lengths import take_lengths
from voidprune.schedule import Phase

if TYPE_CHECKING:
    import onnx

PHASE_INPUT = "is_prefill"
"""The input, a scalar bool, that chooses the branch."""


@dataclass(frozen=True)
class ComposedGraphs:
    """Both graphs as one model.

    `scored_heads`: attention heads of a layer whose scores decode has in memory, all positions of the buffers for all of its
    tokens; 0 where onnxruntime's own operator keeps them to itself. `head`: what the model lacks, which then gives hidden states.
    """

    model: onnx.ModelProto
    scored_heads: int
    head: DetachedHead | None


def compose_graphs(prefill: Path, decode: Path, *, as_exported: bool = False) -> ComposedGraphs:
    """One model with the inputs and outputs of both graphs, and PHASE_INPUT. Weights stay in their files, beside the graphs.

    A slot of the cache that one phase does not write passes through it: past and present are one buffer there as well. Unless they
    are to be `as_exported`, both attend in another way where that is faster (`buffer_attention.py`), are told lengths in place of a
    mask (`row_lengths.py`), and leave large heads to `heads.py`.
    """
    import onnx

    models = {
        phase: onnx.load(path, load_external_data=False)
        for phase, path in ((Phase.PREFILL, prefill), (Phase.DECODE, decode))
    }
    graphs = {phase: model.graph for phase, model in models.items()}
    scored_heads, head = 0, None
    if not as_exported:
        rewrite_prefill(models[Phase.PREFILL])
        scored_heads = rewrite_decode(models[Phase.DECODE])
        take_lengths(graphs.values())
        head = find_common_head(graphs.values())
    if head is not None:
        for graph in graphs.values():
            detach_head(graph)
    shared = _Shared()
    inputs = _by_name(value for graph in graphs.values() for value in graph.input)
    outputs = _by_name(value for graph in graphs.values() for value in graph.output)
    num_results = next(iter(outputs.values())).type.tensor_type.shape.dim[1]
    num_results.Clear()
    num_results.dim_param = "results"  # of the last token alone, or of all: each branch says its own
    branches = {phase: _branch(graph, phase, outputs, shared) for phase, graph in graphs.items()}
    choose = onnx.helper.make_node(
        "If",
        [PHASE_INPUT],
        list(outputs),
        name="phase",
        then_branch=branches[Phase.PREFILL],
        else_branch=branches[Phase.DECODE],
    )
    asked = onnx.helper.make_tensor_value_info(PHASE_INPUT, onnx.TensorProto.BOOL, [])
    graph = onnx.helper.make_graph(
        [*shared.nodes.values(), choose],
        "both phases",
        [*inputs.values(), asked],
        list(outputs.values()),
        list(shared.weights.values()),
    )
    opsets = {opset.domain: opset for model in models.values() for opset in model.opset_import}
    composed = onnx.helper.make_model(
        graph, opset_imports=list(opsets.values()), ir_version=max(model.ir_version for model in models.values())
    )
    return ComposedGraphs(composed, scored_heads, head)


def _by_name(values: Iterable[onnx.ValueInfoProto]) -> dict[str, onnx.ValueInfoProto]:
    import onnx

    found = {}
    for value in values:
        copied = onnx.ValueInfoProto()
        copied.CopyFrom(value)
        found[value.name] = copied
    return found


@dataclass(frozen=True)
class _Shared:
    """What both branches find outside of themselves, by its content: weights, and nodes that compute from weights alone."""

    weights: dict[bytes, onnx.TensorProto] = field(default_factory=dict)
    nodes: dict[bytes, onnx.NodeProto] = field(default_factory=dict)

    def weight(self, initializer: onnx.TensorProto) -> str:
        """The name under which both know an initializer: the same bytes of a file have the same."""
        import onnx

        content = onnx.TensorProto()
        content.CopyFrom(initializer)
        content.ClearField("name")
        known = self.weights.setdefault(content.SerializeToString(deterministic=True), content)
        if not known.name:
            known.name = f"weight.{len(self.weights) - 1}"
        return known.name

    def constants(self, node: onnx.NodeProto, inputs: Iterable[str]) -> list[str]:
        """The names of what a node gives whose `inputs` are shared: rotary tables, for one, which onnxruntime computes once."""
        import onnx

        content = onnx.NodeProto()
        content.CopyFrom(node)
        content.ClearField("name")
        content.input[:] = inputs
        content.output[:] = ["?" if name else "" for name in node.output]
        key = content.SerializeToString(deterministic=True)
        if key not in self.nodes:
            content.name = f"constant.{len(self.nodes)}"
            content.output[:] = [f"{content.name}.{index}" if name else "" for index, name in enumerate(node.output)]
            self.nodes[key] = content
        return list(self.nodes[key].output)


def _branch(
    graph: onnx.GraphProto, phase: Phase, outputs: Mapping[str, onnx.ValueInfoProto], shared: _Shared
) -> onnx.GraphProto:
    """A graph as a branch that gives `outputs`. What does not depend on its inputs goes to `shared`."""
    import onnx

    names = {"": "", **{value.name: value.name for value in graph.input}}
    constants = {""}
    for initializer in graph.initializer:
        names[initializer.name] = shared.weight(initializer)
        constants.add(initializer.name)
    nodes = []
    for node in graph.node:
        if constants.issuperset(node.input):
            names.update(zip(node.output, shared.constants(node, [names[name] for name in node.input]), strict=True))
            constants.update(node.output)
            continue
        names.update({name: f"{phase}/{name}" for name in node.output if name})
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{phase}/{node.name}"
        copied.input[:] = [names[name] for name in node.input]
        copied.output[:] = [names[name] for name in node.output]
        _rename_captured(copied, names)
        nodes.append(copied)
    written = {value.name: value for value in graph.output}
    results = []
    for name, value in outputs.items():
        result = onnx.ValueInfoProto()
        result.CopyFrom(written.get(name, value))
        result.name = f"{phase}/{name}"
        results.append(result)
        if name not in written:
            past = name.replace("present", "past_key_values")
            nodes.append(onnx.helper.make_node("Identity", [past], [result.name], name=result.name))
    return onnx.helper.make_graph(nodes, str(phase), [], results)


def _rename_captured(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Within branches and loops, what they read from outside: they have other names for all of their own."""
    for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
        for inner in body.node:
            inner.input[:] = [names.get(name, name) for name in inner.input]
            _rename_captured(inner, names)
