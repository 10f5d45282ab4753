"""`genai_config.json` fits the graphs beside it. Running it is onnxruntime-genai's own business; see the notes in the module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.conftest import Bundle, MakeBundle
from tests.tiny_models import TinyModel
from voidprune.export.genai import FILE, describe_genai
from voidprune.models.checkpoint import open_checkpoint
from voidprune.schedule import LayerAction, Phase, Schedule, dropped_schedule

A = LayerAction


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle) -> Bundle:
    schedule = Schedule(
        model=llama.identity,
        prefill=(A.FULL, A.SKIP, A.SKIP_ATTENTION, A.KV_ONLY, A.FULL, A.FULL),
        decode=(A.FULL, A.SKIP, A.SKIP, A.FULL, A.SKIP, A.SKIP_ATTENTION),
        single_turn=True,
    )
    return make_bundle(llama, schedule)


def read_genai(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / FILE).read_text())
    return document


def test_stages_have_the_inputs_and_outputs_of_their_graphs(bundle: Bundle) -> None:
    decoder = read_genai(bundle.folder)["model"]["decoder"]
    stages = {name: stage for entry in decoder["pipeline"] for name, stage in entry.items()}
    assert list(stages) == ["prefill", "decode"]
    for name, stage in stages.items():
        graph = onnx.load(bundle.folder / stage["filename"], load_external_data=False).graph
        assert stage["inputs"] == [value.name for value in graph.input]
        assert stage["outputs"] == [value.name for value in graph.output]
        assert stage["run_on_prompt"] == (name == "prefill")
        assert stage["run_on_token_gen"] == (name == "decode")


def test_its_layers_are_cache_slots(bundle: Bundle) -> None:
    decoder = read_genai(bundle.folder)["model"]["decoder"]
    assert decoder["num_hidden_layers"] == len(bundle.manifest.slots) == 4
    inputs = {name for entry in decoder["pipeline"] for stage in entry.values() for name in stage["inputs"]}
    assert {decoder["inputs"]["past_key_names"] % slot for slot in range(4)} <= inputs
    assert {decoder["inputs"]["past_value_names"] % slot for slot in range(4)} <= inputs


def test_shape_of_the_model(bundle: Bundle) -> None:
    document = read_genai(bundle.folder)
    model, decoder = document["model"], document["model"]["decoder"]
    assert model["type"] == "decoder-pipeline"
    assert (model["vocab_size"], model["context_length"]) == (101, 160)
    assert (decoder["head_size"], decoder["hidden_size"]) == (16, 64)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert decoder["session_options"]["intra_op_num_threads"] == 0
    assert decoder["session_options"]["session.disable_prepacking"] == "1"
    assert document["search"]["past_present_share_buffer"] is True
    assert document["search"]["max_length"] == 160


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, (1, 2, 0)),
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}, (1, 2, 2)),
        ({"bos_token_id": None, "eos_token_id": [7, 8], "pad_token_id": None}, (7, [7, 8], 7)),
        ({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}, (0, 0, 0)),
    ],
)
def test_special_tokens(
    get_model: Callable[[str], TinyModel], tokens: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    source = open_checkpoint(get_model("qwen2").folder)
    config = {**source.config, **tokens}
    changed = type(source)(folder=source.folder, name=source.name, config=config, tensors=source.tensors)
    end = tokens["eos_token_id"]
    end_tokens = end if isinstance(end, list) else [end]
    model = describe_genai(changed, {}, num_slots=6, end_tokens=end_tokens)["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == expected


def test_slim_model_has_fewer_slots(llama: TinyModel, make_bundle: MakeBundle) -> None:
    folder = make_bundle(llama, dropped_schedule(llama.identity, {0, 3})).folder
    document = read_genai(folder)
    assert document["model"]["decoder"]["num_hidden_layers"] == 4
    assert [str(Phase.PREFILL), str(Phase.DECODE)] == [
        name for entry in document["model"]["decoder"]["pipeline"] for name in entry
    ]
