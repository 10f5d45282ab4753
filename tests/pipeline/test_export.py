"""From a model's name on the Hub to a verified folder, by the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.hub_server import COMMIT, Hub, serve_hub
from tests.models.test_checkpoint import shard
from tests.tiny_models import TinyModel, build_model
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


def test_progress_is_in_bytes(model: TinyModel, tmp_path: Path) -> None:
    from collections.abc import Callable, Iterator
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
        formats=("hf",),
        precision="bf16",
        provider="cpu",
        track=track,
    )
    total, unit, told = seen["copying"]
    assert (unit, told) == ("bytes", total)
    assert list(seen) == ["copying", "verifying"]
