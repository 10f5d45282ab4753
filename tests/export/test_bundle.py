"""The one folder: complete or absent, the same bytes every time, and it says what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.conftest import GetModel, MakeBundle
from tests.other_python import find_python
from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune import artifacts
from voidprune.errors import CheckpointError, ModelError, OutputError, ParityError, ScheduleError
from voidprune.execution import session as session_module
from voidprune.execution.manifest import Manifest, Parity, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.models.checkpoint import WEIGHTS_FILE, Checkpoint, open_checkpoint
from voidprune.models.pretrained import end_tokens, load_model
from voidprune.quality.parity import TOLERANCE, check_bundle
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction
PARITY = Parity(hf=0.0, onnx=0.0, tolerance=1e-4, num_prompts=1, num_decode_steps=1)
FILES = {
    "README.md",
    "config.json",
    "decode.onnx",
    "genai_config.json",
    "generation_config.json",
    WEIGHTS_FILE,
    "prefill.onnx",
    "voidprune.json",
}


def accept(_stage: Path) -> Parity:
    return PARITY


def export(source: TinyModel, folder: Path, **arguments: Any) -> Manifest:
    schedule = arguments.pop("schedule", dropped_schedule(source.identity, {2}))
    return export_bundle(source.checkpoint, schedule, folder, **{"verify": accept, **arguments})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- families without graphs


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma2", "gemma3", "granite", "qwen3_moe"])
def test_families_without_graphs_are_exported_as_checkpoints(
    get_model: Callable[[str], TinyModel], tmp_path: Path, name: str
) -> None:
    source = get_model(name)
    schedule = Schedule(
        model=source.identity,
        prefill=(A.FULL, A.SKIP, A.KV_ONLY, A.KV_MLP, A.FULL, A.SKIP),
        decode=(A.FULL, A.SKIP, A.SKIP_MLP, A.FULL, A.SKIP_MLP, A.SKIP_ATTENTION),
    )
    manifest = export(
        source,
        tmp_path / "out",
        schedule=schedule,
        formats=("hf",),
        verify=lambda stage: check_bundle(stage, source=source.model, schedule=schedule),
    )
    assert contents(tmp_path / "out").keys() == FILES - {"prefill.onnx", "decode.onnx", "genai_config.json"}
    assert manifest.parity is not None
    assert manifest.parity.onnx is None
    assert manifest.parity.hf < 1e-5


def test_graphs_that_cannot_be_are_refused_before_anything_is_written(
    get_model: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no ONNX graphs are made of mixtral models") as caught:
        export(get_model("mixtral"), tmp_path / "out", formats=("hf", "onnx"))
    assert caught.value.hint == "export with --format hf; Optimum makes one graph of some of those: docs/optimum.md"
    assert not list(tmp_path.iterdir())


# ---- what is in it


def test_folder_holds_these_files(llama: TinyModel, tmp_path: Path) -> None:
    manifest = export(llama, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == FILES
    assert read_manifest(tmp_path / "out") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_manifest_is_true(tiny_model: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = dropped_schedule(tiny_model.identity, {0, 3})
    bundle = make_bundle(tiny_model, schedule)
    manifest = bundle.manifest
    assert manifest == read_manifest(bundle.folder)
    assert manifest.schedule == schedule
    assert manifest.kept_layers == manifest.slots == (1, 2, 4, 5)
    assert manifest.source == tiny_model.name
    assert manifest.source_bytes == (tiny_model.folder / "model.safetensors").stat().st_size
    assert manifest.dtype == "F32"
    assert manifest.context_length == 160
    assert manifest.files.keys() == manifest.sizes.keys() == FILES - {"README.md", "voidprune.json"}
    for name, digest in manifest.files.items():
        assert artifacts.file_hash(bundle.folder / name) == digest
        assert (bundle.folder / name).stat().st_size == manifest.sizes[name]
    assert open_checkpoint(bundle.folder).architecture.num_layers == 4


def test_slots_are_numbers_of_the_original_layers(llama: TinyModel, tmp_path: Path) -> None:
    schedule = Schedule(
        model=llama.identity,
        prefill=(A.FULL, A.SKIP, A.SKIP_ATTENTION, A.KV_ONLY, A.FULL, A.FULL),
        decode=(A.FULL, A.SKIP, A.SKIP, A.FULL, A.SKIP, A.SKIP_ATTENTION),
        single_turn=True,
    )
    manifest = export(llama, tmp_path / "out", schedule=schedule)
    assert manifest.kept_layers == (0, 2, 3, 4, 5)
    assert manifest.slots == (0, 3, 4, 5)
    assert manifest.graphs[Phase.PREFILL].slots == (0, 1, 2, 3)
    assert manifest.graphs[Phase.DECODE].slots == (0, 1)


def test_checkpoint_alone(llama: TinyModel, tmp_path: Path) -> None:
    manifest = export(llama, tmp_path / "out", formats=("hf",))
    assert contents(tmp_path / "out").keys() == FILES - {"prefill.onnx", "decode.onnx", "genai_config.json"}
    assert manifest.graphs == {}


def test_precision_is_in_the_manifest(llama: TinyModel, tmp_path: Path) -> None:
    assert export(llama, tmp_path / "out", precision="fp16").dtype == "F16"
    assert export(llama, tmp_path / "kept").dtype == "F32"


def test_bfloat16_source_is_verified_in_float32(llama: TinyModel, tmp_path: Path) -> None:
    """A 16-bit source exported for the CPU: the reference is the same numbers, widened."""
    export(llama, tmp_path / "half", precision="bf16", formats=("hf",), schedule=full_schedule(llama.identity))
    source = open_checkpoint(tmp_path / "half")
    schedule = dropped_schedule(source.identity, {1})
    model = load_model(tmp_path / "half")
    manifest = export_bundle(
        source,
        schedule,
        tmp_path / "out",
        precision="fp32",
        verify=lambda stage: check_bundle(stage, source=model, schedule=schedule),
    )
    assert manifest.parity is not None
    assert manifest.parity.onnx is not None
    assert manifest.parity.onnx <= 1e-4


@pytest.mark.parametrize("boundary", Boundary)
def test_model_card_says_what_to_know(llama: TinyModel, tmp_path: Path, boundary: Boundary) -> None:
    schedule = Schedule(
        model=llama.identity,
        prefill=(A.FULL, A.KV_ONLY, A.SKIP, A.KV_ONLY, A.FULL, A.FULL),
        decode=(A.FULL, A.FULL, A.SKIP, A.FULL, A.FULL, A.SKIP),
        boundary=boundary,
        single_turn=True,
    )
    export(llama, tmp_path / "out", schedule=schedule)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card, "a folder's name is no model of the Hub"
    assert "5 of 6 layers are in the checkpoint; prefill executes 3 of them, decode 4." in card
    assert "| 1 | kv_only | full | 1 |" in card
    assert "| 2 | skip | skip | dropped |" in card
    assert "| 3 | kv_only | full | 2 |" in card
    assert "runs every layer in it, in both phases" in card
    assert "a second turn is refused" in card
    assert "Layers 1, 3 attend in decode only" in card
    assert ("The last prompt token runs the decode schedule." in card) == (boundary is Boundary.DECODE)


def test_model_card_of_the_whole_model(llama: TinyModel, tmp_path: Path) -> None:
    export(llama, tmp_path / "out", schedule=full_schedule(llama.identity))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- This is the whole model." in card
    assert "runs *every* layer" not in card


def test_model_card_of_dropped_layers_needs_no_warning_about_transformers(llama: TinyModel, tmp_path: Path) -> None:
    export(llama, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Leaving out layers costs quality" in card
    assert "runs *every* layer" not in card


# ---- nothing unverified is published


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("error", [ParityError("the logits differ"), RuntimeError("a bug"), Interrupted()])
def test_nothing_is_published_when_verifying_raises(llama: TinyModel, tmp_path: Path, error: BaseException) -> None:
    def refuse(stage: Path) -> Parity:
        assert read_manifest(stage).parity is None, "the staged folder can be read, and claims nothing yet"
        raise error

    with pytest.raises(type(error)):
        export(llama, tmp_path / "out", verify=refuse)
    assert list(tmp_path.iterdir()) == []


def test_verifying_sees_all_that_loaders_need(llama: TinyModel, tmp_path: Path) -> None:
    seen = set()

    def look(stage: Path) -> Parity:
        assert not (tmp_path / "out").exists()
        seen.update(path.name for path in stage.iterdir())
        return PARITY

    export(llama, tmp_path / "out", verify=look)
    assert seen == FILES - {"README.md"}


def test_wrong_graph_is_not_published(llama: TinyModel, tmp_path: Path) -> None:
    """The real check, on a folder that something has spoiled between writing and verifying."""
    schedule = dropped_schedule(llama.identity, {2})

    def spoil_and_check(stage: Path) -> Parity:
        weights = stage / WEIGHTS_FILE
        content = bytearray(weights.read_bytes())
        content[-100 * 64 * 4 : -90 * 64 * 4] = bytes(10 * 64 * 4)
        weights.write_bytes(content)
        return check_bundle(stage, source=llama.model, schedule=schedule)

    with pytest.raises(ParityError):
        export(llama, tmp_path / "out", schedule=schedule, verify=spoil_and_check)
    assert list(tmp_path.iterdir()) == []


def test_schedule_of_another_model_is_refused_before_anything_is_written(
    llama: TinyModel, get_model: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    other = full_schedule(get_model("qwen2").identity)
    with pytest.raises(ScheduleError, match=r"the schedule is for qwen2 \(qwen2, 6 layers\), not for llama"):
        export(llama, tmp_path / "below" / "out", schedule=other)
    assert list(tmp_path.iterdir()) == []


# ---- what is there already


def test_existing_folder_is_refused_before_any_work(llama: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine").write_text("old")

    def unreachable(_stage: Path) -> Parity:
        raise AssertionError("nothing may be built")

    with pytest.raises(OutputError, match="exists") as caught:
        export(llama, folder, verify=unreachable)
    assert caught.value.hint == "choose another --output, or add --overwrite"
    assert contents(folder) == {"mine": b"old"}


def test_overwriting_keeps_the_old_folder_until_the_new_one_stands(llama: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(llama, folder, schedule=full_schedule(llama.identity))
    before = contents(folder)

    def refuse(_stage: Path) -> Parity:
        assert contents(folder) == before
        raise ParityError("no")

    with pytest.raises(ParityError):
        export(llama, folder, overwrite=True, verify=refuse)
    assert contents(folder) == before

    def check(_stage: Path) -> Parity:
        assert contents(folder) == before
        return PARITY

    (folder / "stray").write_text("goes away with the old folder")
    before = contents(folder)
    export(llama, folder, overwrite=True, verify=check)
    assert contents(folder).keys() == FILES
    assert read_manifest(folder).kept_layers == (0, 1, 3, 4, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_build_leaves_no_folder(llama: TinyModel, tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from voidprune.export.bundle import export_bundle
from voidprune.models.checkpoint import open_checkpoint
from voidprune.schedule import full_schedule
source = open_checkpoint(Path({str(llama.folder)!r}))
def verify(stage):
    os.kill(os.getpid(), signal.SIGKILL)
export_bundle(source, full_schedule(source.identity), Path({str(tmp_path)!r}) / "out", verify=verify)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    export(llama, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == FILES


def test_exporting_needs_no_torch(llama: TinyModel, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from voidprune.execution.manifest import Parity
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.models.checkpoint import open_checkpoint
from voidprune.schedule import full_schedule
source, out = open_checkpoint(Path({str(llama.folder)!r})), Path({str(tmp_path)!r}) / "out"
accept = lambda stage: Parity(hf=0.0, onnx=0.0, tolerance=1e-4, num_prompts=1, num_decode_steps=1)
export_bundle(source, full_schedule(source.identity), out, verify=accept)
print(len(BundleSession(out).generate([[5, 6, 7]], max_new_tokens=4)[0]))
print(sorted(name for name in ("torch", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "4\n[]\n"


# ---- the same bytes


def test_repeat_is_byte_identical(tiny_model: TinyModel, tmp_path: Path) -> None:
    for parent in ("first", "second"):
        schedule = dropped_schedule(tiny_model.identity, {1})
        export_bundle(
            open_checkpoint(tiny_model.folder),
            schedule,
            tmp_path / parent / "out",
            verify=lambda stage: check_bundle(
                stage, source=tiny_model.model, schedule=dropped_schedule(tiny_model.identity, {1})
            ),
        )
    assert contents(tmp_path / "first" / "out") == contents(tmp_path / "second" / "out")


def test_no_file_names_the_place_where_it_was_made(llama: TinyModel, tmp_path: Path) -> None:
    export(llama, tmp_path / "out")
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name
        assert str(llama.folder).encode() not in content, name


def test_metadata_of_the_graphs_names_original_layers(llama: TinyModel, tmp_path: Path) -> None:
    import onnx

    export(llama, tmp_path / "out", schedule=dropped_schedule(llama.identity, {0, 1}))
    graph = onnx.load(tmp_path / "out" / "decode.onnx", load_external_data=False)
    assert {entry.key: entry.value for entry in graph.metadata_props}["voidprune.slots"] == "2 3 4 5"
    assert json.loads((tmp_path / "out" / "voidprune.json").read_text())["slots"] == [2, 3, 4, 5]
    assert NUM_LAYERS == 6


def spoil(source: TinyModel, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    shutil.copytree(source.folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder, name="spoiled")


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "precision", "message", "hint"),
    [
        (
            lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}),
            "keep",
            "several dtypes: BF16, F32",
            "--precision",
        ),
        (lambda tensors: tensors.update({NAME: tensors[NAME].double()}), "keep", "matrices of F64", None),
        (lambda tensors: tensors.update({NAME: tensors[NAME].double()}), "fp16", "matrices of F64", None),
    ],
)
def test_dtypes_that_make_no_bundle_are_refused_before_anything_is_copied(
    llama: TinyModel, tmp_path: Path, change: Any, precision: str, message: str, hint: str | None
) -> None:
    source = spoil(llama, tmp_path / "source", change)
    copied: list[int] = []
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle(source, full_schedule(source.identity), tmp_path / "out", verify=accept, formats=("hf",),
                      precision=precision, advance=copied.append)  # fmt: skip
    assert hint is None or hint in str(caught.value.hint)
    assert copied == []


def test_mixed_dtypes_become_one_where_that_is_asked_for(llama: TinyModel, tmp_path: Path) -> None:
    source = spoil(llama, tmp_path / "source", lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}))
    schedule = full_schedule(source.identity)
    manifest = export_bundle(source, schedule, tmp_path / "out", verify=accept, formats=("hf",), precision="bf16")
    assert manifest.dtype == "BF16"


@pytest.mark.parametrize(("name", "content"), [("README.md", "---\na: [\n---\n"), ("generation_config.json", "[]")])
def test_small_files_are_read_before_large_ones_are_copied(
    llama: TinyModel, tmp_path: Path, name: str, content: str
) -> None:
    shutil.copytree(llama.folder, tmp_path / "source")
    (tmp_path / "source" / name).write_text(content)
    source, copied = open_checkpoint(tmp_path / "source"), list[int]()
    with pytest.raises(ModelError, match=name):
        export_bundle(source, full_schedule(source.identity), tmp_path / "out", verify=accept, formats=("hf",),
                      advance=copied.append)  # fmt: skip
    assert copied == []


# ---- one graph for both phases

ORT_MODEL = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

task = json.load(sys.stdin)
found = []
for options in ({}, {"use_io_binding": True}):
    model = ORTModelForCausalLM.from_pretrained(task["folder"], **options)
    answers = []
    for prompt in task["prompts"]:
        ids = torch.tensor([prompt])
        told = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task["num_tokens"],
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers.append({"tokens": told.sequences[0, len(prompt):].tolist(), "logits": told.logits[0][0].tolist()})
    found.append(answers)
print(json.dumps(found))
"""
SHARED = (A.FULL, A.SKIP, A.SKIP_MLP, A.SKIP_ATTENTION, A.FULL, A.FULL)


def export_single(source: TinyModel, folder: Path) -> Schedule:
    schedule = Schedule(model=source.identity, prefill=SHARED, decode=SHARED)
    export_bundle(
        source.checkpoint,
        schedule,
        folder,
        verify=lambda stage: check_bundle(stage, source=source.model, schedule=schedule),
        layout="single",
    )
    return schedule


@pytest.mark.parametrize("name", ["llama", "llama-tied-small-heads", "qwen2-windows"])
def test_one_graph_is_run_as_the_reference(
    get_model: GetModel, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = get_model(name)
    schedule = export_single(source, tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").glob("*.onnx")] == ["model.onnx"]
    session = BundleSession(tmp_path / "bundle", verify_hashes=True)
    prompts = [[5], [6, 7, 8, 9, 10, 11], [12, 13]]
    with scheduled(source.model, schedule) as running:
        expected = running.generate(prompts, max_new_tokens=20)
    assert session.generate(prompts, max_new_tokens=20) == expected
    monkeypatch.setattr(session_module, "LOGIT_VALUES", 2 * session.vocab_size)  # prompts in pieces of two tokens
    assert session.generate(prompts, max_new_tokens=20) == expected


def test_one_graph_takes_equal_phases(llama: TinyModel, tmp_path: Path) -> None:
    differing = Schedule(model=llama.identity, prefill=(A.FULL,) * 5 + (A.KV_ONLY,), decode=(A.FULL,) * 6)
    idle = (A.FULL, A.KV_ONLY, A.FULL, A.FULL, A.FULL, A.FULL)
    for schedule, message in (
        (differing, "the phases differ"),
        (Schedule(model=llama.identity, prefill=idle, decode=idle), "layer 1 writes K/V in both phases"),
    ):
        with pytest.raises(ScheduleError, match=message):
            export_bundle(llama.checkpoint, schedule, tmp_path / "bundle", verify=lambda _: None, layout="single")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window"])
def test_optimum_runs_one_graph(get_model: GetModel, tmp_path: Path, name: str) -> None:
    python = find_python("VOIDPRUNE_OPTIMUM_PYTHON", "optimum.onnxruntime", target="make test-optimum")
    export_single(get_model(name), tmp_path / "bundle")
    session = BundleSession(tmp_path / "bundle")
    prompts = [[5], [6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16]]
    task = {"folder": str(tmp_path / "bundle"), "prompts": prompts, "num_tokens": 20}
    ends = end_tokens(tmp_path / "bundle")
    for answers in python.run(ORT_MODEL, task):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert [answer["tokens"]] == session.generate([prompt], max_new_tokens=20, end_tokens=ends)
            (logits,) = session.start(max_positions=20).prefill([prompt])
            np.testing.assert_allclose(answer["logits"], logits, atol=TOLERANCE)
