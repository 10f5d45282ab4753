"""`voidprune plan`, and what `export` plans on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from voidprune.cli.options import (
    budget_options,
    json_option,
    output_option,
    output_target,
    overwrite_option,
    seed_option,
)
from voidprune.cli.output import print_tables, progress_bars

if TYPE_CHECKING:
    from voidprune.models.checkpoint import Checkpoint
    from voidprune.profiling.profile import Profile
    from voidprune.schedule import ModelIdentity, Schedule


@click.command()
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@output_option("Schedule", required=False)
@budget_options
@seed_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@json_option
def plan(profile_file: Path, output: Path | None, overwrite: bool, dry_run: bool, as_json: bool, **budget: Any) -> None:
    """Turn a profile and a budget into a schedule.

    \b
      voidprune plan profile.json -o schedule.json --keep 0.5 --criterion block-influence
    """
    from voidprune import artifacts
    from voidprune.profiling.profile import read_profile
    from voidprune.schedule import write_schedule

    target = output_target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_file(target, overwrite=overwrite)
    measured = read_profile(profile_file)
    planned = _plan(measured.model, measured, **budget)
    _print_plan(measured, planned, as_json=as_json)
    if target is not None:
        write_schedule(target, planned, overwrite=overwrite)


def _plan(
    model: ModelIdentity,
    measured: Profile | None,
    *,
    keep: float | None,
    keep_prefill: float | None,
    keep_decode: float | None,
    criterion: str,
    phases: str,
    boundary: str,
    single_turn: bool,
    seed: int,
) -> Schedule:
    from voidprune.planning.planner import plan_schedule
    from voidprune.schedule import Boundary, Phase

    ratios = {
        Phase.PREFILL: keep if keep_prefill is None else keep_prefill,
        Phase.DECODE: keep if keep_decode is None else keep_decode,
    }
    chosen = {phase: ratio for phase, ratio in ratios.items() if ratio is not None}
    if len(chosen) < len(ratios):
        raise click.UsageError("say how many layers to keep: --keep, or --keep-prefill and --keep-decode")
    return plan_schedule(
        model,
        measured,
        criterion=criterion,
        keep=chosen,
        shared=phases == "shared",
        boundary=Boundary(boundary),
        single_turn=single_turn,
        seed=seed,
    )


def plan_export(checkpoint: Checkpoint, profile_file: Path | None, *, quiet: bool, **budget: Any) -> Schedule:
    """A schedule for an export that was given none: from the profile at hand, or from one made on the way."""
    from voidprune.pipeline.profile import profile_model
    from voidprune.planning.criteria import find_criterion
    from voidprune.planning.planner import num_kept
    from voidprune.profiling.calibration import default_rows
    from voidprune.profiling.profile import read_profile

    ratios = [budget[name] for name in ("keep", "keep_prefill", "keep_decode") if budget[name] is not None]
    for ratio in ratios:
        num_kept(ratio, checkpoint.architecture.num_layers)
    measured = None
    if profile_file is not None:
        measured = read_profile(profile_file)
    elif ratios and find_criterion(budget["criterion"]).needs_profile:
        context = checkpoint.architecture.context_length
        measured = profile_model(
            checkpoint, default_rows(), max_new_tokens=min(64, context // 2), track=progress_bars(quiet)
        )
    return _plan(checkpoint.identity, measured, **budget)


def _print_plan(measured: Profile, planned: Schedule, *, as_json: bool) -> None:
    from dataclasses import asdict

    from voidprune.planning.costs import baseline_costs, schedule_costs
    from voidprune.tables import costs_table, schedule_table

    if as_json:
        costs = asdict(schedule_costs(measured.sizes, planned))
        whole = asdict(baseline_costs(measured.sizes, planned))
        document = {"schedule": planned.to_document(), "costs": costs, "baseline": whole}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_tables(schedule_table(planned), costs_table(measured.sizes, planned))
