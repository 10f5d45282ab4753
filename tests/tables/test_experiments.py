"""Tables of LAC at run time and of probes fit into 80 columns, with 80 layers too."""

from __future__ import annotations

import pytest

from tests.tables import LONG_NAME, cells, numbers_broken_off, render
from voidprune import artifacts
from voidprune.tables import adaptive_tables, probe_tables

TASKS = ("arithmetic", "multiple-choice", "sorting", "yes-no", "summaries-of-newspapers")


def make_adaptive(num_layers: int) -> artifacts.Document:
    counted = {
        "active": [1] * num_layers, "depths": [*range(num_layers + 1)], "last_layer_share": 1.0, "mean_use": 1.0,
        "num_tokens": 7306, "mean_depth": 123.45,
    }  # fmt: skip
    usage = {part: {"prefill": counted, "decode": counted, "read": counted} for part in ("scored", "generated")}
    accuracy = {"interval": [0.963, 1.0], "num_items": 10000, "num_right": 10000, "share": 1.0}
    return {
        "model": LONG_NAME,
        "dataset": "a-dataset-with-a-long-name.jsonl",
        "num_layers": num_layers,
        "settings": {"sampling": {"temperature": 0.6, "top_p": 0.9}, "arithmetic": "float32"},
        "runs": [
            {
                "name": name,
                "alpha": alpha,
                "perplexity": 1899.1078,
                "accuracy": dict.fromkeys(TASKS, accuracy),
                "same_as_whole": 10000,
                "usage": usage,
                "rules": {part: {"executed": {"prefill": 80, "decode": 80}} for part in usage},
            }
            for name, alpha in (("whole model", None), ("static, as readout", 0.85), ("random layers", 0.85))
        ],
    }


@pytest.mark.parametrize("num_layers", [12, 80])
def test_lac_at_run_time(num_layers: int) -> None:
    text = render(*adaptive_tables(make_adaptive(num_layers)))
    assert not numbers_broken_off(text)
    found = cells(text)
    assert found.count("100.0%") == len(TASKS) * 3
    assert found.count("[96-100]") == len(TASKS) * 3
    assert found.count("1899.1") == 3
    assert found.count("100%, 100%") >= 2 * 2 * 2


@pytest.mark.parametrize("is_answered", [True, False])
def test_probes(is_answered: bool) -> None:
    value = {"value": 1.0 if is_answered else 123.456, "interval": [0.25, 1.0] if is_answered else [9.0, 456.0]}
    task = {"accuracy" if is_answered else "perplexity_ratio": value, "switched": 1.0}
    names = ("random", "freeze", "skip-attention", "switch", "shuffle")
    whole = {
        "accuracy": 1.0 if is_answered else None, "perplexity": 123.456, "num_items": 10000, "num_items_needed": 20000,
    }  # fmt: skip
    document = {
        "model": {"name": LONG_NAME, "num_layers": 80},
        "settings": {"margin": 0.01},
        "whole": dict.fromkeys(TASKS, whole),
        "results": [
            {
                "intervention": name,
                "scope": scope,
                "harmless_from": None,
                "unharmed_from": 79,
                "points": [{"depth": depth, "tasks": dict.fromkeys(TASKS, task)} for depth in range(80)],
            }
            for name in names
            for scope in ("prompt", "published")
        ],
    }
    text = render(*probe_tables(document))
    assert not numbers_broken_off(text)
    shown = "100%±38" if is_answered else "123.5±223.5"
    assert cells(text).count(shown) == len(TASKS) * 2 * 80 * len(names)
