"""What a bundle is timed beside: the whole model, exported as the bundle was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.execution.manifest import read_manifest
from voidprune.models.checkpoint import open_checkpoint
from voidprune.pipeline.benchmark import _export_baseline
from voidprune.pipeline.export import export_model
from voidprune.pipeline.precision import PackingRequest
from voidprune.schedule import dropped_schedule, full_schedule


@pytest.mark.parametrize("packing", [None, PackingRequest("int8", zero_points=True)])
@pytest.mark.parametrize(("operators", "layout"), [("ort", "pair"), ("standard", "pair"), ("ort", "single")])
def test_the_whole_model_is_exported_like_the_pruned_one(
    llama: TinyModel, tmp_path: Path, operators: str, layout: str, packing: PackingRequest | None
) -> None:
    whole = open_checkpoint(llama.folder)
    pruned = export_model(
        whole,
        dropped_schedule(whole.identity, {2, 4}),
        tmp_path / "pruned",
        formats=("onnx",),
        operators=operators,
        layout=layout,
        packing=packing,
        provider="cpu",
    )
    _export_baseline(whole, full_schedule(whole.identity), tmp_path / "whole", pruned, provider="cpu")
    baseline = read_manifest(tmp_path / "whole")
    assert baseline.operators == pruned.operators == operators
    assert baseline.graphs == {
        phase: replace(graph, slots=tuple(range(NUM_LAYERS))) for phase, graph in pruned.graphs.items()
    }
    assert baseline.precision == pruned.precision
    assert baseline.is_exact == pruned.is_exact
