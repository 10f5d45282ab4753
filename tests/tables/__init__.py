"""Tables as a terminal of 80 columns shows them, and worst cases: many layers, long names, large numbers."""

from __future__ import annotations

import io
import random
import re
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from voidprune.models.sizes import LayerSizes, ModelSizes
from voidprune.profiling.profile import NUM_BLOCKS, Calibration, LacSettings, LayerStatistics, Profile
from voidprune.schedule import LayerAction, ModelIdentity, Phase, Schedule, satisfy_kv_contract

LONG_NAME = "an-organisation-with-a-long-name/A-Model-With-A-Very-Long-Name-70B-Instruct-v0.3-preview-2025-11-21"


def render(*tables: Any, width: int = 80, colours: bool = False) -> str:
    """What is written. Asserts that it fits, and that nothing was cut."""
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        no_color=not colours,
    )
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert max(cell_len(line) for line in plain.splitlines()) <= width, plain
    assert "…" not in plain, plain
    return text


def cells(text: str) -> list[str]:
    """The contents of the cells of all rows, each line of a cell for itself."""
    return [cell.strip() for line in text.splitlines() for cell in re.split("[│┃]", line)[1:-1]]


def numbers_broken_off(text: str) -> list[str]:
    """Cells that end within a number or begin with the rest of one: what wrapping in the wrong place leaves behind."""
    return [cell for cell in cells(text) if re.search(r"(\d[.,]|±|\[|\d-|\bto)$", cell)]


def wide_identity(num_layers: int) -> ModelIdentity:
    return ModelIdentity(LONG_NAME, "llama", num_layers, "sha256:0")


def wide_profile(num_layers: int, *, seed: int = 0, scale: float = 1.0) -> Profile:
    """Large numbers, and intervals as wide: what a column has to hold at most."""
    draw = random.Random(seed)
    shares = [layer / max(1, num_layers - 1) for layer in range(num_layers)]
    draw.shuffle(shares)

    def block() -> LayerStatistics:
        tokens = draw.randint(50_000, 99_999)

        def sums(largest: float) -> tuple[float, ...]:
            return tuple(tokens * largest * draw.random() * scale for _ in range(num_layers))

        return LayerStatistics(
            num_tokens=tokens,
            active=tuple(int(tokens * share) for share in shares),
            cosine_distance=sums(1.9),
            relative_change=sums(90.0),
            attention_distance=sums(1.9),
            mlp_distance=sums(1.9),
            num_spans=10,
            span_distance=tuple(10 * draw.random() for _ in range(num_layers * (num_layers + 1) // 2)),
        )

    layer = LayerSizes(10**9, 6 * 10**8, 10**8, 4 * 10**8, 10**8, 10**7, 10**8)
    return Profile(
        model=wide_identity(num_layers),
        sizes=ModelSizes((layer,) * num_layers, 10**9, 10**9, 10**8, 4096, 8192),
        lac=LacSettings(),
        calibration=Calibration(NUM_BLOCKS * 10, "generate", 64, ("sha256:" + "0123456789abcdef" * 4,) * 2),
        groups={"default": {phase: tuple(block() for _ in range(NUM_BLOCKS)) for phase in Phase}},
    )


def wide_schedule(num_layers: int, *, seed: int = 0) -> Schedule:
    """Every action somewhere."""
    draw = random.Random(seed)
    actions = list(LayerAction)
    prefill, decode = satisfy_kv_contract(
        *([LayerAction.FULL, *(draw.choice(actions) for _ in range(num_layers - 1))] for _ in Phase)
    )
    origin = {
        "criterion": "block-influence",
        "keep_prefill": 0.33333333,
        "protected": "0,11",
        "calibration": "sha256:0",
    }
    return Schedule(wide_identity(num_layers), prefill, decode, origin=origin)
