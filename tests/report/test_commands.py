"""Commands that a page prints say how a bundle was made."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from tests.command_lines import parse_command
from tests.execution.test_manifest import MANIFEST
from voidprune.execution.kv_cache import KvCache
from voidprune.execution.packing_record import Quantization
from voidprune.report.commands import export_options
from voidprune.schedule import Phase

LAYERS = len(MANIFEST.kept_layers)


def packed(precision: str, *bits: int, **settings: object) -> Quantization:
    layer_bits = tuple((bits[layer % len(bits)],) * 2 for layer in range(LAYERS))
    fields = {"block_size": 128, "zero_points": True, "activations": "fp32", **settings}
    average = sum(first for first, _ in layer_bits) / LAYERS
    return Quantization(
        precision, layer_bits=layer_bits, head_bits=8, average_bits=average, weight_error=0.1, **fields  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, f"--precision {MANIFEST.precision}"),
        ({"graphs": {}}, f"--precision {MANIFEST.precision} --format hf"),
        ({"operators": "standard"}, f"--precision {MANIFEST.precision} --ops standard"),
        (
            {"graphs": dict.fromkeys(Phase, MANIFEST.graphs[Phase.DECODE])},
            f"--precision {MANIFEST.precision} --layout single",
        ),
        (
            {"kv_cache": KvCache("int8", 64, ("0123456789abcdef",))},
            f"--precision {MANIFEST.precision} --kv-cache int8",
        ),
        (
            {"quantization": packed("int4", 4)},
            "--precision int4 --block-size 128 --activations fp32 --zero-points",
        ),
        (
            {"quantization": packed("int4", 4, rounding="gptq", prompts=("0123456789abcdef",), zero_points=False)},
            "--precision int4 --block-size 128 --activations fp32 --rounding gptq",
        ),
        (
            {"quantization": packed("mixed", 4, 8, block_size=32, zero_points=False, activations="int8")},
            "--precision mixed --block-size 32 --activations int8 --bits ",
        ),
        (
            {
                "quantization": packed("w8a8", 8, zero_points=False, activations="int8"),
                "sizes": {"config.json": 600, "model.w8a8.safetensors": 1},
            },
            "--precision w8a8 --format onnx --block-size 128 --activations int8",
        ),
    ],
)
def test_an_export_is_made_again_as_it_was(changes: dict[str, object], expected: str) -> None:
    quantization = changes.get("quantization")
    if isinstance(quantization, Quantization) and "sizes" not in changes:
        changes = {**changes, "sizes": {**MANIFEST.sizes, quantization.file: 1}}
    options = export_options(replace(MANIFEST, **changes))  # type: ignore[arg-type]
    assert options.startswith(expected)
    parse_command("export", ["MODEL", "--keep", "0.5", "-o", "slim", *shlex.split(options)])
