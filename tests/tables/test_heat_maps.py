"""Maps of layers: read with colours, without, in ASCII; broken where the terminal ends."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tests.tables import LONG_NAME, render, wide_profile, wide_schedule
from voidprune.schedule import LayerAction, Phase
from voidprune.tables.heat_maps import actions_map, profile_map, schedule_map


def ruler_numbers(text: str) -> list[int]:
    return [int(number) for line in text.splitlines() if re.fullmatch(r"[\d ]+", line) for number in line.split()]


def strip_of(text: str, label: str) -> str:
    """The cells of one row, its lines put together."""
    return "".join(line[14:] for line in text.splitlines() if line.startswith(label))


@pytest.mark.parametrize("num_layers", [12, 32, 80, 126])
@pytest.mark.parametrize("width", [80, 50, 200])
def test_every_layer_has_its_place(num_layers: int, width: int) -> None:
    schedule = wide_schedule(num_layers)
    text = render(schedule_map(schedule), width=width)
    assert ruler_numbers(text) == list(range(0, num_layers, 5))
    signs = {"██": "full", "▀▀": "skip_mlp", "▄▄": "skip_attention", "▟▟": "kv_mlp", "░░": "kv_only", "··": "skip"}
    for phase in ("prefill", "decode"):
        drawn = strip_of(text, phase)
        found = [signs[drawn[index : index + 2]] for index in range(0, len(drawn), 2)]
        assert found == list(getattr(schedule, phase))
    kept = strip_of(text, "in checkpoint")
    assert [index // 2 for index in range(0, len(kept), 2) if kept[index] == "█"] == list(schedule.union)


def test_up_to_32_layers_stand_on_one_line_of_80_columns() -> None:
    assert render(schedule_map(wide_schedule(32))).count("prefill ") == 2  # the title says it, too
    heat = render(profile_map(wide_profile(32)))
    assert heat.count("active prefill") == 1
    assert render(profile_map(wide_profile(80))).count("active prefill") == 3


def test_a_measure_is_darker_where_it_is_larger() -> None:
    profile = wide_profile(12)
    text = render(profile_map(profile))
    rows = [line for line in text.splitlines() if re.match(r"(\w+)? +(prefill|decode) ", line)]
    assert [row[:15].split() for row in rows[:4]] == [
        ["active", "prefill"],
        ["decode"],
        ["layer", "prefill"],
        ["decode"],
    ]
    assert len(rows) == 10
    shares = profile.statistics(Phase.PREFILL).activation_frequency
    shades = [" ░▒▓█".index(rows[0][15 + 2 * layer]) for layer in range(12) if 15 + 2 * layer < len(rows[0])]
    shades += [0] * (12 - len(shades))  # blanks at the end of a line are not printed
    order = sorted(range(12), key=lambda layer: shares[layer])
    assert [shades[layer] for layer in order] == sorted(shades)
    assert set(shades) == {0, 1, 2, 3, 4}


def test_colours_carry_digits_and_vanish_without_them() -> None:
    coloured = render(profile_map(wide_profile(12)), colours=True)
    assert "\x1b[38;2;" in coloured
    assert "48;2;253;231;37" in coloured  # the lightest
    digits = {int(digit) for digit in re.findall(r"m (\d)\x1b", coloured)}
    assert {0, 9} <= digits <= set(range(10))
    plain = render(profile_map(wide_profile(12)))
    assert "\x1b" not in plain
    assert "██" in plain


def test_ascii_terminals_get_digits_and_letters() -> None:
    for drawn in (profile_map(wide_profile(12)), schedule_map(wide_schedule(12))):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
        Console(width=80, file=file, color_system=None).print(drawn)
        file.flush()
        assert raw.getvalue().isascii()


def test_values_of_zero_and_constant_measures_are_drawn() -> None:
    text = render(profile_map(wide_profile(3, scale=0.0)))
    assert "layer from 0 to 0" in " ".join(text.split())


def test_every_measure_takes_the_whole_scale_however_close_its_values_are() -> None:
    text = render(profile_map(wide_profile(12, scale=0.001)))
    rows = [line[15:].ljust(24) for line in text.splitlines() if re.match(r"(\w+)? +(prefill|decode) ", line)]
    assert len(rows) == 10
    for prefill, decode in zip(rows[2::2], rows[3::2], strict=True):
        assert set(prefill + decode) >= {" ", "█"}


def test_marks_point_at_layers_and_the_legend_says_what_is_there() -> None:
    rows = [("A", [LayerAction.FULL] * 4), ("B", [LayerAction.FULL, LayerAction.KV_ONLY] * 2)]
    text = render(actions_map("t", rows, marks=[1, 3]))
    assert [line.split() for line in text.splitlines() if line.startswith("differs")] == [["differs", "^^", "^^"]]
    assert "K/V only" in text
    assert "skipped" not in text


def test_long_names_are_folded_not_cut() -> None:
    assert LONG_NAME in "".join(render(schedule_map(wide_schedule(4))).split())
