"""Commands that would add what is missing. DIR is the folder of the results."""

from __future__ import annotations

import shlex

from voidprune.execution.manifest import Manifest
from voidprune.report.findings import Findings


def source_name(findings: Findings) -> str:
    """What the model is called on the command line, as far as that was written down."""
    known = findings.schedule or findings.profile
    result = findings.comparison or findings.probe
    name = known.model.name if known is not None else "MODEL" if result is None else str(result["model"]["name"])
    if findings.manifest is not None:
        name = findings.manifest.source
    return {"voidprune-demo": "demo"}.get(name, name)


def quoted_source(findings: Findings) -> str:
    """`source_name` as a shell takes it."""
    return shlex.quote(source_name(findings))


def bundle_path(findings: Findings) -> str:
    """As a shell takes it."""
    return shlex.quote({"": "DIR/pruned", ".": "DIR"}.get(findings.bundle, f"DIR/{findings.bundle}"))


def export_options(manifest: Manifest) -> str:
    """What a bundle was made with, as far as it is not what `export` does anyway."""
    found = ["--precision", manifest.precision]
    if manifest.graphs and manifest.operators != "ort":
        found += ["--ops", manifest.operators]
    if len({graph.file for graph in manifest.graphs.values()}) == 1:
        found += ["--layout", "single"]
    if (packed := manifest.quantization) is not None:
        found += ["--block-size", str(packed.block_size), "--activations", packed.activations]
        found += ["--zero-points"] if packed.zero_points else []
        found += ["--bits", f"{packed.average_bits:.3g}"] if packed.precision == "mixed" else []
    return shlex.join(found)


def evaluation_command(findings: Findings) -> str:
    if findings.manifest is None and findings.schedule is not None:
        return f"voidprune eval {quoted_source(findings)} --schedule DIR/schedule.json --tasks TASKS -o DIR/evaluation.json"
    return f"voidprune eval {bundle_path(findings)} --baseline {quoted_source(findings)} --tasks TASKS -o DIR/evaluation.json"


def benchmark_command(findings: Findings) -> str:
    return f"voidprune bench {bundle_path(findings)} --baseline {quoted_source(findings)} -o DIR/benchmark.json"
