"""Numbers as text."""

from __future__ import annotations

import pytest

from voidprune.tables.figures import Heading, format_level, split_columns


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0000"), (1.00018, "1.0002"), (30.4513, "30.451"), (999.996, "1000.0"), (123456.7, "123457"), (2e6, "2.00e+06")],
)  # fmt: skip
def test_levels_have_about_five_digits(value: float, shown: str) -> None:
    assert format_level(value, 4) == shown


def test_columns_are_split_where_the_room_ends() -> None:
    names = ["arithmetic", "multiple-choice", "a_very_long_name_without_breaks", "b"]
    assert split_columns(names, room=24, cell=4) == [
        [Heading("arithmetic", 10), Heading("multiple choice", 8)],
        [Heading("a_very_long_name_without_breaks", 12), Heading("b", 4)],
    ]
    assert split_columns([], room=24, cell=4) == []
    assert len(split_columns(names, room=1, cell=4)) == 4
