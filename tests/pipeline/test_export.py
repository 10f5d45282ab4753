"""From a model's name on the Hub to a verified folder, by the command line in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests.hub_server import COMMIT, Hub, serve_hub, using_hub
from tests.models.test_checkpoint import shard
from tests.models.test_quantization import GPTQ, quantize
from tests.tiny_models import TinyModel, build_model
from voidprune.errors import CheckpointError, ModelError
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.export.quantize import uniform_packing
from voidprune.models import remote
from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.pipeline.export import export_model
from voidprune.schedule import dropped_schedule, write_schedule


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_model("llama", tmp_path_factory.mktemp("export") / "model", hidden_size=256, intermediate_size=1024)


def test_export_of_a_hub_model_fetches_what_it_keeps(model: TinyModel, tmp_path: Path) -> None:
    published = shard(model, tmp_path / "published")
    (published / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    (published / "LICENSE").write_text("as you like")
    schedule = dropped_schedule(model.identity, {0, 2, 3, 5})
    write_schedule(tmp_path / "schedule.json", schedule)
    with serve_hub(Hub("some/model", published)) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        finished = subprocess.run(
            [sys.executable, "-m", "voidprune", "export", "some/model", "-o", tmp_path / "slim", "--schedule",
             tmp_path / "schedule.json", "--format", "hf", "--max-shard-size", "3MB"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        whole = sum(path.stat().st_size for path in published.glob("*.safetensors"))
        assert hub.weight_bytes_sent < 0.5 * whole
    manifest = json.loads((tmp_path / "slim" / "voidprune.json").read_text())
    assert manifest["source_revision"] == COMMIT
    assert manifest["parity"]["layer_streamed"]
    assert manifest["parity"]["hf"] <= manifest["parity"]["tolerance"]
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "base_model: some/model" in card
    assert "license: apache-2.0" in card
    assert f"Only what is kept was fetched from the Hub, at commit {COMMIT}." in card
    assert (tmp_path / "slim" / "LICENSE").read_text() == "as you like"
    assert len(list((tmp_path / "slim").glob("model-*.safetensors"))) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for slim, original in ((0, 1), (1, 4)):
        for name, tensor in loaded.model.layers[slim].state_dict().items():
            assert (tensor == model.model.model.layers[original].state_dict()[name]).all(), name


@pytest.mark.parametrize(
    ("formats", "precision", "packed", "runs"),
    [
        (("hf",), "bf16", None, 3),
        (("hf", "onnx"), "keep", None, 3),
        (("onnx",), "keep", "int8", 4),
        (("onnx",), "keep", "fp32", 2),
        (("hf", "onnx"), "keep", "int8", 6),
    ],
)
def test_progress_is_in_bytes_and_in_runs(
    model: TinyModel, tmp_path: Path, formats: tuple[str, ...], precision: str, packed: str | None, runs: int
) -> None:
    from collections.abc import Iterator
    from contextlib import contextmanager

    seen: dict[str, tuple[int | None, str, int]] = {}

    @contextmanager
    def track(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        seen[what] = (total, unit, 0)

        def advance(amount: int) -> None:
            seen[what] = (total, unit, seen[what][2] + amount)

        yield advance

    export_model(
        model.checkpoint,
        dropped_schedule(model.identity, {1}),
        tmp_path / "out",
        formats=formats,
        precision=precision,
        packing=None if packed is None else uniform_packing("int8", model.identity.num_layers - 1, activations=packed),
        provider="cpu",
        track=track,
    )
    total, unit, told = seen["copying"]
    assert (unit, told) == ("bytes", total)
    assert seen["verifying"] == (runs, "runs", runs)
    assert list(seen) == ["copying", "verifying"]


def export(checkpoint: Checkpoint, folder: Path, **arguments: Any) -> Manifest:
    schedule = dropped_schedule(checkpoint.identity, {0, 3})
    return export_model(checkpoint, schedule, folder, formats=("hf",), provider="cpu", **arguments)


def predict_a_token_more(source: TinyModel, folder: Path) -> TinyModel:
    """The same model with a layer for multi-token prediction behind the last, as DeepSeek publishes its own."""
    shutil.copytree(source.folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    last = {name: value for name, value in tensors.items() if name.startswith("model.layers.5.")}
    tensors |= {name.replace("layers.5", "layers.6"): value.clone() for name, value in last.items()}
    tensors["model.layers.6.eh_proj.weight"] = torch.randn(32, 64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return TinyModel("mtp", folder)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "gpt_oss", "mixtral", "phi3", "qwen3_moe"])
def test_hub_models_of_families_that_are_stored_otherwise(
    get_model: Callable[[str], TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Experts one by one in files and fused in memory, modules nested otherwise: verified from the kept layers alone."""
    source = get_model(name)
    if name == "deepseek_v3":
        source = predict_a_token_more(source, tmp_path / "source")
    published = shard(source, tmp_path / "published")
    monkeypatch.setattr(remote, "_START", 1 << 14)
    with using_hub(Hub("some/model", published), monkeypatch, tmp_path / "home"):
        checkpoint = remote.open_remote_checkpoint("some/model")
        manifest = export(checkpoint, tmp_path / "out", max_shard_bytes=20_000)
    assert manifest.parity is not None
    assert manifest.parity.layer_streamed
    assert manifest.parity.hf <= manifest.parity.tolerance
    local = export(open_checkpoint(published), tmp_path / "local", max_shard_bytes=20_000)
    assert local.parity is not None
    assert not local.parity.layer_streamed
    assert manifest.files == local.files
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


# ---- quantized checkpoints


@pytest.fixture
def quantized(llama: TinyModel, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(quantize(llama, tmp_path / "quantized", GPTQ))


def test_quantized_models_that_cannot_be_run_are_refused_with_the_way_out(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    """No package that runs GPTQ is among ours."""
    with pytest.raises(ModelError, match=r"quantized cannot be verified: transformers cannot run .*optimum") as caught:
        export(quantized, tmp_path / "out")
    assert "--unverified" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_what_nobody_ran_says_so(quantized: Checkpoint, tmp_path: Path) -> None:
    assert export(quantized, tmp_path / "out", unverified=True).parity is None
    assert read_manifest(tmp_path / "out").parity is None
    assert "Not verified: nobody has run this checkpoint." in (tmp_path / "out" / "README.md").read_text()
    assert open_checkpoint(tmp_path / "out").architecture.num_layers == 4


def test_what_can_be_verified_is(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can be verified"):
        export(llama.checkpoint, tmp_path / "out", unverified=True)


def test_scales_keep_their_dtype(quantized: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="scales belong to the dtypes"):
        export(quantized, tmp_path / "out", unverified=True, precision="bf16")


def test_quantized_models_of_the_hub_are_refused_before_they_are_fetched(
    llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = quantize(llama, tmp_path / "published", GPTQ)
    monkeypatch.setattr(remote, "_START", 1 << 14)
    with using_hub(Hub("some/model", published), monkeypatch, tmp_path / "home") as hub:
        checkpoint = remote.open_remote_checkpoint("some/model")
        sent = hub.weight_bytes_sent
        with pytest.raises(ModelError, match="cannot be verified from the layers that are kept"):
            export(checkpoint, tmp_path / "out")
        assert hub.weight_bytes_sent == sent
        assert export(checkpoint, tmp_path / "out", unverified=True).source_revision == COMMIT


# ---- who is not let in


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo")])
def test_gated_models_say_what_to_do(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    with (
        using_hub(Hub("some/model", model.folder, denies=(status, code)), monkeypatch, tmp_path / "home"),
        pytest.raises(ModelError, match="no model some/model") as caught,
    ):
        remote.open_remote_checkpoint("some/model")
    assert "hf auth login" in str(caught.value.hint)


def test_the_benchmark_measures_what_is_exported(model: TinyModel, tmp_path: Path) -> None:
    """`make bench-export` runs this in a process of its own; a changed signature would only show there."""
    script = Path(__file__).parents[2] / "benchmarks" / "export.py"
    finished = subprocess.run(
        [sys.executable, script, "--slim", model.folder, tmp_path / "out", "0.5"], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["hashes"].keys() == {"model.safetensors"}
    assert open_checkpoint(tmp_path / "out").architecture.num_layers == 3
