"""Graphs that hold keys and values in 8 bits equal a reference that does so; whatever is wrong with them is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.conftest import W8A8, W8A8_INT4
from tests.execution.test_session import mixed, random_prompts
from tests.healing.test_rounding import samples
from tests.tiny_models import TinyModel
from voidprune.artifacts import file_hash
from voidprune.errors import ModelError, ParityError
from voidprune.execution import buffer_attention
from voidprune.execution.kv_cache import KvSteps
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.rounded_cache import RoundedCache
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import RoundedKv, export_bundle
from voidprune.export.quantize import uniform_packing
from voidprune.export.rounded_kv import steps_name
from voidprune.healing.kv_steps import measure_kv_steps
from voidprune.models.pretrained import load_model
from voidprune.quality.driving import Script, run_reference
from voidprune.quality.parity import count_passes, verify_bundle
from voidprune.schedule import Boundary, Schedule, full_schedule

LITTLE = 400_000
"""Memory in which no tiny model fits whole, but any layer does."""


def measure(source: TinyModel, schedule: Schedule) -> RoundedKv:
    return RoundedKv(
        measure_kv_steps(source.model, source.checkpoint, schedule, samples(2, num_samples=8)), ("0123456789abcdef",)
    )


def export(
    source: TinyModel,
    schedule: Schedule,
    folder: Path,
    *,
    kv: RoundedKv | None = None,
    spoil: Callable[[Path], None] = lambda _stage: None,
    memory: int | None = None,
    **options: Any,
) -> Manifest:
    def verify(stage: Path) -> Any:
        spoil(stage)
        passes: list[None] = []
        found = verify_bundle(
            stage,
            source=source.checkpoint,
            schedule=schedule,
            available_bytes=memory,
            on_pass=lambda: passes.append(None),
        )
        if memory is None:
            assert len(passes) == count_passes(stage)
        return found

    chosen = measure(source, schedule) if kv is None else kv
    return export_bundle(source.checkpoint, schedule, folder, verify=verify, kv=chosen, **options)


def test_every_family_is_right(graph_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_it_runs(graph_model, Boundary.DECODE, tmp_path, monkeypatch)


def test_with_the_last_token_in_prefill(llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_it_runs(llama, Boundary.PREFILL, tmp_path, monkeypatch)


def check_as_it_runs(source: TinyModel, boundary: Boundary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exported, and with prompts that attend in chunks, however narrow the layers and short the prompts."""
    monkeypatch.setattr(buffer_attention, "LEAST_WIDTH", 0)
    monkeypatch.setattr(buffer_attention, "SHORT_PROMPT", 2)
    monkeypatch.setattr(buffer_attention, "CHUNK", 4)
    manifest = export(source, mixed(source, boundary=boundary), tmp_path / "out")
    assert manifest.kv_cache is not None
    assert manifest.fitted_prompts == {"0123456789abcdef"}
    assert not manifest.is_exact
    parity = manifest.parity
    assert parity is not None
    assert parity.onnx is not None
    assert parity.onnx <= parity.tolerance
    assert parity.kv is not None
    assert parity.kv_tolerance is not None
    assert parity.kv < 0.2 * parity.kv_tolerance
    assert Manifest.from_document(manifest.to_document(), place="here") == manifest


def test_what_cannot_hold_them_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    for options, message in (
        ({"operators": "standard"}, "the standard's attention"),
        ({"formats": ("hf",)}, "only ONNX graphs"),
    ):
        with pytest.raises(ModelError, match=message):
            export(llama, full_schedule(llama.identity), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def change_steps(stage: Path, phase: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Steps of one graph, by the names of their initializers."""
    graph = stage / f"{phase}.onnx"
    model = onnx.load(graph, load_external_data=False)
    steps = {one.name: one for one in model.graph.initializer if one.name.endswith(".step")}
    arrays = {name: onnx.numpy_helper.to_array(one).copy() for name, one in steps.items()}
    change(arrays)
    for name, array in arrays.items():
        steps[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, graph)
    path = stage / "voidprune.json"
    old = read_manifest(stage)
    document = path.read_text().replace(old.files[graph.name], file_hash(graph))
    path.write_text(
        document.replace(f'"{graph.name}":{old.sizes[graph.name]}', f'"{graph.name}":{graph.stat().st_size}')
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_phase_with_other_steps_is_found(llama: TinyModel, tmp_path: Path, phase: str) -> None:
    def double(steps: dict[str, Any]) -> None:
        steps[steps_name(0, "value")] *= 1.5

    with pytest.raises(ParityError, match="which hold K/V in 8 bits, differ"):
        export(llama, full_schedule(llama.identity), tmp_path, spoil=lambda stage: change_steps(stage, phase, double))


def test_what_cannot_hold_a_value_costs_and_is_right(llama: TinyModel, tmp_path: Path) -> None:
    """Steps of a tenth: keys and values end at a tenth of their size, in torch as in the graphs."""
    schedule = full_schedule(llama.identity)
    kv = measure(llama, schedule)
    small = RoundedKv([KvSteps(one.keys_NH / 10, one.values_NH / 10) for one in kv.steps], kv.prompts)
    right, clipped = (
        export(llama, schedule, tmp_path / name, kv=one).parity for name, one in (("right", kv), ("small", small))
    )
    assert right is not None
    assert clipped is not None
    assert clipped.kv_tolerance is not None
    assert clipped.kv_tolerance > 3 * (right.kv_tolerance or 0.0)


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"layout": "single"}, {"formats": ("onnx",)}], ids=str)
def test_with_every_other_choice(llama: TinyModel, tmp_path: Path, options: dict[str, Any]) -> None:
    schedule = full_schedule(llama.identity)
    parity = export(llama, schedule, tmp_path / "out", **options).parity
    assert parity is not None
    assert parity.kv is not None
    assert parity.kv < 0.5 * (parity.kv_tolerance or 0.0)


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize("activations", ["fp32", "int8", "fp16"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_with_packed_matrices(
    llama: TinyModel, tmp_path: Path, precision: str, activations: str, memory: int | None
) -> None:
    schedule = mixed(llama)
    packing = uniform_packing(precision, len(schedule.union), activations=activations)
    manifest = export(llama, schedule, tmp_path / "out", packing=packing, formats=("onnx",), memory=memory)
    parity = manifest.parity
    assert parity is not None
    assert parity.layer_streamed is (memory is not None)
    assert parity.kv is not None
    assert parity.kv < (parity.kv_tolerance or 0.0)
    assert manifest.kv_cache is not None
    assert manifest.kv_cache.fidelity is None, "the record of packing has it"


@pytest.mark.parametrize("precision", [W8A8, W8A8_INT4])
def test_with_products_of_rows(llama: TinyModel, tmp_path: Path, precision: str) -> None:
    schedule = full_schedule(llama.identity)
    packing = uniform_packing(precision, len(schedule.union))
    parity = export(llama, schedule, tmp_path / "out", packing=packing, formats=("onnx",)).parity
    assert parity is not None
    assert parity.kv is not None


def test_layer_by_layer_it_is_as_right(llama: TinyModel, tmp_path: Path) -> None:
    parity = export(llama, mixed(llama), tmp_path / "out", memory=LITTLE).parity
    assert parity is not None
    assert parity.layer_streamed
    assert parity.kv is not None
    assert parity.kv < 0.2 * (parity.kv_tolerance or 0.0)


def test_buffers_grow_and_shrink_with_what_is_in_them(llama: TinyModel, tmp_path: Path) -> None:
    """Two rows of unequal length, many steps, a rewind and another turn, beside torch."""
    schedule = full_schedule(llama.identity)
    kv = measure(llama, schedule)
    folder = tmp_path / "out"
    export(llama, schedule, folder, kv=kv)
    session = BundleSession(folder)
    assert session.kv_dtype == np.int8
    prompts = random_prompts(llama, (20, 3))
    conversation = session.start(2, max_positions=120)
    conversation.prefill(prompts)
    first = conversation.num_positions
    steps = np.random.default_rng(5).integers(3, 90, (2, 60))
    for column in range(60):
        logits = conversation.decode(steps[:, column : column + 1])[:, -1]
    assert conversation.num_positions > first
    conversation.rewind(3)
    with scheduled(load_model(llama.folder), schedule) as reference:
        by_layer = dict(enumerate(kv.steps))
        for row, prompt in enumerate(prompts):
            script = Script(np.array([prompt]), steps[row : row + 1], np.zeros((1, 0), np.int64))
            expected = run_reference(reference, script, lambda: RoundedCache(by_layer))
            np.testing.assert_allclose(logits[row], expected[-1, 0], atol=0.05)
            again = Script(np.array([prompt[:3]]), steps[:1, :0], np.array([[7, 8]]))
            expected = run_reference(reference, again, lambda: RoundedCache(by_layer))
            if row == 0:
                second = conversation.prefill([[7, 8], [7, 8]])
            np.testing.assert_allclose(second[row], expected[-1, 0], atol=0.05)
    assert conversation.num_positions <= first
