"""The file of packed matrices: what graphs read, side by side, and always the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.conftest import GetModel
from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.errors import CheckpointError
from voidprune.export.block_rounding import quantize_rows, restore_rows
from voidprune.export.quantize import (
    LayerBits,
    Packing,
    average_bits,
    layer_weights,
    packed_bytes,
    uniform_packing,
    write_packed,
)
from voidprune.models.checkpoint import open_checkpoint, read_tensor
from voidprune.models.copying import copy_tensors
from voidprune.models.packed import (
    PackedRecord,
    dequantize_rows,
    differs_by_phase,
    multiplies_rows,
    read_packed,
)
from voidprune.models.tensors import TensorRecord, numpy_dtype, read_rows
from voidprune.schedule import Phase


@pytest.mark.parametrize("precision", ["int4", "int8", "w8a8", "w8a8-int4"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 128}, {"zero_points": True}])
def test_file_means_the_rounded_weights(
    llama: TinyModel, tmp_path: Path, precision: str, settings: dict[str, Any]
) -> None:
    kept = (0, 2, 5)
    packing = uniform_packing(precision, len(kept), **settings)
    errors = write_packed(llama.checkpoint, kept, tmp_path / "packed", packing)
    parts = []
    for phase in Phase:
        found = read_packed(tmp_path / "packed", phase)
        assert len(found) == 3 + 9 * len(kept)
        num_packed, square = 0, 0.0
        for name, record in found.items():
            place = llama.checkpoint.architecture.spec.tensors.layer_of(name)
            source = name if place is None else f"model.layers.{kept[place[0]]}.{place[1]}"
            weights = np.array(read_tensor(llama.checkpoint.tensors[source]))
            if isinstance(record, PackedRecord):
                assert record.blocks.whole_rows == (multiplies_rows(precision, phase) and place is not None)
                meant = dequantize_rows(record, 0, record.shape[0])
                assert (meant == restore_rows(weights, record.blocks)).all()
                square += float(np.square(meant.astype(np.float64) - weights).sum())
                num_packed += 1
                parts += record.stored_parts
            else:
                assert (np.array(read_tensor(record)) == weights).all()
                parts.append(record)
        assert num_packed == 2 + 7 * len(kept), "embedding, head, and all matrices of layers"
        error = sum(error for error, _ in errors.squares.values())
        assert (error == pytest.approx(square)) == (phase is Phase.DECODE or not differs_by_phase(precision))
    assert 0.001 < errors.relative < 0.12
    content = (tmp_path / "packed").stat().st_size
    assert packed_bytes(llama.checkpoint, kept, packing) == content - min(part.offset for part in parts)


@pytest.mark.parametrize(("activations", "dtype"), [("fp16", "F16"), ("bf16", "BF16")])
def test_scales_and_all_that_is_not_packed_are_in_16_bits_where_graphs_compute_in_them(
    llama: TinyModel, tmp_path: Path, activations: str, dtype: str
) -> None:
    packing = uniform_packing("int4", NUM_LAYERS, activations=activations, zero_points=True)
    errors = write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)
    square, kind = 0.0, numpy_dtype(dtype)
    found = read_packed(tmp_path / "packed")
    for name, record in found.items():
        weights = np.array(read_tensor(llama.checkpoint.tensors[name]))
        if isinstance(record, PackedRecord):
            assert record.scales.dtype == dtype
            exact = quantize_rows(weights, record.blocks).scales
            assert (read_rows(record.scales, 0, record.shape[0]) == exact.astype(kind)).all()
            meant = dequantize_rows(record, 0, record.shape[0])
            square += float(np.square(meant.astype(np.float64) - weights).sum())
        else:
            assert record.dtype == dtype
            assert (read_rows(record, 0, record.shape[0]) == weights.astype(kind)).all()
    assert sum(error for error, _ in errors.squares.values()) == pytest.approx(square), "of what was written"
    content = (tmp_path / "packed").stat().st_size
    first = min(part.offset for record in found.values() for part in getattr(record, "stored_parts", (record,)))
    assert packed_bytes(llama.checkpoint, range(NUM_LAYERS), packing) == content - first


def test_what_16_bits_do_not_hold_is_named(tmp_path: Path) -> None:
    source = build_model("llama", tmp_path / "source")
    record = source.checkpoint.tensors["model.layers.2.input_layernorm.weight"]
    with record.file.open("r+b") as file:
        file.seek(record.offset)
        file.write(np.array([70000], np.float32).tobytes())
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.input_layernorm\.weight has values that are too large for float16"
    ):
        write_packed(
            source.checkpoint,
            range(NUM_LAYERS),
            tmp_path / "packed",
            uniform_packing("int4", NUM_LAYERS, activations="fp16"),
        )
    packing = uniform_packing("int4", NUM_LAYERS, activations="bf16")
    write_packed(source.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)


def test_scales_that_vanish_in_16_bits_are_named(tmp_path: Path) -> None:
    source = build_model("llama", tmp_path / "source")
    record = source.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    tiny = np.random.default_rng(0).normal(0, 1e-6, record.shape).astype(np.float32)
    with record.file.open("r+b") as file:
        file.seek(record.offset)
        file.write(tiny.tobytes())
    for activations in ("int8", "bf16", "fp16"):
        packing = uniform_packing("int8", NUM_LAYERS, activations=activations)
        refused = pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has blocks whose scales are too small"
        )
        with refused if activations == "fp16" else contextlib.nullcontext():
            write_packed(source.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)


def test_what_one_product_spans_lies_side_by_side(llama: TinyModel, tmp_path: Path) -> None:
    write_packed(
        llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", uniform_packing("int4", NUM_LAYERS, zero_points=True)
    )
    assert_side_by_side(read_packed(tmp_path / "packed"))


def test_what_each_phase_spans_lies_side_by_side(llama: TinyModel, tmp_path: Path) -> None:
    packing = uniform_packing("w8a8-int4", NUM_LAYERS, zero_points=True)
    write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / "packed", packing)
    for phase in Phase:
        assert_side_by_side(read_packed(tmp_path / "packed", phase))


def assert_side_by_side(found: Mapping[str, TensorRecord]) -> None:
    """Queries, keys and values of a layer: the numbers of all, the scales of all, the zero points of all."""
    records = [found[f"model.layers.3.self_attn.{part}_proj.weight"] for part in "qkv"]
    for parts in zip(*(record.stored_parts for record in records if isinstance(record, PackedRecord)), strict=True):
        ends = [part.offset + part.num_bytes for part in parts]
        assert [part.offset for part in parts[1:]] == ends[:-1]


def test_same_source_gives_the_same_bytes(llama: TinyModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_packed(llama.checkpoint, range(NUM_LAYERS), tmp_path / name, uniform_packing("int4", NUM_LAYERS))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_source_in_16_bits_is_packed_as_it_is(llama: TinyModel, tmp_path: Path, dtype: str) -> None:
    """As its numbers in float32 are."""
    for folder in ("wide", "narrow"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    copy_tensors(llama.checkpoint.tensors.items(), tmp_path / "narrow" / "model.safetensors", dtype=dtype)
    narrow = open_checkpoint(tmp_path / "narrow")
    copy_tensors(narrow.tensors.items(), tmp_path / "wide" / "model.safetensors", dtype="F32")
    wide = open_checkpoint(tmp_path / "wide")
    for checkpoint, file in ((narrow, "a"), (wide, "b")):
        write_packed(checkpoint, range(NUM_LAYERS), tmp_path / file, uniform_packing("int8", NUM_LAYERS))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fused_matrices_and_norms_of_heads(get_model: GetModel, tmp_path: Path) -> None:
    fused = get_model("phi3").checkpoint
    write_packed(fused, [1], tmp_path / "phi3", uniform_packing("int4", 1))
    assert isinstance(read_packed(tmp_path / "phi3")["model.layers.0.self_attn.qkv_proj.weight"], PackedRecord)
    normed = get_model("cohere").checkpoint
    write_packed(normed, [1], tmp_path / "cohere", uniform_packing("int4", 1))
    norm = read_packed(tmp_path / "cohere")["model.layers.0.self_attn.q_norm.weight"]
    assert len(norm.shape) == 2
    assert norm.dtype == "F32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(llama: TinyModel, tmp_path: Path, value: float) -> None:
    tensors = safetensors.torch.load_file(llama.folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = torch.where(torch.arange(tensors[name].numel()).view_as(tensors[name]) == 77, value, tensors[name])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        write_packed(
            open_checkpoint(tmp_path), range(NUM_LAYERS), tmp_path / "packed", uniform_packing("int4", NUM_LAYERS)
        )


def test_average_is_of_weights_not_of_layers(llama: TinyModel) -> None:
    weights = layer_weights(llama.checkpoint, (0, 1))
    assert weights == [LayerBits(64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 96)] * 2
    assert average_bits([LayerBits(4, 4), LayerBits(8, 8)], weights) == 6
    assert average_bits([LayerBits(8, 4), LayerBits(8, 4)], weights) == pytest.approx(4 + 4 * 12288 / 30720)


def test_progress_counts_every_byte(llama: TinyModel, tmp_path: Path) -> None:
    packing = Packing("mixed", (LayerBits(4, 8), LayerBits(8, 4)), 8, block_size=128, zero_points=True)
    told: list[int] = []
    write_packed(llama.checkpoint, (0, 1), tmp_path / "packed", packing, advance=told.append)
    assert sum(told) == packed_bytes(llama.checkpoint, (0, 1), packing)
