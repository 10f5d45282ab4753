"""`voidprune generate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from voidprune.cli.options import provider_option


@click.command()
@click.argument("model")
@click.option("--prompt", required=True, help='Text of the user\'s turn; "-" reads standard input.')
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Run a whole model under a schedule, in torch."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--raw", is_flag=True, help="Continue the text: no chat template.")
@provider_option
def generate(
    model: str, prompt: str, schedule_file: Path | None, max_new_tokens: int, raw: bool, provider: str | None
) -> None:
    """Answer a prompt, greedily. A bundle runs in onnxruntime, a model in torch.

    \b
      voidprune generate slim --prompt "Write a haiku about rain."
    """
    from voidprune.pipeline.generation import generate_text
    from voidprune.schedule import read_schedule

    text = sys.stdin.read() if prompt == "-" else prompt
    schedule = None if schedule_file is None else read_schedule(schedule_file)
    for piece in generate_text(
        model, text, schedule=schedule, raw=raw, max_new_tokens=max_new_tokens, provider=provider
    ):
        click.echo(piece, nl=False)
    click.echo()
