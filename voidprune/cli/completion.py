"""`voidprune completion`, and what a shell offers for models, tasks and profiles. Names come from here and from the disk alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from voidprune.demo.tasks import TASKS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def complete_model(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The demo model, folders here that hold a model, models of the Hub that were downloaded; else any folder."""
    return _offer(("demo", *_model_folders(), *_downloaded()), incomplete, otherwise="dir")


def complete_source(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """A profile, or a model."""
    return _offer(("demo", *_model_folders(), *_files(".json"), *_downloaded()), incomplete, otherwise="file")


def complete_tasks(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Tasks that need no file, then files of items."""
    return _offer(("demo", *TASKS, "capitals", *_files(".jsonl", ".txt")), incomplete, otherwise="file")


def _offer(names: Iterable[str], incomplete: str, *, otherwise: str) -> list[CompletionItem]:
    """Names that begin like this. Where there is none, the shell looks for files or folders by itself."""
    from click.shell_completion import CompletionItem

    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type=otherwise)]


def _model_folders() -> list[str]:
    return sorted(path.parent.name for path in Path().glob("*/config.json"))


def _files(*suffixes: str) -> list[str]:
    return sorted(path.name for path in Path().iterdir() if path.suffix in suffixes and not path.name.startswith("."))


def _downloaded() -> list[str]:
    """Ids of models in the cache of huggingface_hub, which is not imported for it: a shell does not wait."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*--*"))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets a shell complete commands, options, criteria, tasks, models and files.

    For good: put eval "$(voidprune completion bash)" into ~/.bashrc, the same with zsh into ~/.zshrc; of fish write the script to
    ~/.config/fish/completions/voidprune.fish.

    \b
      voidprune completion bash > voidprune.bash && source voidprune.bash
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(root, {}, "voidprune", "_VOIDPRUNE_COMPLETE").source())
