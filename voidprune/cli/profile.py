"""`voidprune profile`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from voidprune.cli.completion import complete_model
from voidprune.cli.options import calibration_options, json_option, output_option, overwrite_option, quiet_option
from voidprune.cli.output import progress_bars, show_result

if TYPE_CHECKING:
    from voidprune.models.checkpoint import Checkpoint
    from voidprune.profiling.profile import Profile


@click.command()
@click.argument("model", shell_complete=complete_model)
@output_option("Profile")
@calibration_options
@overwrite_option
@json_option
@quiet_option
def profile(model: str, output: Path, overwrite: bool, as_json: bool, quiet: bool, **calibration: Any) -> None:
    """Measure every layer, in prefill and in decode. A run that was killed is resumed by repeating it.

    \b
      voidprune profile Qwen/Qwen2.5-0.5B-Instruct -o profile.json --dataset prompts.jsonl
    """
    from voidprune import artifacts
    from voidprune.pipeline.models import open_model
    from voidprune.tables import profile_table

    artifacts.check_output_file(output, overwrite=overwrite)
    measured = measure_profile(open_model(model), output=output, overwrite=overwrite, quiet=quiet, **calibration)
    show_result(measured.to_document(), profile_table, measured, as_json=as_json)


def measure_profile(
    checkpoint: Checkpoint,
    *,
    dataset: Path | None,
    alpha: float,
    lac_arithmetic: str,
    dtype: str | None,
    device: str | None,
    quiet: bool,
    **settings: Any,
) -> Profile:
    from voidprune.pipeline.profile import profile_model
    from voidprune.profiling.calibration import default_rows, read_rows
    from voidprune.profiling.profile import LacSettings

    if not math.isfinite(alpha):
        raise click.UsageError("--alpha is not a number")
    return profile_model(
        checkpoint,
        default_rows() if dataset is None else read_rows(dataset),
        dataset="default" if dataset is None else dataset.name,
        lac=LacSettings(alpha=alpha, arithmetic=lac_arithmetic),
        dtype=dtype,
        device=device,
        track=progress_bars(quiet),
        **settings,
    )
