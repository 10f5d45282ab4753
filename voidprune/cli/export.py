"""`voidprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from voidprune.cli.completion import complete_model, complete_tasks
from voidprune.cli.evaluate import gate_export
from voidprune.cli.options import (
    SAMPLE_OPTIONS,
    budget_options,
    calibrated,
    check_packing_options,
    gate_options,
    json_option,
    output_option,
    output_target,
    overwrite_option,
    packing_options,
    packing_request,
    plan_request,
    provider_option,
    quiet_option,
    seed_option,
    trial_options,
)
from voidprune.cli.output import progress_bars, show_result
from voidprune.cli.plan import print_plan


@click.command()
@click.argument("model", shell_complete=complete_model)
@output_option("Folder", required=False)
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="A schedule made by plan.")
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="A profile to plan from.")
@click.option(
    "--format", "formats", type=click.Choice(["hf", "onnx"]), multiple=True, help="Default: all that the family has."
)
@click.option(
    "--ops",
    "operators",
    type=click.Choice(["ort", "standard"]),
    default="ort",
    show_default=True,
    help="Operators of the graphs: onnxruntime's fused ones, or those of the ONNX standard alone.",
)
@click.option(
    "--precision",
    type=click.Choice(["keep", "fp32", "fp16", "bf16", "int8", "int4", "mixed", "w8a8", "w8a8-int4"]),
    default="keep",
    show_default=True,
    help="Of the weights; of the graphs' alone int8, int4, mixed (layers that matter most in 8 bits), w8a8 (products of 8-bit "
    "numbers: fast prompts on a CPU) and w8a8-int4 (w8a8 in prefill, int4 in decode).",
)
@packing_options
@click.option(
    "--kv-cache",
    type=click.Choice(["keep", "int8"]),
    default="keep",
    show_default=True,
    help="How graphs hold keys and values: as they compute them, or in 8 bits, with steps that are measured on samples.",
)
@click.option(
    "--layout",
    type=click.Choice(["pair", "single"]),
    default="pair",
    show_default=True,
    help="A graph a phase; or one for both, which takes --phases shared and is what Optimum loads.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file, such as 5GB or 500MB.")
@click.option("--push-to-hub", "repo", metavar="REPO", help="Upload the result to the Hugging Face Hub, as private.")
@click.option("--public", is_flag=True, help="Let the whole world see what is pushed.")
@budget_options
@trial_options
@gate_options
@click.option(
    "--eval-tasks",
    shell_complete=complete_tasks,
    default="demo",
    show_default=True,
    help="What gates are measured on, as eval --tasks.",
)
@provider_option
@seed_option
@click.option("--unverified", is_flag=True, help="Publish a quantized model that cannot be run here, and say so in it.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be kept; write nothing.")
@json_option
@quiet_option
@click.pass_context
def export(
    context: click.Context,
    /,
    model: str,
    output: Path | None,
    schedule_file: Path | None,
    profile_file: Path | None,
    formats: tuple[str, ...],
    layout: str,
    precision: str,
    operators: str,
    block_size: str,
    zero_points: bool,
    activations: str | None,
    rounding: str,
    bits: float | None,
    kv_cache: str,
    min_scores: tuple[tuple[str | None, float], ...],
    max_ppl_ratio: float | None,
    eval_tasks: str,
    max_shard_size: str,
    repo: str | None,
    public: bool,
    provider: str | None,
    seed: int,
    unverified: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Write a slim checkpoint and two ONNX graphs into one folder, verified before it appears.

    Without a schedule, layers are chosen on the way: every criterion is tried on the model, on the prompts that ship with the
    package or on --dataset. Where nothing was healed, --goal fast-prompt is the one to begin with.

    Of a model on the Hub only the layers that are kept are fetched, where choosing them does not take the model.

    \b
      voidprune export MODEL -o slim --keep 0.3
      voidprune export MODEL -o small --keep 0.5 --precision int4
      voidprune export MODEL -o fast --goal fast-prompt --dataset prompts.jsonl
      voidprune export healed -o slim
    """
    from voidprune import artifacts
    from voidprune.execution.manifest import FILE, is_bundle
    from voidprune.export.bundle import check_kv_cache, check_single_graph
    from voidprune.export.hf_checkpoint import parse_shard_size
    from voidprune.export.publishing import check_push_target, push_bundle
    from voidprune.models.checkpoint import PRECISIONS
    from voidprune.models.packed import PACKED_PRECISIONS
    from voidprune.models.sizes import measure_sizes
    from voidprune.pipeline.export import check_graphs, default_formats, export_model, own_schedule
    from voidprune.pipeline.models import open_kept_layers, open_model
    from voidprune.pipeline.plan import Planned, plan_from_model
    from voidprune.profiling.profile import read_profile
    from voidprune.schedule import read_schedule
    from voidprune.tables import manifest_table

    target = output_target(output, dry_run=dry_run)
    if target is not None:
        artifacts.check_output_folder(target, overwrite=overwrite, marker=FILE)
    packed = precision in PACKED_PRECISIONS
    check_packing_options(context, precision)
    rounds = packed or kv_cache != "keep"
    planning = [name for name in options if not (rounds and name in SAMPLE_OPTIONS)]
    if schedule_file is not None:
        for name in (*planning, "profile_file"):
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                option = "--" + name.removesuffix("_file").replace("_", "-")
                raise click.UsageError(f"--schedule says all about the layers; it does not go with {option}")
    try:
        max_shard_bytes = parse_shard_size(max_shard_size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--max-shard-size'") from error
    if public and repo is None:
        raise click.UsageError("--public says how to push; it goes with --push-to-hub")
    if repo is not None and target is not None:
        check_push_target(repo, public=public)
    packing = None
    if packed:
        packing = packing_request(
            precision,
            block_size=block_size,
            zero_points=zero_points,
            activations=activations,
            rounding=rounding,
            bits=bits,
            provider=provider,
            options=options,
        )
        precision = "keep"
    kv = None if kv_cache == "keep" else calibrated(options)
    says_nothing = all(
        context.get_parameter_source(name) is ParameterSource.DEFAULT
        for name in (*planning, "schedule_file", "profile_file")
    )
    own = says_nothing and is_bundle(Path(model))
    request = None if own or schedule_file is not None else plan_request(seed=seed, **options)
    runs_model = request is not None and request.runs_model(has_profile=profile_file is not None)
    measures = target is not None and (kv is not None or (packing is not None and packing.takes_model))
    checkpoint = open_model(model) if runs_model or measures else open_kept_layers(model)
    if not formats:
        formats, note = default_formats(checkpoint)
        if note is not None and target is not None:
            click.echo(note, err=True)
    if kv is not None:
        check_kv_cache(formats=formats, operators=operators)
    if target is not None:
        check_graphs(
            checkpoint,
            formats=formats,
            layout=layout,
            precision=precision,
            operators=operators,
            packing=packing,
            rounds_kv=kv is not None,
            provider=provider,
        )
    if packing is None:
        sizes = measure_sizes(checkpoint, dtype=PRECISIONS.get(precision))
    else:
        from voidprune.pipeline.precision import measure_packed_sizes

        sizes = measure_packed_sizes(checkpoint, packing)
    sizes = sizes.with_kv_bytes(None if kv is None else checkpoint.architecture.kv_width)
    if request is None:
        schedule = own_schedule(checkpoint) if schedule_file is None else read_schedule(schedule_file)
        assert schedule is not None
        schedule.check_model(checkpoint.identity, place=str(schedule_file))
        planned = Planned(schedule, sizes)
    else:
        planned = plan_from_model(
            request,
            checkpoint,
            sizes=sizes,
            profile=None if profile_file is None else read_profile(profile_file),
            output=target,
            overwrite=overwrite,
            track=progress_bars(quiet),
        )
    if layout == "single":
        check_single_graph(planned.schedule)
    if not as_json or target is None:
        print_plan(planned, as_json=as_json)
    if target is None:
        return
    accept = gate_export(
        checkpoint, min_scores, max_ppl_ratio, eval_tasks, provider=provider, as_json=as_json, quiet=quiet
    )
    manifest = export_model(
        checkpoint,
        planned.schedule,
        target,
        formats=formats,
        layout=layout,
        precision=precision,
        operators=operators,
        packing=packing,
        kv=kv,
        max_shard_bytes=max_shard_bytes,
        provider=provider,
        overwrite=overwrite,
        seed=seed,
        accept=accept,
        unverified=unverified,
        track=progress_bars(quiet),
    )
    show_result(manifest.to_document(), manifest_table, manifest, as_json=as_json)
    if not as_json:
        click.echo(f"wrote {target}")
    if repo is not None:
        address = push_bundle(target, repo, public=public)
        click.echo(f"pushed to {address}", err=as_json)
