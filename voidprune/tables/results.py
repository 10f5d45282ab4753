"""Quality, beside the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from voidprune.tables.figures import (
    Heading,
    format_interval,
    format_level,
    format_share,
    split_columns,
)


def evaluation_table(document: Mapping[str, Any]) -> Group:
    """Every runner by itself, then the last one beside the whole model, item by item, where that ran."""
    against = document["runners"][-1]["against_whole"]
    tables = [_runners_table(document)]
    if against is not None:
        tables.append(_against_table(document["runners"][-1]["name"], against))
    return Group(*tables)


def _runners_table(document: Mapping[str, Any]) -> Table:
    runners: Sequence[Mapping[str, Any]] = document["runners"]
    first = runners[0]
    table = Table(
        title=f"evaluation of {document['model']} on {document['dataset']}",
        caption=f"{document['num_items']} items, 95 % intervals",
    )
    table.add_column("", overflow="fold")
    for result in runners:
        table.add_column(result["name"], justify="right", no_wrap=True)
    if first["perplexity"] is not None:
        table.add_row("perplexity", *(format_level(result["perplexity"], 4) for result in runners))
        levels = [[format_level(bound, 3) for bound in result["perplexity_interval"]] for result in runners]
        table.add_row(f"  {first['num_scored']:,} given tokens", *(f"[{low}-{high}]" for low, high in levels))
    for task, accuracy in first["accuracy"].items():
        found = [result["accuracy"][task] for result in runners]
        table.add_row(f"{task} ({accuracy['num_items']} items)", *map(format_share, found))
        if accuracy["normalized"] is not None:
            table.add_row("  a character", *(format_share(one["normalized"]) for one in found))
    if first["generation"] is not None:
        found = [result["generation"] for result in runners]
        table.add_section()
        table.add_row("mean tokens generated", *(f"{one['mean_length']['value']:.1f}" for one in found))
        table.add_row("cut at the longest", *(f"{one['cut']['value']:.1%}" for one in found))
        table.add_row("ends in a loop", *(f"{one['looping']['value']:.1%}" for one in found))
    if document["different_responses"] is not None and first["generation"] is not None:
        assert isinstance(table.caption, str)
        table.caption += f"; responses that differ, reference to onnx: {document['different_responses']}"
    return table


def _against_table(name: str, against: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{name} against the whole model, item by item",
        caption="accuracy in points; p: exact McNemar test",
    )
    for column in ("", "value", "95 % interval", "p", "lost, won"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column), overflow="fold")
    ratio, agreement = against["perplexity_ratio"], against["agreement"]
    if ratio is not None:
        table.add_row(
            "perplexity, ratio", f"{ratio['value']:.4f}", format_interval(ratio["interval"], "{:.4f}"), "", ""
        )
    if agreement is not None:
        top1, kl = agreement["top1"], agreement["kl"]
        table.add_row(
            "same likeliest token", f"{top1['value']:.1%}", format_interval(top1["interval"], "{:.1%}"), "", ""
        )
        table.add_row("KL, nats a token", f"{kl['value']:.4f}", format_interval(kl["interval"], "{:.4f}"), "", "")
    overall = {"all tasks": against["overall"]} if len(against["accuracy"]) > 1 else {}
    for task, found in {**against["accuracy"], **overall}.items():
        table.add_row(
            task,
            f"{found['difference'] * 100:+.1f}",
            format_interval([100 * bound for bound in found["interval"]], "{:+.1f}"),
            f"{found['p_value']:.2g}",
            f"{found['num_only_whole']}, {found['num_only_this']}",
        )
    return table


def harness_table(document: Mapping[str, Any]) -> Group:
    """Every metric of every task, runner by runner, then the last one beside the whole model, where that ran."""
    runners: Sequence[Mapping[str, Any]] = document["runners"]
    last = runners[-1]
    cut = sum(runner["num_cut_contexts"] for runner in runners)
    notes = ["95 % intervals"]
    if cut:
        notes.append(f"{cut} contexts were cut on the left to fit")
    if (compared := document.get("num_compared_prompts")) is not None:
        notes.append(
            f"none of {compared} prompts is, token for token, one that its weights were fitted to"
            if compared
            else "no prompt could be compared with those that its weights were fitted to"
        )
    table = Table(title=f"lm_eval on {document['model']}", caption="; ".join(notes))
    against = Table(title=f"{last['name']} against the whole model, item by item")
    table.add_column("task, metric", overflow="fold")
    for runner in runners:
        table.add_column(runner["name"], justify="right", no_wrap=True)
    for column in ("task, metric", "difference", "95 % interval", "p"):
        is_name = column == "task, metric"
        against.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for name, task in last["tasks"].items():
        for metric, judged in task["metrics"].items():
            label = f"{name} {metric.removesuffix(',none')}"
            found = [runner["tasks"][name]["metrics"][metric] for runner in runners]
            table.add_row(label, *(f"{one['value']:.6g}" for one in found))
            if judged["interval"] is not None:
                intervals = ["[{:.3f}-{:.3f}]".format(*one["interval"]) for one in found]
                table.add_row(f"  {task['num_items']} items", *intervals)
            if (difference := judged["against_whole"]) is not None:
                p_value = "" if difference["p_value"] is None else f"{difference['p_value']:.2g}"
                interval = format_interval(difference["interval"], "{:+.3f}")
                against.add_row(label, f"{difference['difference']:+.4f}", interval, p_value)
    return Group(table, against) if against.row_count else Group(table)


def comparison_table(document: Mapping[str, Any]) -> Group:
    """Criteria at equal cost, best first; the winner's lead, and whether it is larger than the noise.

    Tasks that do not fit beside the first ones stand in tables of their own.
    """
    tasks = list(document["whole"]["accuracy"] or ()) if document["measure"] == "accuracy" else []
    widths = [
        max(len(_criterion_name(row)) for row in document["rows"]),
        max(len(_ratio(row)) for row in document["rows"]),
        len("100.0%"),
    ]
    parts = split_columns(tasks, room=80 - 1 - sum(width + 3 for width in widths), cell=4) or [[]]
    tables, shown = [], 0
    for number, headings in enumerate(parts, start=1):
        part = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
        tables.append(_criteria_table(document, tasks[shown : shown + len(headings)], headings, tasks, part))
        shown += len(headings)
    return Group(*tables)


def _criterion_name(row: Mapping[str, Any]) -> str:
    leads = row["margin"] is not None and row["margin"][1] > 0
    return str(row["criterion"]) + (" *" if leads else "")


def _ratio(row: Mapping[str, Any]) -> str:
    ratio: float = row["perplexity_ratio"]
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.2g}"


def _criteria_table(
    document: Mapping[str, Any], shown: Sequence[str], headings: Sequence[Heading], tasks: Sequence[str], part: str
) -> Table:
    table = Table(
        title=f"criteria at equal cost: {document['model']['name']}, {document['dataset']}{part}",
        caption=f"{document['num_judging']} items that no layer was chosen by; * leads by more than chance (95 %)",
    )
    table.add_column("criterion", no_wrap=True)
    for heading in headings:
        table.add_column(heading.name, justify="right", width=heading.width, overflow="fold")
    for name in (*(("mean",) if tasks else ()), "ppl x"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in document["rows"]:
        budget = (row["scope"], row["keep"])
        if budget != before:
            table.add_section()
            table.add_row(Text(f"{row['scope']} {row['keep']:g}", style="bold"))
        before = budget
        shares = {task: row["accuracy"][task]["share"] for task in tasks}
        table.add_row(
            _criterion_name(row),
            *(f"{shares[task]:.0%}" for task in shown),
            *([f"{sum(shares.values()) / len(shares):.1%}"] if tasks else []),
            _ratio(row),
        )
    return table
