"""`voidprune heal`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from voidprune.cli.completion import complete_model, complete_tasks
from voidprune.cli.options import (
    Layers,
    device_option,
    dtype_option,
    json_option,
    max_new_tokens_option,
    output_option,
    overwrite_option,
    quiet_option,
    responses_option,
    seed_option,
    together,
)
from voidprune.cli.output import progress_bars, show_result

if TYPE_CHECKING:
    from voidprune.healing.settings import DistillSettings
    from voidprune.healing.training_state import Measurement

training_options = together(
    [
        click.option(
            "--parameters",
            type=click.Choice(["lora", "full"]),
            default="lora",
            show_default=True,
            help="Train low-rank changes of the layers, which are merged at the end, or all of their weights.",
        ),
        click.option(
            "--rank", type=click.IntRange(min=1), default=32, show_default=True, help="Of the low-rank changes."
        ),
        click.option("--embeddings", is_flag=True, help="With --parameters full: train these and the head, too."),
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            default=1000,
            show_default=True,
            help="At most; it ends early once the held-out loss falls no more.",
        ),
        click.option(
            "--max-minutes",
            type=click.FloatRange(min=0, min_open=True),
            help="End after so much training. The learning rate follows --steps: ask for no more than that holds.",
        ),
        click.option("--evaluate-every", type=click.IntRange(min=1), default=100, show_default=True, help="Steps."),
        click.option(
            "--heal-batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples a step."
        ),
        click.option(
            "--learning-rate",
            type=click.FloatRange(min=0, min_open=True),
            help="The peak. Default: by the model's width.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="Softens what is learned from.",
        ),
        click.option("--top-k", type=click.IntRange(min=1), help="Learn from the teacher's K likeliest tokens only."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="bf16: autocast.",
        ),
        click.option("--checkpointing", is_flag=True, help="Save memory: layers run again for their gradients."),
        seed_option,
    ]
)
"""What only --method distill knows."""


def training_settings(
    context: click.Context, *, methods: tuple[str, ...], rank: int, heal_batch_size: int, temperature: float,
    top_k: int | None, **rest: Any
) -> DistillSettings:  # fmt: skip
    """The options of `training_options`, refused where nothing is trained."""
    from voidprune.healing.losses import DistillLoss
    from voidprune.healing.settings import DistillSettings

    names = ("rank", "heal_batch_size", "temperature", "top_k", *rest)
    given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    if given and "distill" not in methods:
        raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --method distill")
    loss = DistillLoss(temperature=temperature, top_k=top_k)
    return DistillSettings(rank=rank, alpha=rank, batch_size=heal_batch_size, loss=loss, **rest)


@click.command()
@click.argument("model", shell_complete=complete_model)
@output_option("Folder")
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="Made by plan.")
@click.option(
    "--rounds",
    "num_rounds",
    type=click.IntRange(min=1),
    help="In place of --schedule: leave out a few layers, heal, choose the next on the healed model. The training is a round's.",
)
@click.option("--keep", type=float, help="With --rounds: share of layers to run in each phase in the end, in (0, 1].")
@click.option("--keep-prefill", type=float, help="The same, for prefill only.")
@click.option("--keep-decode", type=float, help="The same, for decode only.")
@click.option("--protect", type=Layers(), help="With --rounds: run these whole, whatever else goes.")
@click.option(
    "--phases",
    type=click.Choice(["split", "shared"]),
    default="split",
    show_default=True,
    help="With --rounds: one set of layers a phase, or one for both.",
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(["linear", "distill"]),
    multiple=True,
    help="Several: one after the other. Default: linear.",
)
@click.option(
    "--dataset",
    shell_complete=complete_tasks,
    help='A JSONL or text file, "demo", or one of its tasks. Default: prompts that ship with it.',
)
@click.option("--num-samples", type=click.IntRange(min=2), help="Use the first N samples of a file, or of each task.")
@responses_option
@max_new_tokens_option
@click.option("--max-length", type=click.IntRange(min=2), help="Longest prompt and response. Default: the context.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@training_options
@dtype_option
@device_option
@overwrite_option
@json_option
@quiet_option
@click.pass_context
def heal(
    context: click.Context,
    /,
    *,
    model: str,
    output: Path,
    schedule_file: Path | None,
    num_rounds: int | None,
    keep: float | None,
    keep_prefill: float | None,
    keep_decode: float | None,
    protect: frozenset[int] | None,
    phases: str,
    methods: tuple[str, ...],
    dataset: str | None,
    num_samples: int | None,
    responses: str,
    max_new_tokens: int,
    max_length: int | None,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **training: Any,
) -> None:
    """Give a pruned model back some of the quality that leaving out layers costs.

    linear: the projections of the layers that stay are fitted, in closed form, to what the whole model does; minutes, no training.

    distill: the layers that stay are trained to answer as the whole model does, each token in its phase. The state is kept beside
    the output: the same command goes on where it was killed, another one is refused or, with --overwrite,
    begins anew. Several GPUs: accelerate launch --multi_gpu -m voidprune heal ...

    \b
      voidprune heal MODEL --schedule schedule.json -o healed --dataset prompts.jsonl
      voidprune heal MODEL --schedule schedule.json -o healed --method linear --method distill
      voidprune heal MODEL --rounds 3 --keep 0.5 --phases shared -o healed --method distill
      voidprune export healed -o slim
    """
    from voidprune import artifacts
    from voidprune.execution.manifest import FILE
    from voidprune.pipeline.heal import heal_model
    from voidprune.pipeline.models import open_model
    from voidprune.pipeline.rounds import Rounds
    from voidprune.pipeline.samples import Answering
    from voidprune.pipeline.tasks import dataset_name, find_rows
    from voidprune.planning.budgets import Budget
    from voidprune.profiling.calibration import default_rows
    from voidprune.schedule import full_schedule, read_schedule
    from voidprune.tables import manifest_table

    if (schedule_file is None) == (num_rounds is None):
        raise click.UsageError("Give --schedule, or --rounds and --keep.")
    rounds_only = {"--keep": keep, "--keep-prefill": keep_prefill, "--keep-decode": keep_decode, "--protect": protect}
    if num_rounds is None and (given := [name for name, value in rounds_only.items() if value is not None]):
        raise click.UsageError(f"{given[0]} goes with --rounds; a schedule says all about the layers")
    methods = methods or ("linear",)
    settings = training_settings(context, methods=methods, **training)
    artifacts.check_output_folder(output, overwrite=overwrite, marker=FILE)
    rounds = None
    if num_rounds is not None:
        keeps = (keep if keep_prefill is None else keep_prefill, keep if keep_decode is None else keep_decode)
        budget = Budget(*keeps, protected=protect or frozenset(), shared=phases == "shared")
        rounds = Rounds(budget, num_rounds)
    checkpoint = open_model(model)
    manifest = heal_model(
        checkpoint,
        full_schedule(checkpoint.identity) if schedule_file is None else read_schedule(schedule_file),
        output,
        default_rows()[:num_samples]
        if dataset is None
        else find_rows(dataset, num_items=num_samples, split="training"),
        methods=methods,
        distill_settings=settings,
        rounds=rounds,
        dataset="default" if dataset is None else dataset_name(dataset),
        num_samples=num_samples,
        answering=Answering(responses, max_new_tokens, max_length, batch_size),
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        track=progress_bars(quiet),
        report=(lambda _measurement: None) if quiet else _report,
    )
    assert manifest.healing is not None
    if int(os.environ.get("RANK", "0")) > 0:  # started by the launcher of accelerate: the first process speaks for all
        return
    if not manifest.healing.has_helped:
        click.echo("nothing that was tried is better on held-out samples: the weights are the source's", err=True)
    elif dropped := methods[len(manifest.healing.methods) :]:
        click.echo(f"{', '.join(dropped)} made nothing better on held-out samples and was dropped", err=True)
    show_result(manifest.to_document(), manifest_table, manifest, as_json=as_json)
    if not as_json:
        click.echo(f"wrote {output}")


def _report(measurement: Measurement) -> None:
    losses = [f"held-out loss {measurement.held_out_loss:.4f}"]
    if measurement.training_loss is not None:
        losses.append(f"training loss {measurement.training_loss:.4f}")
    if measurement.tokens_per_second is not None:
        losses.append(f"{measurement.tokens_per_second:,.0f} tokens/s")
    click.echo(f"step {measurement.step}: {', '.join(losses)}", err=True)
