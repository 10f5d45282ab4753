"""Tables of results fit into 80 columns: many tasks, long names, three runners, large figures."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

from tests.benchmark_documents import benchmark_document
from tests.report.test_findings import evaluation
from tests.tables import LONG_NAME, cells, numbers_broken_off, render
from tests.test_plots import make_comparison
from voidprune.tables import benchmark_table, comparison_table, evaluation_table, harness_table

TASKS = (
    "arithmetic", "multiple-choice", "sorting", "yes-no", "summaries-of-newspapers", "capitals",
    "a_task_without_any_place_to_break_its_name", "boolq",
)  # fmt: skip


def with_tasks(row: dict[str, Any], tasks: tuple[str, ...]) -> None:
    (found,) = list(row["accuracy"].values())[:1]
    row["accuracy"] = {task: {**found, "share": 1.0} for task in tasks}


@pytest.mark.parametrize("num_tasks", [1, 4, 8])
def test_criteria_at_equal_cost(num_tasks: int) -> None:
    document = make_comparison()
    document["model"]["name"] = LONG_NAME
    for row in (document["whole"], *document["rows"]):
        with_tasks(row, TASKS[:num_tasks])
    document["rows"][1]["perplexity_ratio"] = 1234567.0
    text = render(comparison_table(document))
    assert not numbers_broken_off(text)
    found = cells(text)
    assert "1.2e+06" in found
    tables = text.count("ppl x")
    assert found.count("100.0%") == tables * len(document["rows"])  # the mean
    assert found.count("100%") == num_tasks * len(document["rows"])
    assert tables == {1: 1, 4: 1, 8: 3}[num_tasks]
    for budget in ("bytes 0.75", "bytes 0.5", "prefill 0.75", "prefill 0.5"):
        assert found.count(budget) == tables


def test_criteria_by_loss_alone() -> None:
    text = render(comparison_table(make_comparison(asked=False)))
    assert "mean" not in text
    assert "ppl x" in text


def test_an_evaluation_of_three_runners() -> None:
    document = evaluation()
    document["model"] = LONG_NAME
    whole, onnx = document["runners"]
    document["runners"] = [whole, {**deepcopy(onnx), "name": "reference"}, onnx]
    for runner in document["runners"]:
        with_tasks(runner, TASKS)
        runner |= {"perplexity": 123456.789, "perplexity_interval": [98765.4321, 1234567.8], "num_scored": 1234567}
        if runner["against_whole"] is not None:
            (found,) = runner["against_whole"]["accuracy"].values()
            runner["against_whole"]["accuracy"] = dict.fromkeys(TASKS, found)
            runner["against_whole"]["overall"] = found
    text = render(evaluation_table(document))
    assert not numbers_broken_off(text)
    found = cells(text)
    assert found.count("123457") == 3
    assert found.count("[98765-1.23e+06]") == 3
    assert found.count("100.0% [10-90]") == 3 * len(TASKS)
    assert found.count("-75.0 to +37.5") == len(TASKS) + 1


def test_the_harness_with_long_names() -> None:
    metrics = {
        "exact_match,flexible-extract-of-the-last-number": {
            "value": 0.123456, "interval": [0.1, 0.2],
            "against_whole": {"difference": -0.123456, "interval": [-0.2, 0.1], "p_value": 1.2e-05},
        },
        "word_perplexity,none": {"value": 1.77792e10, "interval": None, "against_whole": None},
    }  # fmt: skip
    tasks = {task: {"num_items": 14042, "metrics": metrics} for task in (*TASKS, "mmlu_high_school_european_history")}
    runners = [
        {"name": name, "num_cut_contexts": 12345, "tasks": tasks} for name in ("whole model", "reference", "onnx")
    ]
    text = render(harness_table({"model": LONG_NAME, "runners": runners}))
    assert not numbers_broken_off(text)
    assert cells(text).count("1.77792e+10") == 3 * len(tasks)
    assert cells(text).count("[0.100-0.200]") == 3 * len(tasks)
    assert cells(text).count("-0.200 to +0.100") == len(tasks)


def test_times_of_a_large_model() -> None:
    document = benchmark_document(
        ttft=12.345678, tpot=12.345678, ratio=1.0, num_bytes=141_107_412_992, provider="cuda", length=131072,
        machine="Linux x86_64, a processor with a long name indeed, 128 cores, a GPU with a long name, 141 GB",
    )  # fmt: skip
    text = render(benchmark_table(document))
    assert not numbers_broken_off(text)
    assert cells(text).count("12.3 (12.2-12.5)") == 4
    assert re.search(r"141\.11 GB", text)
