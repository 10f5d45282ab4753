"""What a bundle must read and multiply, beside the costs of its schedule, which are counted from the checkpoint, not the graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import GetModel
from tests.tiny_models import TinyModel
from voidprune.execution import detached_head
from voidprune.execution.detached_head import MOST_ROWS
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.sizes import measure_sizes
from voidprune.pipeline.export import export_model
from voidprune.pipeline.precision import PackingRequest
from voidprune.planning.costs import PROMPT_LENGTH, schedule_costs
from voidprune.quality.work import BundleWork, measure_work
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

F, K, A, M = LayerAction.FULL, LayerAction.KV_ONLY, LayerAction.SKIP_MLP, LayerAction.KV_MLP


def schedules(model: TinyModel) -> list[Schedule]:
    identity = open_checkpoint(model.folder).identity
    whole = full_schedule(identity)
    rest = (F,) * (identity.num_layers - 4)
    return [
        whole,
        dropped_schedule(identity, {1, 3}),
        replace(whole, prefill=(F, A, K, K, *rest), decode=(F, M, F, F, *rest)),
        replace(whole, prefill=(F, F, K, *rest, K), decode=(F, F, A, F, *rest)),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("operators", ["ort", "standard"])
def test_bytes_and_arithmetic_are_those_of_the_schedule(
    llama: TinyModel, tmp_path: Path, number: int, operators: str
) -> None:
    checkpoint, schedule = open_checkpoint(llama.folder), schedules(llama)[number]
    export_model(checkpoint, schedule, tmp_path / "bundle", provider="cpu", operators=operators)
    work = measure_work(tmp_path / "bundle")
    costs = schedule_costs(measure_sizes(checkpoint), schedule)
    step = work.decode(PROMPT_LENGTH, num_rows=1)
    # Norms are counted with neither attention nor MLP there, and are read all the same.
    norms = sum(r.num_bytes for r in open_checkpoint(tmp_path / "bundle").tensors.values() if len(r.shape) == 1)
    assert costs.decode_bytes <= step.bytes <= costs.decode_bytes + norms
    assert work.prefill(PROMPT_LENGTH, num_rows=1).flops == costs.prefill_flops


def test_rows_share_weights_and_nothing_else(llama: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama.folder)
    export_model(checkpoint, full_schedule(checkpoint.identity), tmp_path / "bundle", provider="cpu")
    work = measure_work(tmp_path / "bundle")
    weights = work.weight_bytes[Phase.DECODE]
    one, four = work.decode(10, num_rows=1), work.decode(10, num_rows=4)
    assert four.flops == 4 * one.flops
    assert four.bytes - weights == 4 * (one.bytes - weights) > 0
    assert work.prefill(10, num_rows=4).bytes == work.prefill(10, num_rows=1).bytes
    longer = work.decode(20, num_rows=1)
    assert longer.bytes - weights == 2 * (one.bytes - weights)


def test_packed_matrices_are_counted_as_they_are_stored(llama: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama.folder)
    whole = full_schedule(checkpoint.identity)
    for name, packing in (("plain", None), ("packed", PackingRequest("int4"))):
        formats = ("hf", "onnx") if packing is None else ("onnx",)
        export_model(checkpoint, whole, tmp_path / name, formats=formats, packing=packing, provider="cpu")
    plain, packed = measure_work(tmp_path / "plain"), measure_work(tmp_path / "packed")
    file = (tmp_path / "packed" / "model.int4.safetensors").stat().st_size
    assert packed.weight_bytes[Phase.DECODE] < file < plain.weight_bytes[Phase.DECODE]
    assert packed.decode(10, num_rows=1).flops == plain.decode(10, num_rows=1).flops
    assert packed.kv_bytes == plain.kv_bytes


def test_a_window_limits_what_attention_sees(get_model: GetModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(get_model("starcoder2").folder)
    export_model(checkpoint, full_schedule(checkpoint.identity), tmp_path / "bundle", provider="cpu")
    work = measure_work(tmp_path / "bundle")
    window = work.architecture.windows[0]
    assert window is not None
    assert work.decode(window, num_rows=1) == work.decode(window + 5, num_rows=1)
    assert work.decode(window - 1, num_rows=1).bytes < work.decode(window, num_rows=1).bytes


def test_the_prefill_boundary_leaves_the_end_to_the_last_token(llama: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama.folder)
    found = {}
    for boundary in Boundary:
        folder = tmp_path / str(boundary)
        export_model(checkpoint, full_schedule(checkpoint.identity, boundary=boundary), folder, provider="cpu")
        found[boundary] = measure_work(folder).prefill(50, num_rows=1)
    assert found[Boundary.PREFILL] == found[Boundary.DECODE]


def test_a_screened_head_counts_with_its_8_bits(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte a number, a scale in float32 for 32 of them, and two bounds a row, in place of float32; in one graph all of it."""
    monkeypatch.setattr(detached_head, "LEAST_BYTES", 0)
    checkpoint, schedule = open_checkpoint(llama.folder), full_schedule(open_checkpoint(llama.folder).identity)
    export_model(checkpoint, schedule, tmp_path / "pair", provider="cpu")
    export_model(checkpoint, schedule, tmp_path / "single", provider="cpu", layout="single")
    work = measure_work(tmp_path / "pair")
    vocab_size, width = work.architecture.vocab_size, work.architecture.hidden_size
    spared = vocab_size * (4 * width - width - width // 8 - 8)
    for num_rows, expected in ((1, spared), (MOST_ROWS, spared), (MOST_ROWS + 1, 0)):
        for count in (BundleWork.prefill, BundleWork.decode):
            whole, screened = (count(found, 10, num_rows=num_rows) for found in (work, work.greedily()))
            assert (whole.bytes - screened.bytes, whole.flops - screened.flops) == (expected, 0)
    single = measure_work(tmp_path / "single")
    assert single.greedily().decode(10, num_rows=1) == single.decode(10, num_rows=1)
