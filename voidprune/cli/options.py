"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from voidprune.cli.completion import complete_tasks
from voidprune.planning.budgets import Budget, parse_amount, parse_layers
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.search import GOALS, SEARCHES

if TYPE_CHECKING:
    from voidprune.pipeline.gates import Gates
    from voidprune.pipeline.plan import Calibrated, PlanRequest
    from voidprune.pipeline.precision import PackingRequest

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
responses_option = click.option(
    "--responses",
    type=click.Choice(["generate", "dataset"]),
    default="generate",
    show_default=True,
    help="Let the model answer, or take the responses of the dataset.",
)
max_new_tokens_option = click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Longest response."
)
dtype_option = click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Default: fp32, bf16 on CUDA.")
device_option = click.option("--device", help='Torch device. Default: "cuda" where there is one, else "cpu".')
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")


class Amount(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.5
    """700000000, 700MB, 1.5GiB, 2T."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_amount(value)


class Layers(click.ParamType):  # type: ignore[type-arg]
    """3,7,11-14: from 0, ranges inclusive."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[int]:
        return value if isinstance(value, frozenset) else parse_layers(value)


class Counts(click.ParamType):  # type: ignore[type-arg]
    """32,128,512: whole numbers, each once, the first before all others."""

    name = "counts"

    def __init__(self, *, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        pieces = [piece.strip() for piece in str(value).split(",")]
        if not all(piece.isdecimal() and int(piece) >= self.least for piece in pieces):
            self.fail(f"{value!r} is not a list of whole numbers from {self.least}, such as 32,128", param, ctx)
        return tuple(dict.fromkeys(map(int, pieces)))


def together(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """All of these options on one command, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


budget_options = together(
    [
        click.option("--keep", type=float, help="Share of layers to run in each phase, in (0, 1]."),
        click.option("--keep-prefill", type=float, help="The same, for prefill only."),
        click.option("--keep-decode", type=float, help="The same, for decode only."),
        click.option("--max-bytes", type=Amount(), help="Weights, such as 700MB."),
        click.option("--max-kv-bytes-per-token", type=Amount(), help="Growth of the K/V cache."),
        click.option("--max-prefill-flops", type=Amount(), help="For a prompt of 512 tokens."),
        click.option("--max-decode-bytes", type=Amount(), help="Read for one token after 512."),
        click.option("--keep-layers", type=Layers(), help="Run just these, such as 0-5,11."),
        click.option("--drop-layers", type=Layers(), help="Leave these out of both phases, such as 3,7,11-14."),
        click.option("--protect", type=Layers(), help="Run these whole, whatever else goes."),
        click.option(
            "--criterion",
            type=click.Choice([*CRITERIA, *SEARCHES]),
            help="How to choose layers. Default: lac where there is a profile, else auto: the best on trial.",
        ),
        click.option(
            "--goal",
            type=click.Choice(list(GOALS)),
            help="Find out how many layers can go at no loss: of prefill, of both phases alike, or of each apart.",
        ),
        click.option("--max-loss", type=float, help="What --goal may lose, with 95 % confidence. Default: 0.01."),
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
)

trial_options = together(
    [
        click.option(
            "--dataset",
            shell_complete=complete_tasks,
            help='To choose by: a JSONL or text file, "demo", or one of its tasks.',
        ),
        click.option(
            "--judging",
            shell_complete=complete_tasks,
            help="To judge by, in place of every second sample of --dataset.",
        ),
        responses_option,
        click.option("--num-samples", type=click.IntRange(min=2), help="Use the first N samples only."),
        click.option("--num-judging", type=click.IntRange(min=1), help="To judge by, of --judging or of each task."),
        max_new_tokens_option,
        click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True),
        click.option(
            "--search-evaluations",
            type=click.IntRange(min=0),
            help="Schedules to try in refining. Default: 8 a layer for a search, none for auto.",
        ),
        dtype_option,
        device_option,
    ]
)

SAMPLE_OPTIONS = ("dataset", "responses", "num_samples", "max_new_tokens", "batch_size")
"""Those of `trial_options` that say on what packed weights, and keys and values, are measured, too."""

packing_options = together(
    [
        click.option(
            "--block-size",
            type=click.Choice(["32", "128"]),
            default="32",
            show_default=True,
            help="Weights that share a scale, in int8, int4 and mixed; in w8a8, of embedding and head; in w8a8-int4, of those and "
            "of decode.",
        ),
        click.option("--zero-points", is_flag=True, help="There, a zero point for every block as well."),
        click.option(
            "--activations",
            type=click.Choice(["int8", "fp32", "fp16", "bf16"]),
            help="There, what products round the other factor to: fast (int8), or exact (fp32, not with w8a8); in 16 bits graphs "
            "compute everything, as CUDA wants it. Default: int8; fp16 on CUDA.",
        ),
        click.option(
            "--rounding",
            type=click.Choice(["nearest", "gptq"]),
            default="nearest",
            show_default=True,
            help="Of layers in 4 bits: every weight to nearest, or on samples, so that weights make up for each other (GPTQ).",
        ),
        click.option("--bits", type=float, help="Of an average weight of the layers, in mixed.  [default: 5]"),
    ]
)


def check_packing_options(context: click.Context, precision: str) -> None:
    """Raise UsageError where an option of `packing_options` does not go with the precision."""
    from voidprune.models.packed import FOUR_BIT_PRECISIONS, PACKED_PRECISIONS

    goes_with = {"bits": ("mixed",), "rounding": FOUR_BIT_PRECISIONS}
    for name in ("block_size", "zero_points", "activations", "rounding", "bits"):
        wanted = goes_with.get(name, PACKED_PRECISIONS)
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT and precision not in wanted:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} goes with --precision {' or '.join(wanted)}")


def packing_request(
    precision: str,
    *,
    block_size: str,
    zero_points: bool,
    activations: str | None,
    rounding: str,
    bits: float | None,
    provider: str | None,
    options: Mapping[str, Any],
) -> PackingRequest:
    """The options of `packing_options`, to be measured on the samples that `options`, of `trial_options`, ask for, for graphs that
    run on `provider`."""
    from voidprune.pipeline.precision import PackingRequest, default_activations

    return PackingRequest(
        precision=precision,
        block_size=int(block_size),
        zero_points=zero_points,
        activations=activations or default_activations(precision, provider),
        average_bits=5.0 if bits is None else bits,
        rounding=rounding,
        calibrated=calibrated(options),
    )


def calibrated(options: Mapping[str, Any]) -> Calibrated:
    """The samples that `options`, of `trial_options`, ask for."""
    from voidprune.pipeline.plan import Calibrated

    return Calibrated(**{name: options[name] for name in SAMPLE_OPTIONS})


calibration_options = together(
    [
        click.option(
            "--dataset", type=click.Path(path_type=Path), help="JSONL or text. Default: prompts that ship with it."
        ),
        click.option("--num-samples", type=click.IntRange(min=1), help="Use the first N samples only."),
        responses_option,
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
        max_new_tokens_option,
        click.option(
            "--max-length", type=click.IntRange(min=2), help="Longest prompt and response. Default: the context."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True),
        dtype_option,
        device_option,
    ]
)


def plan_request(
    *,
    keep: float | None,
    keep_prefill: float | None,
    keep_decode: float | None,
    protect: frozenset[int] | None,
    drop_layers: frozenset[int] | None,
    phases: str,
    boundary: str,
    dataset: str | None,
    judging: str | None,
    responses: str,
    num_samples: int | None,
    num_judging: int | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str | None,
    device: str | None,
    **rest: Any,
) -> PlanRequest:
    """The options of `budget_options` and `trial_options` as one request."""
    from voidprune.pipeline.plan import Calibrated, PlanRequest
    from voidprune.schedule import Boundary

    limits = {name: rest.pop(name) for name in list(rest) if name.startswith("max_") and name != "max_loss"}
    budget = Budget(
        keep_prefill=keep if keep_prefill is None else keep_prefill,
        keep_decode=keep if keep_decode is None else keep_decode,
        protected=protect or frozenset(),
        dropped=drop_layers or frozenset(),
        shared=phases == "shared",
        **limits,
    )
    calibrated = Calibrated(
        dataset=dataset,
        judging=judging,
        responses=responses,
        num_samples=num_samples,
        num_judging=num_judging,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    return PlanRequest(
        budget=budget, drop_layers=drop_layers, boundary=Boundary(boundary), calibrated=calibrated, **rest
    )


def _parse_min_scores(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str | None, float], ...]:
    """`TASK=0.9`, or `0.9` for every task."""
    parsed = []
    for value in values:
        task, separator, number = value.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 1 or (separator and not task):
            raise click.BadParameter(f"{value!r} is not a share from 0 to 1, or TASK=SHARE")
        parsed.append((task or None, score))
    return tuple(parsed)


gate_options = together(
    [
        click.option(
            "--min-score",
            "min_scores",
            metavar="[TASK=]SHARE",
            multiple=True,
            callback=_parse_min_scores,
            help="Least accuracy, of a task or of every task; else exit with code 3.",
        ),
        click.option(
            "--max-ppl-ratio",
            type=click.FloatRange(min=0, min_open=True),
            help="Largest perplexity, as a multiple of the whole model's; else exit with code 3.",
        ),
    ]
)


def gates_of(min_scores: Iterable[tuple[str | None, float]], max_ppl_ratio: float | None) -> Gates:
    """The gates that the options of `gate_options` ask for."""
    from voidprune.pipeline.gates import Gates

    return Gates(
        min_scores={task: score for task, score in min_scores if task is not None},
        min_score=next((score for task, score in reversed(list(min_scores)) if task is None), None),
        max_ppl_ratio=max_ppl_ratio,
    )


def output_target(output: Path | None, *, dry_run: bool) -> Path | None:
    """Where to write; None for a dry run."""
    if dry_run:
        return None
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    return output
