"""What layers do in each phase, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from voidprune.models.sizes import ModelSizes
from voidprune.planning.costs import PROMPT_LENGTH, baseline_costs, schedule_costs
from voidprune.schedule import Phase, Schedule
from voidprune.tables.figures import format_bytes, format_flops
from voidprune.tables.heat_maps import ACTION_NAMES, schedule_map

if TYPE_CHECKING:
    from voidprune.pipeline.planning import FreePart
    from voidprune.quality.noninferiority import Loss


def schedule_table(schedule: Schedule) -> Group:
    """The actions as a strip a phase, then layer by layer in words."""
    return Group(schedule_map(schedule), _actions_table(schedule))


def _actions_table(schedule: Schedule) -> Table:
    table = Table(title=f"{schedule.model.name}: {describe_origin(schedule)}")
    table.add_column("layer", justify="right", no_wrap=True)
    for name in ("prefill", "decode", "in checkpoint"):
        table.add_column(name, no_wrap=True)
    for layer in range(schedule.num_layers):
        actions = [schedule.actions(phase)[layer] for phase in Phase]
        styled = [Text(ACTION_NAMES[action], style="" if action.executes else "dim") for action in actions]
        table.add_row(str(layer), *styled, "yes" if layer in schedule.union else "dropped")
    return table


def describe_origin(schedule: Schedule) -> str:
    """The criterion first, then by name: the same whether the schedule was just planned or read from a file."""
    names = sorted(schedule.origin.keys() - {"calibration"}, key=lambda name: (name != "criterion", name))
    told = (f"{name.replace('_', ' ')} {schedule.origin[name]}" for name in names)
    return ", ".join(told) or "schedule"


def costs_table(sizes: ModelSizes, schedule: Schedule) -> Table:
    """What the schedule keeps and costs, beside the whole model."""
    costs, whole = schedule_costs(sizes, schedule), baseline_costs(sizes, schedule)
    table = Table(title="costs", caption=f"prefill and decode: prompt of {PROMPT_LENGTH} tokens")
    table.add_column("")
    table.add_column("whole model", justify="right", no_wrap=True)
    table.add_column("schedule", justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    for phase in Phase:
        executed = schedule.num_executed(phase)
        table.add_row(
            f"layers executed in {phase}",
            str(schedule.num_layers),
            str(executed),
            f"{executed / schedule.num_layers:.2f}",
        )
    rows = [
        ("weights", whole.weight_bytes, costs.weight_bytes, format_bytes),
        ("K/V a token", whole.kv_bytes_per_token, costs.kv_bytes_per_token, format_bytes),
        ("prefill arithmetic", whole.prefill_flops, costs.prefill_flops, format_flops),
        ("decode: read a token", whole.decode_bytes, costs.decode_bytes, format_bytes),
    ]
    for name, before, after, form in rows:
        table.add_row(name, form(before), form(after), f"{after / before:.2f}" if before else "-")
    return table


def free_part_table(free: FreePart) -> Table:
    """What can go at no loss: the schedule, and each phase apart where both were cut."""
    table = Table(
        title=f"beside the whole model, allowed {free.comparison.bound:.1%}",
        caption="estimate (upper end of a one-sided 95 % interval) on items that no layer was chosen by",
    )
    table.add_column("", overflow="fold")
    shown = {**free.parts, "found": (free.schedule, free.comparison)}
    for name in shown:
        table.add_column(name if name == "found" else f"{name} alone", justify="right", no_wrap=True)
    for phase in Phase:
        executed = (f"{schedule.num_executed(phase)} of {schedule.num_layers}" for schedule, _ in shown.values())
        table.add_row(f"layers in {phase}", *executed)

    def tell(loss: Loss) -> str:
        return f"{loss.estimate:.2%} ({loss.upper:.2%})"

    table.add_row("perplexity up", *(tell(comparison.perplexity) for _, comparison in shown.values()))
    for task in free.comparison.accuracy:
        table.add_row(f"{task} down", *(tell(comparison.accuracy[task]) for _, comparison in shown.values()))
    return table
