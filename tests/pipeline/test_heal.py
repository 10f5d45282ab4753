"""A healed folder: better than what it was made of, equal to what it says, and carried through everything behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import GetModel
from voidprune import artifacts
from voidprune.errors import DatasetError, HealingError, OutputError, ScheduleError
from voidprune.execution.manifest import Manifest, is_bundle, read_manifest
from voidprune.healing.training_data import prompt_hash
from voidprune.models.checkpoint import open_checkpoint, read_tensor
from voidprune.models.pretrained import load_tokenizer
from voidprune.pipeline import heal as heal_module
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.evaluation import REFERENCE, WHOLE, evaluate_model
from voidprune.pipeline.export import export_model, own_schedule
from voidprune.pipeline.generation import Style, encode_prompt, generate_texts, open_speaker
from voidprune.pipeline.heal import Patient, Treatment, heal_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.samples import Answering
from voidprune.pipeline.tasks import task_rows
from voidprune.schedule import LayerAction, Schedule, dropped_schedule, full_schedule

A = LayerAction
DATASET = Answering(responses="dataset")


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """Both phases lose whole layers, and decode one more, so that the two differ."""
    prefill = tuple(A.SKIP if layer in (7, 8) else A.FULL for layer in range(12))
    decode = tuple(A.SKIP if layer in (7, 8) else A.KV_ONLY if layer == 5 else A.FULL for layer in range(12))
    return Schedule(open_model("demo").identity, prefill, decode)


@pytest.fixture(scope="module")
def folder(schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healed") / "healed"
    rows = task_rows("demo", num_items=12, split="training")
    heal_model(open_model("demo"), schedule, folder, rows, answering=DATASET, device="cpu")
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def test_it_is_better_on_what_it_held_out_and_on_what_it_never_saw(
    folder: Path, manifest: Manifest, schedule: Schedule
) -> None:
    assert manifest.healing is not None
    found = manifest.healing.held_out
    assert found.whole < found.after < found.before
    rows = task_rows("demo", num_items=8)
    before = evaluate_model("demo", rows, dataset="demo", schedule=schedule, max_new_tokens=4).evaluations[REFERENCE]
    healed = evaluate_model(str(folder), rows, dataset="demo", baseline="demo", max_new_tokens=4).evaluations
    assert before.perplexity is not None
    assert healed[REFERENCE].perplexity is not None
    assert healed[WHOLE].perplexity is not None
    assert healed[WHOLE].perplexity < healed[REFERENCE].perplexity < before.perplexity


def test_the_folder_is_what_its_manifest_says(folder: Path, manifest: Manifest, schedule: Schedule) -> None:
    assert manifest.schedule.actions_equal(schedule)
    assert manifest.kept_layers == (0, 1, 2, 3, 4, 5, 6, 9, 10, 11)
    assert manifest.source == "voidprune-demo"
    assert manifest.graphs == {}
    assert manifest.parity is not None
    assert manifest.parity.hf <= manifest.parity.tolerance
    for name, expected in manifest.files.items():
        assert artifacts.file_hash(folder / name) == expected
    text = (folder / "README.md").read_text()
    assert "Healed (linear): its weights are not the source's" in text
    assert "the healed model" in text


def test_only_projections_have_changed_and_nothing_has_grown(folder: Path, schedule: Schedule) -> None:
    source, healed = open_model("demo"), open_checkpoint(folder)
    names = source.architecture.spec.tensors
    changed = set()
    for name, record in healed.tensors.items():
        place = names.layer_of(name)
        before = source.tensors[name if place is None else names.layer(schedule.union[place[0]], place[1])]
        assert (record.shape, record.dtype) == (before.shape, before.dtype)
        if not np.array_equal(read_tensor(record), read_tensor(before)):
            changed.add(name)
    assert {name.rpartition("layers.")[2].partition(".")[2] for name in changed} == {
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    }
    assert min(int(name.split(".")[2]) for name in changed) == 4  # below the first gap, nothing is to be made up for


def test_what_it_was_healed_with_is_never_evaluated_on(folder: Path, manifest: Manifest) -> None:
    rows = task_rows("demo", num_items=12, split="training")
    assert manifest.healing is not None
    assert len(manifest.healing.prompts) == len(rows)
    with pytest.raises(HealingError, match="1 of the 5 prompts of mixed were trained on"):
        evaluate_model(str(folder), [rows[0], *task_rows("yes-no", num_items=4)], dataset="mixed")
    prompt = load_tokenizer(folder)("not a prompt of ours")["input_ids"]
    assert prompt_hash(prompt) not in manifest.healing.prompts


def test_export_carries_the_original_model_on(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    healed = open_model(str(folder))
    own = own_schedule(healed)
    assert own is not None
    exported = export_model(healed, own, tmp_path / "slim", provider="cpu")
    assert (exported.schedule, exported.kept_layers, exported.slots) == (
        manifest.schedule, manifest.kept_layers, manifest.slots,
    )  # fmt: skip
    assert (exported.source, exported.source_bytes, exported.healing) == (
        manifest.source, manifest.source_bytes, manifest.healing,
    )  # fmt: skip
    assert exported.files["model.safetensors"] == manifest.files["model.safetensors"]
    assert read_manifest(tmp_path / "slim") == exported
    prompt = "Sort from smallest to largest: 91, 97, 73"
    texts = []
    for name in (folder, tmp_path / "slim"):
        with open_speaker(str(name), provider="cpu") as speaker:
            assert (speaker.session is None) == (name == folder)
            tokens = encode_prompt(speaker.tokenizer, [{"role": "user", "content": prompt}], raw=False)
            pieces = generate_texts(speaker, [tokens], Style(max_new_tokens=12))
            texts.append("".join(piece.text for piece in pieces))
    assert texts[0] == texts[1] != ""


def test_another_schedule_of_a_bundle_is_a_model_of_its_own(folder: Path, tmp_path: Path) -> None:
    healed = open_model(str(folder))
    exported = export_model(healed, dropped_schedule(healed.identity, {1}), tmp_path / "slim", formats=("hf",))
    assert exported.source == "healed"
    assert exported.healing is None
    assert own_schedule(open_model("demo")) is None


def test_it_is_timed_with_graphs_made_for_the_occasion(folder: Path) -> None:
    document = benchmark_bundle(
        folder, baseline="demo", provider="cpu", prompt_length=4, num_new_tokens=2, num_rounds=1
    )
    assert {runner["name"] for runner in document["timings"]} == {"whole model", "pruned"}
    assert is_bundle(folder)
    assert not list(folder.glob("*.onnx"))


def test_a_method_that_harms_changes_nothing(
    schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(patient: Patient) -> Treatment:
        name = "model.layers.0.mlp.down_proj.weight"
        return Treatment({name: torch.zeros(patient.checkpoint.tensors[name].shape)}, {}, {})

    monkeypatch.setattr(heal_module, "METHODS", {"linear": harm})
    rows = task_rows("yes-no", num_items=30, split="training")
    manifest = heal_model(open_model("demo"), schedule, tmp_path / "out", rows, answering=DATASET, device="cpu")
    assert manifest.healing is not None
    assert not manifest.healing.has_helped
    untouched = export_model(open_model("demo"), schedule, tmp_path / "plain", formats=("hf",))
    assert manifest.files["model.safetensors"] == untouched.files["model.safetensors"]
    assert "helped nothing" in (tmp_path / "out" / "README.md").read_text()


def test_bf16_weights_are_healed_in_bf16(get_model: GetModel, schedule: Schedule, tmp_path: Path) -> None:
    small = export_model(
        open_model("demo"), full_schedule(schedule.model), tmp_path / "bf16", formats=("hf",), precision="bf16"
    )
    (tmp_path / "bf16" / "voidprune.json").unlink()  # a model, no bundle
    rows = task_rows("yes-no", num_items=30, split="training")
    manifest = heal_model(
        open_model(str(tmp_path / "bf16")), schedule, tmp_path / "out", rows, answering=DATASET, device="cpu"
    )
    assert manifest.dtype == small.dtype == "BF16"
    assert manifest.healing is not None
    assert manifest.healing.has_helped


def test_what_cannot_be_healed_is_refused_before_anything_is_done(
    folder: Path, schedule: Schedule, get_model: GetModel, tmp_path: Path
) -> None:
    demo, rows = open_model("demo"), task_rows("yes-no", num_items=3)
    gemma = get_model("gemma2")
    healed = open_model(str(folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for checkpoint, wanted, target, error, message in (
        (demo, full_schedule(demo.identity), "out", HealingError, "leaves nothing out"),
        (demo, dropped_schedule(gemma.identity, {1}), "out", ScheduleError, "is for gemma2"),
        (gemma.checkpoint, dropped_schedule(gemma.identity, {1}), "out", HealingError, "a norm stands between"),
        (healed, dropped_schedule(healed.identity, {1}), "out", HealingError, "is a bundle"),
        (demo, schedule, "out", HealingError, "too few"),
        (demo, schedule, "full", OutputError, "exists"),
    ):
        with pytest.raises(error, match=message):
            heal_model(checkpoint, wanted, tmp_path / target, rows[:1], answering=DATASET, device="cpu")
    nothing = [replace(row, response=None) for row in rows]
    with pytest.raises(DatasetError, match="no response"):
        heal_model(demo, schedule, tmp_path / "out", nothing, answering=DATASET, device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_record_is_plain_json(folder: Path, manifest: Manifest) -> None:
    document = json.loads((folder / "voidprune.json").read_bytes())
    branches = document["healing"]["outcomes"]["linear"]["branches"]
    assert {branch["part"] for branch in branches} == {"attention", "mlp"}
    assert all(branch["error_after"] <= branch["error_before"] for branch in branches)
    assert Manifest.from_document(document, place="here") == manifest
