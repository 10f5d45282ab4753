"""`voidprune probe`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from voidprune.cli.completion import complete_model, complete_tasks
from voidprune.cli.options import Layers, json_option, output_option, overwrite_option, quiet_option, seed_option
from voidprune.cli.output import print_tables, progress_bars

INTERVENTIONS = ("random", "freeze", "skip-attention", "switch", "shuffle")
SCOPES = ("prompt", "published")


@click.command()
@click.argument("model", shell_complete=complete_model)
@output_option("Probe")
@click.option(
    "--intervention",
    "interventions",
    type=click.Choice(INTERVENTIONS),
    multiple=True,
    help="May be given several times. Default: all.",
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("prompt",),
    show_default=True,
    help="Whose states are changed: all prompt tokens but the last; as published: generated ones too. May be given twice.",
)
@click.option("--depths", type=Layers(), help="First layers to change states before, such as 0,4-11. Default: all.")
@click.option(
    "--tasks",
    shell_complete=complete_tasks,
    help='"capitals", "demo" or one of its tasks, or a file. Default: capitals; of the demo model its own.',
)
@click.option("--num-samples", type=click.IntRange(min=1), help="Items of each task, or of the file.")
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Harmless is what loses no more than this, with 95 % confidence.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest response. Default: 64; of capitals 12.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Default: fp32, bf16 on CUDA.")
@click.option("--device", help='Torch device. Default: "cuda" where there is one, else "cpu".')
@seed_option
@overwrite_option
@json_option
@quiet_option
def probe(
    model: str,
    output: Path,
    interventions: tuple[str, ...],
    scopes: tuple[str, ...],
    depths: frozenset[int] | None,
    tasks: str | None,
    num_samples: int | None,
    margin: float,
    max_new_tokens: int | None,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    seed: int,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find out what upper layers need from earlier tokens: change these tokens' states at every depth.

    The interventions of "Attend First, Consolidate Later" (arXiv 2409.03621). A run that was killed is resumed by repeating it.

    \b
      voidprune probe demo --tasks demo --num-samples 40 --margin 0.05 -o probe.json
    """
    from voidprune import artifacts
    from voidprune.models.pretrained import default_device
    from voidprune.pipeline.adaptive import open_subject
    from voidprune.pipeline.probe import MAX_NEW_TOKENS, ProbeSettings, probe_model
    from voidprune.pipeline.tasks import dataset_name, find_rows
    from voidprune.profiling.probing import Intervention, Scope
    from voidprune.tables import probe_tables

    artifacts.check_output_file(output, overwrite=overwrite)
    tasks = tasks or ("demo" if model == "demo" else "capitals")
    rows = find_rows(tasks, num_items=num_samples)
    device = device or default_device()
    document = probe_model(
        open_subject(model, dtype=dtype or ("bf16" if device.startswith("cuda") else "fp32"), device=device),
        rows,
        dataset=dataset_name(tasks),
        settings=ProbeSettings(
            interventions=tuple(one for one in Intervention if not interventions or one in interventions),
            scopes=tuple(one for one in Scope if one in scopes),
            depths=None if depths is None else tuple(sorted(depths)),
            margin=margin,
            max_new_tokens=max_new_tokens or MAX_NEW_TOKENS.get(tasks, 64),
            batch_size=batch_size,
            seed=seed,
        ),
        output=output,
        overwrite=overwrite,
        track=progress_bars(quiet),
    )
    if as_json:
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        print_tables(*probe_tables(document))
