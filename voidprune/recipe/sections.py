"""A mapping of a recipe, read key by key, and readers of single values. Each says where it is when something is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from voidprune import artifacts
from voidprune.errors import RecipeError

SCHEMA = artifacts.schema_key("recipe", 1)
Value = TypeVar("Value")


class Section:
    """A mapping of a recipe that is read key by key; `finish` refuses what nobody asked for. `place` is for errors."""

    def __init__(self, value: Any, place: str) -> None:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RecipeError(f"{place} is not a mapping of names to values")
        self._values = value
        self._asked: set[str] = set()
        self.place = place

    def take(self, key: str, read: Callable[[Any, str], Value], default: Value | None = None) -> Value:
        self._asked.add(key)
        if key not in self._values:
            if default is None:
                raise RecipeError(f"{self.place} lacks {key}")
            return default
        return read(self._values[key], f"{self.place}: {key}")

    def take_optional(self, key: str, read: Callable[[Any, str], Value]) -> Value | None:
        self._asked.add(key)
        return self.take(key, read) if key in self._values else None

    def switched_off(self, key: str) -> bool:
        """Whether the value is `false`."""
        self._asked.add(key)
        return self._values.get(key) is False

    def finish(self) -> None:
        if unknown := self._values.keys() - self._asked:
            raise RecipeError(
                f"{self.place} has unknown keys: {', '.join(sorted(unknown))}",
                hint=f"known here: {', '.join(sorted(self._asked))}",
            )


def text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{place} is not a text")
    return value


def boolean(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{place} is not true or false")
    return value


def integer(lowest: int | None) -> Callable[[Any, str], int]:
    def read(value: Any, place: str) -> int:
        if type(value) is not int or (lowest is not None and value < lowest):
            raise RecipeError(f"{place} is not a whole number{'' if lowest is None else f' from {lowest} up'}")
        return value

    return read


def number(lowest: float) -> Callable[[Any, str], float]:
    def read(value: Any, place: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value < lowest:
            raise RecipeError(f"{place} is not a number from {lowest:g} up")
        return float(value)

    return read


def one_of(names: Sequence[str]) -> Callable[[Any, str], str]:
    def read(value: Any, place: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise RecipeError(f"{place} is {value!r}", hint=f"known here: {', '.join(names)}")
        return value

    return read


def list_of(read_one: Callable[[Any, str], Value]) -> Callable[[Any, str], tuple[Value, ...]]:
    def read(value: Any, place: str) -> tuple[Value, ...]:
        if not isinstance(value, list) or not value:
            raise RecipeError(f"{place} is not a list of one value or more")
        found = tuple(read_one(one, f"{place}, entry {number}") for number, one in enumerate(value, start=1))
        if len(set(found)) < len(found):
            raise RecipeError(f"{place} says a value twice")
        return found

    return read


def map_of(read_one: Callable[[Any, str], Value]) -> Callable[[Any, str], dict[str, Value]]:
    """Names become parts of file names."""

    def read(value: Any, place: str) -> dict[str, Value]:
        section = Section(value, place)
        if not value:
            raise RecipeError(f"{place} is empty")
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise RecipeError(f"{place}: {name!r} is no name", hint="use letters, digits, - and _")
        return {name: section.take(name, read_one) for name in value}

    return read
