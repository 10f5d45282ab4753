"""What a user asks for, from YAML. A recipe says its schema and its kind; each kind is a frozen value and one reader.

    schema: voidprune.recipe/1
    kind: adaptive-evaluation

JSON is YAML, so `Recipe.to_document` written as JSON is a recipe, too. Nothing is run here and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from voidprune.errors import RecipeError
from voidprune.recipe.compression import CompressionRecipe, read_compression
from voidprune.recipe.experiments import (
    AdaptiveRecipe,
    DataSource,
    ProbeRecipe,
    ProbeSource,
    Setup,
    read_adaptive,
    read_probe,
)
from voidprune.recipe.sections import SCHEMA, Section, one_of, text

__all__ = [
    "AdaptiveRecipe",
    "CompressionRecipe",
    "DataSource",
    "ExperimentRecipe",
    "ProbeRecipe",
    "ProbeSource",
    "Recipe",
    "Setup",
    "parse_recipe",
    "read_recipe",
]

ExperimentRecipe = AdaptiveRecipe | ProbeRecipe
Recipe = ExperimentRecipe | CompressionRecipe


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError, naming the key."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", hint="give the file of a recipe") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(document, place=str(path), folder=path.parent)


def parse_recipe(document: Any, *, place: str, folder: Path) -> Recipe:
    """A recipe from its parsed YAML; data files are looked for from `folder`. Raises RecipeError."""
    section = Section(document, place)
    schema = section.take("schema", text)
    if schema != SCHEMA:
        newer = schema.startswith("voidprune.recipe/")
        raise RecipeError(
            f"{place} has the schema {schema!r}, not {SCHEMA!r}", hint="upgrade voidprune" if newer else None
        )
    kind = section.take("kind", one_of(tuple(READERS)))
    return READERS[kind](section, folder)


READERS: dict[str, Callable[[Section, Path], Recipe]] = {
    "adaptive-evaluation": read_adaptive,
    "probe": read_probe,
    "compression": read_compression,
}
