"""A healed folder: better than what it was made of, equal to what it says, and carried through everything behind it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import GetModel
from tests.several_processes import environment, launcher
from tests.tiny_models import build_model
from voidprune import artifacts
from voidprune.errors import ArtifactError, DatasetError, HealingError, MissingExtraError, OutputError, ScheduleError
from voidprune.execution.manifest import Manifest, is_bundle, read_manifest
from voidprune.healing.settings import DistillSettings, Parameters
from voidprune.healing.training_data import prompt_hash
from voidprune.healing.training_state import Measurement
from voidprune.models.checkpoint import open_checkpoint, read_tensor
from voidprune.models.pretrained import load_tokenizer
from voidprune.pipeline import heal as heal_module
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.evaluation import REFERENCE, WHOLE, evaluate_model
from voidprune.pipeline.export import export_model, own_schedule
from voidprune.pipeline.generation import Style, encode_prompt, generate_texts, open_speaker
from voidprune.pipeline.heal import Patient, Treatment, heal_model
from voidprune.pipeline.models import demo_folder, open_model
from voidprune.pipeline.rounds import Rounds
from voidprune.pipeline.samples import Answering
from voidprune.pipeline.tasks import task_rows
from voidprune.planning.budgets import Budget
from voidprune.schedule import LayerAction, Schedule, dropped_schedule, full_schedule

A = LayerAction
DATASET = Answering(responses="dataset")
SHORT = DistillSettings(steps=12, batch_size=8, evaluate_every=4, rank=8, alpha=8, learning_rate=1e-3)
TOO_FAST = replace(SHORT, learning_rate=0.3)
"""So fast that nothing is learned."""


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


def distilled(
    schedule: Schedule, folder: Path, *methods: str, settings: DistillSettings = SHORT, **options: Any
) -> Manifest:
    """Of the items that `folder` is healed with."""
    rows = task_rows("demo", num_items=12, split="training")
    return heal_model(
        open_model("demo"), schedule, folder, rows,
        methods=methods, distill_settings=settings, answering=DATASET, device="cpu", **options,
    )  # fmt: skip


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
        folder, baseline="demo", provider="cpu", prompt_lengths=(4,), num_new_tokens=2, num_rounds=1
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


def test_distillation_goes_on_where_the_fit_ends(schedule: Schedule, manifest: Manifest, tmp_path: Path) -> None:
    measured = []
    healed = distilled(schedule, tmp_path / "out", "linear", "distill", report=measured.append).healing
    assert healed is not None
    assert manifest.healing is not None
    assert healed.methods == ("linear", "distill")
    assert healed.held_out.before == manifest.healing.held_out.before
    assert healed.held_out.after < manifest.healing.held_out.after
    assert healed.outcomes["linear"] == manifest.healing.outcomes["linear"]
    assert [measurement.step for measurement in measured] == [0, 4, 8, 12]
    outcome = healed.outcomes["distill"]
    assert [look["held_out_loss"] for look in outcome["history"]] == [look.held_out_loss for look in measured]
    assert outcome["loss_after"] < outcome["loss_before"]
    assert outcome["stopped"] == "steps"
    assert healed.settings["distill"]["rank"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_manifest(tmp_path / "out").healing == healed


@pytest.mark.parametrize("parameters", Parameters)
@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_families_that_cannot_be_fitted_are_distilled(family: str, parameters: Parameters, tmp_path: Path) -> None:
    build_model(family, tmp_path / "model", vocab_size=606, bos_token_id=1, eos_token_id=4, max_position_embeddings=512)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_folder() / name, tmp_path / "model" / name)
    model = open_model(str(tmp_path / "model"))
    settings = replace(
        SHORT,
        parameters=parameters,
        embeddings=parameters is Parameters.FULL,
        steps=24,
        evaluate_every=8,
        learning_rate=1e-2,
    )
    healed = heal_model(
        model,
        dropped_schedule(model.identity, {1}),
        tmp_path / "out",
        task_rows("demo", num_items=20, split="training"),
        methods=("distill",),
        distill_settings=settings,
        answering=Answering(max_new_tokens=6),
        device="cpu",
    ).healing
    assert healed is not None
    assert healed.has_helped
    assert healed.held_out.after < healed.held_out.before


def test_training_that_is_not_better_is_not_kept(
    folder: Path, schedule: Schedule, manifest: Manifest, tmp_path: Path
) -> None:
    alone = distilled(schedule, tmp_path / "alone", "distill", settings=TOO_FAST)
    assert alone.healing is not None
    assert not alone.healing.has_helped
    untouched = export_model(open_model("demo"), schedule, tmp_path / "plain", formats=("hf",))
    assert alone.files["model.safetensors"] == untouched.files["model.safetensors"]
    after = distilled(schedule, tmp_path / "after", "linear", "distill", settings=TOO_FAST)
    assert after.healing == manifest.healing, "what was dropped is not said to have healed"
    assert after.files["model.safetensors"] == manifest.files["model.safetensors"]


KILLED = """
import os, signal
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.pipeline.test_heal import distilled
from voidprune.schedule import read_schedule

def report(measurement):
    if measurement.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

distilled(read_schedule(Path("schedule.json")), Path("out"), "linear", "distill", report=report)
"""
ENVIRONMENT = environment(PYTHONPATH=str(Path(__file__).parents[2]))


def write_schedule(schedule: Schedule, path: Path) -> None:
    path.write_bytes(artifacts.canonical_bytes(schedule.to_document()))


def test_process_that_was_killed_ends_in_the_same_bytes(schedule: Schedule, tmp_path: Path) -> None:
    write_schedule(schedule, tmp_path / "schedule.json")
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.json", "out.training"}
    seen = []
    distilled(schedule, tmp_path / "out", "linear", "distill", report=seen.append)
    assert [measurement.step for measurement in seen] == [12]
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.json", "out"}
    distilled(schedule, tmp_path / "again" / "out", "linear", "distill")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "out" / path.name).read_bytes(), path.name


class KilledError(Exception):
    pass


def test_with_overwrite_what_another_run_left_is_no_obstacle(schedule: Schedule, tmp_path: Path) -> None:
    """Other settings begin anew, and nothing of either run stays; the same settings go on."""

    def killed(measurement: Measurement) -> None:
        if measurement.step == 8:
            raise KilledError

    folder, seen = tmp_path / "out", list[int]()
    with pytest.raises(KilledError):
        distilled(schedule, folder, "distill", report=killed)
    assert (tmp_path / "out.training" / "training.safetensors").is_file()
    other = replace(SHORT, seed=1)
    with pytest.raises(ArtifactError, match="begun by another run") as caught:
        distilled(schedule, folder, "distill", settings=other)
    assert "--overwrite" in str(caught.value.hint)
    with pytest.raises(KilledError):
        distilled(schedule, folder, "distill", settings=other, overwrite=True, report=killed)
    distilled(schedule, folder, "distill", settings=other, overwrite=True, report=lambda found: seen.append(found.step))
    assert seen == [12], "what was left by these settings is taken up"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_rounds_choose_on_what_was_healed_and_go_on_where_they_were_killed(schedule: Schedule, tmp_path: Path) -> None:
    rounds = Rounds(Budget(0.75, 0.75, shared=True), 2)
    whole, short = full_schedule(schedule.model), replace(SHORT, steps=4)
    seen = []

    def kill(measurement: Measurement) -> None:
        seen.append(measurement.step)
        if len(seen) == 3:  # the second round has begun
            raise KilledError

    with pytest.raises(KilledError):
        distilled(whole, tmp_path / "out", "linear", "distill", settings=short, rounds=rounds, report=kill)
    assert {path.name for path in (tmp_path / "out.training").iterdir()} == {"round-1", "round-2"}
    resumed = distilled(whole, tmp_path / "out", "linear", "distill", settings=short, rounds=rounds)
    plain = distilled(whole, tmp_path / "plain" / "out", "linear", "distill", settings=short, rounds=rounds)
    assert resumed == plain
    assert {path.name for path in tmp_path.iterdir()} == {"out", "plain"}
    assert plain.healing is not None
    assert plain.healing.has_helped
    assert plain.healing.methods == ("linear", "distill")
    first, second = plain.healing.outcomes["distill"]["rounds"]
    assert (len(first["layers"]), len(second["layers"])) == (11, 9)  # 10.5 layers, rounded
    assert set(second["layers"]) < set(first["layers"])
    assert plain.kept_layers == tuple(second["layers"])
    assert [done["layers"] for done in plain.healing.outcomes["linear"]["rounds"]] == [first["layers"]]


def test_rounds_of_the_fit_alone_begin_with_the_weights_of_the_source(schedule: Schedule, tmp_path: Path) -> None:
    """So that what they end with is the fit of the last schedule."""
    found = distilled(
        full_schedule(schedule.model), tmp_path / "rounds", "linear", rounds=Rounds(Budget(0.75, 0.75), 2)
    )
    alone = distilled(found.schedule, tmp_path / "alone", "linear")
    assert found.files["model.safetensors"] == alone.files["model.safetensors"]
    with pytest.raises(HealingError, match="the rounds leave nothing out"):
        distilled(full_schedule(schedule.model), tmp_path / "out", "linear", rounds=Rounds(Budget(1.0, 1.0), 2))


def test_several_processes_train_and_one_writes(schedule: Schedule, tmp_path: Path) -> None:
    write_schedule(schedule, tmp_path / "schedule.json")
    rows = task_rows("demo", num_items=12, split="training")
    items = [{"prompt": row.messages[0]["content"], "response": row.response} for row in rows]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    command = (
        "-m voidprune heal demo --schedule schedule.json -o out --method distill --dataset items.jsonl --steps 12 "
        "--responses dataset --evaluate-every 4 --heal-batch-size 8 --rank 8 --learning-rate 1e-3 --device cpu --json"
    )
    done = subprocess.run(
        [sys.executable, *launcher(), *command.split()], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "voidprune.json").read_bytes())
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.json", "items.jsonl", "out"}
    plain = distilled(schedule, tmp_path / "plain", "distill").healing
    assert plain is not None
    assert document["healing"]["held_out"]["after"] == pytest.approx(plain.held_out.after, rel=1e-2)


NOTED = """
import os, sys
from pathlib import Path
from voidprune.cli import main
from voidprune.pipeline import heal

export_bundle = heal.export_bundle

def noted(*arguments, **options):
    with Path("writers").open("a") as file:
        file.write(os.environ["RANK"])
    return export_bundle(*arguments, **options)

heal.export_bundle = noted
main()
"""


@pytest.mark.parametrize("what", ["--schedule schedule.json", "--rounds 2 --keep 0.75 --phases shared"])
def test_of_several_processes_one_fits_and_writes(schedule: Schedule, tmp_path: Path, what: str) -> None:
    write_schedule(schedule, tmp_path / "schedule.json")
    (tmp_path / "noted.py").write_text(NOTED)
    command = f"noted.py heal demo {what} -o out --method linear --dataset demo --num-samples 8 --device cpu --json"
    done = subprocess.run(
        [sys.executable, *launcher(), *command.split()], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "voidprune.json").read_bytes())
    assert (tmp_path / "writers").read_text() == "0"


def test_trainings_that_cannot_begin_are_refused_before_anything_is_done(
    schedule: Schedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for methods in (("distill", "linear"), ("distill", "distill")):
        with pytest.raises(HealingError, match="do not follow each other"):
            distilled(schedule, tmp_path / "out", *methods)
    with pytest.raises(HealingError, match="nothing is trained in fp16"):
        distilled(schedule, tmp_path / "out", "distill", dtype="fp16")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="peft is not installed") as caught:
        distilled(schedule, tmp_path / "out", "distill")
    assert caught.value.hint == "pip install 'voidprune[heal]'"
    assert not list(tmp_path.iterdir())


def test_the_record_is_plain_json(folder: Path, manifest: Manifest) -> None:
    document = json.loads((folder / "voidprune.json").read_bytes())
    branches = document["healing"]["outcomes"]["linear"]["branches"]
    assert {branch["part"] for branch in branches} == {"attention", "mlp"}
    assert all(branch["error_after"] <= branch["error_before"] for branch in branches)
    assert document["healing"]["origin"] == {"responses": "dataset", "max_new_tokens": 64, "dtype": "fp32"}
    assert Manifest.from_document(document, place="here") == manifest
