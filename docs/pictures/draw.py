"""Draws the pictures of docs/concepts.md: `python docs/pictures/draw.py [FOLDER]`. Only the standard library.

Each picture has a ground of its own, light or dark as the reader's system is, so it can be read on any page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

STYLE = """
  .ground { fill: #ffffff } text { fill: #1f2328; font: 13px sans-serif } .small { font-size: 11px }
  .head { font-weight: bold } .middle { text-anchor: middle } .end { text-anchor: end }
  .full { fill: #0072b2 } .kv { fill: #e69f00 } .attend { fill: #009e73 } .none { fill: #ffffff; stroke-dasharray: 3 2 }
  .box { stroke: #57606a; stroke-width: 1 } .on { fill: #ffffff } .line { stroke: #57606a; stroke-width: 1.5; fill: none }
  .edge { stroke: #d55e00; stroke-width: 2.5; fill: none } .edge-text { fill: #b34700 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #e6edf3 } .full { fill: #56b4e9 } .kv { fill: #f0b429 } .attend { fill: #2fc79b }
    .none { fill: #0d1117 } .box { stroke: #8b949e } .line { stroke: #8b949e } .on { fill: #0d1117 }
    text.on-kv { fill: #1f2328 } .edge { stroke: #ff8c42 } .edge-text { fill: #ff8c42 }
  }
"""


def picture(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="ground" width="{width}" height="{height}" rx="8"/>\n{body}\n</svg>\n'
    )


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="box {kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def line(points: str, kind: str = "line") -> str:
    return f'<path class="{kind}" d="{points}"/>'


def draw_phases() -> str:
    """Layers by tokens: six layers of which prefill runs the lower three whole, and decode leaves out layer 4."""
    prefill = ("full", "full", "full", "kv", "none", "kv")
    decode = ("full", "full", "full", "full", "none", "full")
    prompt, response, cell, left, top = 6, 4, 52, 92, 74
    parts = [text(left, 24, "prompt", "head"), text(left + prompt * cell, 24, "response", "head")]
    names = [f"p{number}" for number in range(1, prompt + 1)] + [f"r{number}" for number in range(1, response + 1)]
    for column, name in enumerate(names):
        parts.append(text(left + column * cell + cell / 2, top - 12, name, "small middle"))
    for layer in range(6):
        y = top + (5 - layer) * 30
        parts.append(text(left - 12, y + 18, f"layer {layer}", "small end"))
        for column in range(prompt + response):
            kind = (decode if column >= prompt - 1 else prefill)[layer]
            parts.append(box(left + column * cell + 3, y + 2, cell - 6, 25, kind))
    boundary, bottom = left + (prompt - 1) * cell, top + 6 * 30
    parts.append(line(f"M {boundary} {top - 32} V {bottom + 22}", "edge"))
    parts.append(text(boundary - 8, bottom + 18, "prefill schedule", "edge-text end"))
    parts.append(text(boundary + 8, bottom + 18, "decode schedule", "edge-text"))
    for column, (kind, words) in enumerate(
        (("full", "full"), ("kv", "kv_only: keys and values"), ("none", "skip: nothing"))
    ):
        x = left + (0, 92, 292)[column]
        parts += [box(x, bottom + 38, 22, 14, kind), text(x + 30, bottom + 50, words, "small")]
    return picture("Which schedule each token runs, with the boundary decode", 640, bottom + 72, parts)


def draw_actions() -> str:
    """The six actions: what reads the residual stream, and what adds to it."""
    actions = (
        ("full", True, True, True), ("skip_mlp", True, True, False), ("skip_attention", False, False, True),
        ("kv_mlp", False, True, True), ("kv_only", False, True, False), ("skip", False, False, False),
    )  # fmt: skip
    parts = []
    for column, (name, attends, writes, runs_mlp) in enumerate(actions):
        x = 16 + column * 122
        parts.append(text(x + 54, 26, name, "head middle"))
        parts.append(line(f"M {x + 14} 216 V 44"))
        parts.append(line(f"M {x + 9} 52 L {x + 14} 44 L {x + 19} 52"))
        for y, words, runs in ((128, "attention", attends), (62, "MLP", runs_mlp)):
            parts.append(box(x + 34, y, 74, 30, "on" if runs else "none"))
            parts.append(text(x + 71, y + 20, words if runs else "left out", "small middle"))
            if runs:
                parts.append(line(f"M {x + 14} {y + 36} H {x + 71} V {y + 30}"))
                parts.append(line(f"M {x + 71} {y} V {y - 8} H {x + 14}"))
                parts.append(f'<circle class="box full" cx="{x + 14}" cy="{y - 8}" r="5"/>')
        parts.append(box(x + 34, 180, 74, 26, "kv" if writes else "none"))
        parts.append(
            text(
                x + 71, 197, "keys, values" if writes else "no K/V", "small middle on-kv" if writes else "small middle"
            )
        )
        if writes:
            parts.append(line(f"M {x + 14} 193 H {x + 34}"))
    parts.append(
        text(16, 240, "The line on the left is the residual stream, from below; a dot is what is added to it.", "small")
    )
    return picture("The six actions of a layer", 756, 256, parts)


def draw_lac() -> str:
    """One token through six layers of which LAC calls 1, 3 and 5 void, in three readings."""
    active = (True, False, True, False, True, False)
    readings = (
        ("readout", "as published: every layer runs; the head reads the last active one", (True,) * 6, 4),
        ("mask", "void layers leave this token alone; the next layer sees what was before", active, 5),
        (
            "static",
            "layers that are void for most tokens are left out for all: smaller",
            (True, False, True, True, True, False),
            5,
        ),
    )
    parts = [text(120, 26, "layer", "small end")]
    parts += [text(164 + column * 70, 26, str(column), "small middle") for column in range(6)]
    parts += [text(120, 52, "LAC says", "small end")]
    parts += [
        text(164 + column * 70, 52, "active" if one else "void", "small middle") for column, one in enumerate(active)
    ]
    for row, (name, words, runs, last) in enumerate(readings):
        y = 78 + row * 92
        parts += [text(120, y + 20, name, "head end"), text(132, y + 56, words, "small")]
        parts.append(line(f"M 124 {y + 15} H {546 if last == 5 else 132 + last * 70 + 66}"))
        for column in range(6):
            x = 132 + column * 70
            kind = ("full" if active[column] or name != "readout" else "attend") if runs[column] else "none"
            parts.append(box(x + 6, y, 52, 30, kind))
        x = 132 + last * 70 + 66
        parts += [text(572, y + 20, "head", "small")]
        if last == 5:
            parts.append(line(f"M 546 {y + 15} H 566"))
        else:
            parts.append(line(f"M {x} {y + 15} V {y + 38} H 580 V {y + 26}", "edge"))
    y = 78 + 3 * 92
    for column, (kind, words) in enumerate((("full", "runs"), ("attend", "runs, though void"), ("none", "left out"))):
        x = 132 + (0, 80, 230)[column]
        parts += [box(x, y - 12, 22, 14, kind), text(x + 30, y, words, "small")]
    return picture("Three readings of LAC for one token", 640, y + 20, parts)


PICTURES = {"phases.svg": draw_phases, "actions.svg": draw_actions, "lac.svg": draw_lac}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
