"""What an exported folder says of itself."""

from __future__ import annotations

from rich.table import Table

from voidprune.execution.manifest import Manifest
from voidprune.execution.packing_record import Fidelity, Quantization
from voidprune.schedule import Phase
from voidprune.tables.figures import format_bytes


def manifest_table(manifest: Manifest) -> Table:
    table = Table(title=f"bundle of {manifest.source}", show_header=False)
    schedule, quantization = manifest.schedule, manifest.quantization
    dtype = manifest.dtype
    if quantization is not None:
        dtype = f"{dtype} and {quantization.precision}" if manifest.has_checkpoint else quantization.precision
    rows = {
        "layers in checkpoint": f"{len(manifest.kept_layers)} of {schedule.num_layers}",
        "executed in prefill": str(schedule.num_executed(Phase.PREFILL)),
        "executed in decode": str(schedule.num_executed(Phase.DECODE)),
        "weights": f"{format_bytes(manifest.weight_bytes)} {dtype}, of {format_bytes(manifest.source_bytes)}",
        "graphs": _describe_graphs(manifest),
        "written by": manifest.written_by,
    }
    if quantization is not None:
        rows |= {
            "weights of the graphs": f"{format_bytes(manifest.graph_weight_bytes)} {quantization.precision},\n"
            f"{quantization.average_bits:.3g} bits a weight of the layers,\n{_describe_blocks(quantization)}",
            "error of weights": f"{quantization.weight_error:.2%}",
            f"beside unpacked weights{'' if manifest.kv_cache is None else ' and K/V'}": describe_fidelity(
                quantization.fidelity
            ),
        }
    if manifest.kv_cache is not None:
        rows["keys and values"] = f"{manifest.kv_cache.dtype}, measured on {len(manifest.kv_cache.prompts)} prompts"
        if quantization is None:
            rows["beside float32"] = describe_fidelity(manifest.kv_cache.fidelity)
    if manifest.parity is not None:
        parity = manifest.parity
        onnx = "" if parity.onnx is None else f", graphs {parity.onnx:.2g}"
        hf = "" if parity.hf is None else f"checkpoint {parity.hf:.2g}"
        rows["difference from reference"] = (
            f"{hf}{onnx if hf else onnx.removeprefix(', ')}\n(allowed {parity.tolerance:.2g})"
        )
        if parity.rounded is not None:
            rows["with activations in 8 bits"] = f"graphs {parity.rounded:.2g} (allowed {parity.rounded_tolerance:.2g})"
        if parity.kv is not None:
            rows["with K/V in 8 bits"] = f"graphs {parity.kv:.2g} (allowed {parity.kv_tolerance:.2g})"
    else:
        rows["difference from reference"] = "not verified: nobody ran it"
    if manifest.healing is not None:
        rows[f"healed by {', '.join(manifest.healing.methods)}"] = (
            f"{manifest.healing.held_out.describe()} ({manifest.healing.held_out.num_samples} held-out samples)"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


OPERATOR_SETS = {"ort": "fused ones of onnxruntime (ort)", "standard": "the ONNX standard alone (standard)"}
LAYOUTS = {1: "one graph for both phases (single)", 2: "a graph a phase (pair)"}


def _describe_graphs(manifest: Manifest) -> str:
    """Files, layout and operators, a line each."""
    files = list(dict.fromkeys(graph.file for graph in manifest.graphs.values()))
    if not files:
        return "none"
    sizes = [f"{file} {format_bytes(manifest.sizes[file])}" for file in files]
    return "\n".join([*sizes, f"layout: {LAYOUTS[len(files)]}", f"operators: {OPERATOR_SETS[manifest.operators]}"])


def describe_fidelity(fidelity: Fidelity | None) -> str:
    """What packing, or K/V in 8 bits, changed, in one line."""
    if fidelity is None:
        return "not measured: the model could not answer prompts where it was exported"
    return (
        f"perplexity x {fidelity.perplexity_ratio:.4f}, KL {fidelity.kl:.2g} nats,\n"
        f"same likeliest token {fidelity.top1:.1%} ({fidelity.num_tokens:,} tokens)"
    )


def _describe_blocks(quantization: Quantization) -> str:
    blocks = f"in blocks of {quantization.block_size}{' with zero points' if quantization.zero_points else ''}"
    if quantization.rounding == "gptq":
        blocks += ",\nrounded by GPTQ"
    rows = {phase for phase in Phase if quantization.multiplies_rows(phase)}
    if not rows:
        return blocks
    if rows == set(Phase):
        return f"row by row; the head {blocks}"
    return f"{blocks}; for prefill once more,\nin 8 bits row by row"
