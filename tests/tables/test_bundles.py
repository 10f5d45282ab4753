"""What a folder says of itself: operators and layout too, within 80 columns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tables import LONG_NAME, cells, numbers_broken_off, render, wide_schedule
from voidprune.execution.kv_cache import KvCache
from voidprune.execution.manifest import Graph, Manifest, Parity
from voidprune.execution.packing_record import Fidelity, Quantization
from voidprune.schedule import Phase
from voidprune.tables import manifest_table


def make_manifest(**changes: object) -> Manifest:
    schedule = wide_schedule(80)
    files = ("prefill.onnx", "decode.onnx", "model.safetensors", "model.mixed.safetensors")
    manifest = Manifest(
        schedule=schedule,
        kept_layers=schedule.union,
        slots=schedule.kv_layers,
        dtype="BF16",
        context_length=131072,
        graphs={phase: Graph(f"{phase}.onnx", ()) for phase in Phase},
        source=LONG_NAME,
        source_bytes=141_107_412_992,
        weights_header="sha256:0",
        files={},
        sizes=dict.fromkeys(files, 123_456_789_012),
        parity=Parity(1.234e-05, 1.234e-05, 1.234e-05, 6, 4, rounded=1.234e-05, rounded_tolerance=1.234e-05),
        written_by="voidprune 0.1.0",
    )
    return replace(manifest, **changes)  # type: ignore[arg-type]


PACKED = Quantization(
    "mixed", 128, True, ((4, 8),) * len(wide_schedule(80).union), 8, "int8", 5.123, 0.0123,
    Fidelity(0.98765, 0.012345, 1.23456, 123_456), "gptq", ("0123456789abcdef",),
)  # fmt: skip


@pytest.mark.parametrize("quantization", [None, PACKED])
def test_it_fits(quantization: Quantization | None) -> None:
    text = render(manifest_table(make_manifest(quantization=quantization)))
    assert not numbers_broken_off(text)
    found = cells(text)
    assert "layout: a graph a phase (pair)" in found
    assert "operators: fused ones of onnxruntime (ort)" in found
    assert "decode.onnx 123.46 GB" in found
    assert f"{len(wide_schedule(80).union)} of 80" in found
    if quantization is not None:
        assert "perplexity x 1.2346, KL 0.012 nats," in found
        assert "rounded by GPTQ" in " ".join(found)


@pytest.mark.parametrize("quantization", [None, PACKED])
def test_how_keys_and_values_are_held(quantization: Quantization | None) -> None:
    parity = Parity(1e-05, 1e-05, 1e-04, 6, 4, kv=0.1234, kv_tolerance=0.5678)
    record = KvCache("int8", 64, ("0123456789abcdef",) * 3, None if quantization else PACKED.fidelity)
    text = render(manifest_table(make_manifest(quantization=quantization, kv_cache=record, parity=parity)))
    assert not numbers_broken_off(text)
    found = cells(text)
    assert "int8, measured on 3 prompts" in found
    assert "graphs 0.12 (allowed 0.57)" in found
    assert "perplexity x 1.2346, KL 0.012 nats," in found
    assert ("beside float32" in found) is (quantization is None)
    assert ("beside unpacked weights and K/V" in found) is (quantization is not None)


def test_other_operators_and_layouts() -> None:
    single = dict.fromkeys(Phase, Graph("prefill.onnx", ()))
    found = cells(render(manifest_table(make_manifest(graphs=single, operators="standard"))))
    assert "layout: one graph for both phases (single)" in found
    assert "operators: the ONNX standard alone (standard)" in found
    assert found.count("prefill.onnx 123.46 GB") == 1


def test_a_checkpoint_alone_has_no_graphs(tmp_path: Path) -> None:
    text = render(manifest_table(make_manifest(graphs={})))
    assert "none" in cells(text)
    assert "operators" not in text
    assert json.dumps(make_manifest(graphs={}).to_document())
