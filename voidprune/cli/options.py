"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from voidprune.planning.criteria import CRITERIA

Command = TypeVar("Command", bound=Callable[..., Any])


def output_option(what: str, *, required: bool = True) -> Callable[[Command], Command]:
    return click.option("-o", "--output", type=click.Path(path_type=Path), required=required, help=f"{what} to write.")


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output where it exists.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default=None,
    help="onnxruntime provider. Default: cuda where it works.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")


def budget_options(command: Command) -> Command:
    options = [
        click.option("--keep", type=float, help="Share of layers to run in each phase, in (0, 1]."),
        click.option("--keep-prefill", type=float, help="The same, for prefill only."),
        click.option("--keep-decode", type=float, help="The same, for decode only."),
        click.option(
            "--criterion",
            type=click.Choice(list(CRITERIA)),
            default="lac",
            show_default=True,
            help="How to rank layers.",
        ),
        click.option(
            "--phases",
            type=click.Choice(["split", "shared"]),
            default="split",
            show_default=True,
            help="One set of layers a phase, or one for both.",
        ),
        click.option(
            "--boundary",
            type=click.Choice(["decode", "prefill"]),
            default="decode",
            show_default=True,
            help="The phase of the last prompt token.",
        ),
        click.option("--single-turn", is_flag=True, help="Give up second turns, and the K/V that only they need."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def calibration_options(command: Command) -> Command:
    options = [
        click.option(
            "--dataset", type=click.Path(path_type=Path), help="JSONL or text. Default: prompts that ship with it."
        ),
        click.option("--num-samples", type=click.IntRange(min=1), help="Use the first N samples only."),
        click.option(
            "--responses",
            type=click.Choice(["generate", "dataset"]),
            default="generate",
            show_default=True,
            help="Let the model answer, or take the responses of the dataset.",
        ),
        click.option(
            "--alpha", type=click.FloatRange(min=0), default=0.8, show_default=True, help="LAC's threshold factor."
        ),
        click.option(
            "--lac-arithmetic",
            type=click.Choice(["float32", "model"]),
            default="float32",
            show_default=True,
            help='Norms and thresholds in float32, or in the dtype of the model ("as published").',
        ),
        click.option(
            "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest response."
        ),
        click.option(
            "--max-length", type=click.IntRange(min=2), help="Longest prompt and response. Default: the context."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True),
        click.option(
            "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default=None, help="Default: fp32, bf16 on CUDA."
        ),
        click.option("--device", help='Torch device. Default: "cuda" where there is one, else "cpu".'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def output_target(output: Path | None, *, dry_run: bool) -> Path | None:
    """Where to write; None for a dry run."""
    if dry_run:
        return None
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    return output
