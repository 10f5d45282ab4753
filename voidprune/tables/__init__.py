"""Artefacts as text for a terminal of 80 columns: heat maps and tables. Nothing is computed here."""

from voidprune.tables.benchmarks import benchmark_table
from voidprune.tables.bundles import describe_fidelity, manifest_table
from voidprune.tables.differences import diff_tables
from voidprune.tables.experiments import adaptive_tables, probe_tables
from voidprune.tables.figures import format_bytes
from voidprune.tables.profiles import cuts_table, profile_table
from voidprune.tables.results import comparison_table, evaluation_table, harness_table
from voidprune.tables.schedules import costs_table, describe_origin, free_part_table, schedule_table

__all__ = [
    "adaptive_tables",
    "benchmark_table",
    "comparison_table",
    "costs_table",
    "cuts_table",
    "describe_fidelity",
    "describe_origin",
    "diff_tables",
    "evaluation_table",
    "format_bytes",
    "free_part_table",
    "harness_table",
    "manifest_table",
    "probe_tables",
    "profile_table",
    "schedule_table",
]
