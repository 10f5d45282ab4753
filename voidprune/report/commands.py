"""Commands that would add what is missing. DIR is the folder of the results."""

from __future__ import annotations

import shlex

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


def evaluation_command(findings: Findings) -> str:
    if findings.manifest is None and findings.schedule is not None:
        return f"voidprune eval {quoted_source(findings)} --schedule DIR/schedule.json --tasks TASKS -o DIR/evaluation.json"
    return f"voidprune eval {bundle_path(findings)} --baseline {quoted_source(findings)} --tasks TASKS -o DIR/evaluation.json"


def benchmark_command(findings: Findings) -> str:
    return f"voidprune bench {bundle_path(findings)} --baseline {quoted_source(findings)} -o DIR/benchmark.json"
