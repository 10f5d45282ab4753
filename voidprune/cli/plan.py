"""`voidprune plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from voidprune.cli.completion import complete_source
from voidprune.cli.options import (
    budget_options,
    json_option,
    output_option,
    output_target,
    overwrite_option,
    plan_request,
    quiet_option,
    seed_option,
    trial_options,
)
from voidprune.cli.output import print_tables, progress_bars
from voidprune.planning.search import GOALS

if TYPE_CHECKING:
    from voidprune.pipeline.plan import Planned


@click.command()
@click.argument("source", metavar="PROFILE|MODEL", shell_complete=complete_source)
@output_option("Schedule", required=False)
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="With a MODEL: its profile.")
@click.option(
    "--from-probe",
    type=click.Path(path_type=Path),
    help="What a probe showed to be harmless: from the depth of freeze up K/V only in prefill, from that of skip-attention up no "
    "attention in either phase; both at once, which no probe measures: check it with voidprune eval.",
)
@budget_options
@trial_options
@seed_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@json_option
@quiet_option
def plan(
    source: str,
    output: Path | None,
    profile_file: Path | None,
    from_probe: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Turn a budget into a schedule: from a profile at once, or by trying schedules on the model.

    \b
      voidprune plan profile.json -o schedule.json --keep 0.5 --criterion block-influence
      voidprune plan MODEL -o schedule.json --goal fast-prompt --dataset prompts.jsonl
      voidprune plan MODEL -o schedule.json --max-decode-bytes 700MB --criterion search-loss
      voidprune plan MODEL -o schedule.json --from-probe probe.json
    """
    from voidprune import artifacts
    from voidprune.models.sizes import measure_sizes
    from voidprune.pipeline.models import open_model
    from voidprune.pipeline.plan import plan_from_model, plan_from_profile
    from voidprune.profiling.profile import read_profile
    from voidprune.schedule import write_schedule

    target = output_target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_file(target, overwrite=overwrite)
    probe = None
    if from_probe is not None:
        from voidprune.pipeline.probe import read_harmless_depths

        probe = read_harmless_depths(from_probe)
    request = plan_request(**options, probe=probe)
    if Path(source).is_file():
        if profile_file is not None:
            raise click.UsageError("--profile goes with a MODEL; a profile is given already")
        planned = plan_from_profile(request, read_profile(Path(source)))
    else:
        checkpoint = open_model(source)
        planned = plan_from_model(
            request,
            checkpoint,
            sizes=measure_sizes(checkpoint),
            profile=None if profile_file is None else read_profile(profile_file),
            output=target,
            overwrite=overwrite,
            track=progress_bars(quiet),
        )
    print_plan(planned, as_json=as_json)
    if target is not None:
        write_schedule(target, planned.schedule, overwrite=overwrite)


def print_plan(planned: Planned, *, as_json: bool) -> None:
    """The schedule, what it costs beside the whole model, and how sure the choice of its layers is."""
    from dataclasses import asdict

    from voidprune.planning.costs import baseline_costs, schedule_costs
    from voidprune.planning.intervals import schedule_cuts
    from voidprune.tables import costs_table, cuts_table, free_part_table, schedule_table

    schedule, sizes, free = planned.schedule, planned.sizes, planned.free
    cuts = {} if planned.profile is None else schedule_cuts(planned.profile, schedule)
    if as_json:
        document = {
            "schedule": schedule.to_document(),
            "costs": asdict(schedule_costs(sizes, schedule)),
            "baseline": asdict(baseline_costs(sizes, schedule)),
            "cuts": {str(phase): asdict(cut) for phase, cut in cuts.items()},
            "free": None if free is None else asdict(free.comparison),
        }
        click.echo(json.dumps(document, indent=2, sort_keys=True))
        return
    print_tables(
        schedule_table(schedule),
        costs_table(sizes, schedule),
        *([cuts_table(cuts)] if cuts else []),
        *([free_part_table(free)] if free is not None else []),
    )
    if free is not None:
        click.echo(f"what to expect: {GOALS[str(schedule.origin['goal'])].expect}")
