"""Keys and values in 8 bits, in graphs: where their steps lie, and the same graph without rounding, to see what that changes."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from voidprune.execution.kv_cache import KvSteps
from voidprune.execution.manifest import Manifest

K_STEPS = 12
"""Which input of onnxruntime's `GroupQueryAttention` says what 1 stands for in keys; the next one says it of values."""
ROUNDING = MappingProxyType({"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8})
"""Attributes of that operator."""


def steps_name(slot: int, part: str) -> str:
    """The initializer with the steps of a slot's "key" or "value"."""
    return f"past_key_values.{slot}.{part}.step"


def read_steps(model: ir.Model) -> dict[int, KvSteps]:
    """By slot, of those that the graph writes."""
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    found = {}
    for value in model.graph.inputs:
        assert value.name is not None
        if value.name.startswith("past_key_values.") and value.name.endswith(".key"):
            slot = int(value.name.split(".")[1])
            parts = (weights[steps_name(slot, part)] for part in ("key", "value"))
            found[slot] = KvSteps(*(np.asarray(part.numpy())[0, :, 0] for part in parts if part is not None))
    return found


def bundle_steps(folder: Path, manifest: Manifest) -> dict[int, KvSteps]:
    """By slot, of a bundle whose graphs hold keys and values in 8 bits."""
    found: dict[int, KvSteps] = {}
    for graph in manifest.graphs.values():
        found |= read_steps(ir.load(folder / graph.file))
    return found


def hold_exactly(model: ir.Model) -> None:
    """Let keys and values be held in the dtype of the logits."""
    dtype = ir.TensorType(model.graph.outputs[0].dtype)  # type: ignore[arg-type]
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            rest = [*node.inputs[:K_STEPS]]
            while rest[-1] is None:
                rest.pop()
            node.resize_inputs(len(rest))
            for name in ROUNDING:
                node.attributes.pop(name, None)
        elif node.op_type == "QuantizeLinear" and "output_dtype" in node.attributes:  # see Operators.write_kv
            source = node.inputs[0]
            assert source is not None
            made_by = source.producer()
            if made_by is not None and made_by.op_type == "Cast":  # in 16 bits
                source = made_by.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and value.name.startswith(("past_key_values.", "present.")):
            value.type = dtype
    RemoveUnusedNodesPass()(model)  # steps, and what rounded
