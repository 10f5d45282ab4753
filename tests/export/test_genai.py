"""`genai_config.json` fits the graphs beside it, and an unmodified onnxruntime-genai says what our runner says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.conftest import W8A8, W8A8_INT4, Bundle, GetModel, MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.healing.test_rounding import samples
from tests.other_python import OtherPython, find_python
from tests.tiny_models import TinyModel
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import RoundedKv, export_bundle
from voidprune.export.genai import FILE, describe_genai
from voidprune.export.quantize import uniform_packing
from voidprune.healing.kv_steps import measure_kv_steps
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.pretrained import end_tokens
from voidprune.pipeline.models import demo_folder
from voidprune.quality.parity import TOLERANCE
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction
SCRIPT = """
import json, sys
import numpy as np
import onnxruntime_genai as genai

task = json.load(sys.stdin)
model = genai.Model(task["folder"])

def start(rows):
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=task["max_length"], batch_size=rows)
    return genai.Generator(model, params)

def step(generator):
    generator.generate_next_token()
    return [int(token) for token in generator.get_next_tokens()]

def converse(turns):
    generator, said = start(1), []
    for turn in turns:
        if said and generator.is_done():
            turn = said[-1]["tokens"][-1:] + turn  # an end token is not in the sequence
        elif said:
            generator.get_logits()  # processes the last token that was generated; append_tokens would leave a hole for it
        generator.append_tokens(np.array([turn], np.int32))
        logits = np.array(generator.get_logits()).reshape(-1).tolist()
        tokens = []
        while len(tokens) < task["num_tokens"] and not generator.is_done():
            tokens += step(generator)
        said.append({"tokens": tokens, "logits": logits})
    return said

def rewinds():
    generator = start(1)
    generator.append_tokens(np.array([[3, 4, 5]], np.int32))
    try:
        generator.rewind_to(1)
    except Exception as error:
        return str(error)

def together(rows):
    generator = start(len(rows))
    generator.append_tokens(np.array(rows, np.int32))
    steps = [step(generator) for _ in range(task["num_tokens"])]
    return [list(row) for row in zip(*steps)]

print(json.dumps({
    "version": genai.__version__,
    "conversations": [converse(turns) for turns in task["conversations"]],
    "rows": together(task["rows"]) if task["rows"] else [],
    "rewind_error": rewinds(),
}))
"""
NUM_TOKENS = 16


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


# ---- the real thing


@pytest.fixture(scope="module")
def genai_python() -> OtherPython:
    return find_python("VOIDPRUNE_GENAI_PYTHON", "onnxruntime_genai", target="make test-genai")


def run_genai(
    python: OtherPython, folder: Path, *, conversations: Sequence[Sequence[list[int]]], rows: Sequence[list[int]] = ()
) -> dict[str, Any]:
    task = {
        "folder": str(folder),
        "max_length": 150,
        "num_tokens": NUM_TOKENS,
        "conversations": conversations,
        "rows": rows,
    }
    found: dict[str, Any] = python.run(SCRIPT, task)
    return found


def converse(session: BundleSession, turns: Sequence[list[int]]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens of each turn, up to and including an end token, and the logits after its prompt, by our runner."""
    conversation, ends = session.start(max_positions=150), end_tokens(session.folder)
    said = []
    end: list[int] = []
    for turn in turns:
        logits_BV = conversation.prefill([[*end, *turn]])
        tokens, first, end = [], logits_BV[0].astype(np.float32), []
        while len(tokens) < NUM_TOKENS and not end:
            tokens.append(int(logits_BV[0].argmax()))
            if tokens[-1] in ends:
                end = tokens[-1:]
            else:
                logits_BV = conversation.decode(np.array([tokens[-1:]]))[:, -1]
        said.append((tokens, first))
    return said


def assert_same_conversations(python: OtherPython, folder: Path, conversations: Sequence[Sequence[list[int]]]) -> None:
    found = run_genai(python, folder, conversations=conversations)["conversations"]
    session = BundleSession(folder)
    for turns, answers in zip(conversations, found, strict=True):
        for (tokens, logits), answer in zip(converse(session, turns), answers, strict=True):
            np.testing.assert_allclose(answer["logits"], logits, atol=TOLERANCE)
            assert answer["tokens"] == tokens


def some_conversations(source: TinyModel, *, shortest: int = 1) -> list[list[list[int]]]:
    """A prompt of one token, of two and of many, each with a second turn."""
    lengths = [(1, 3), (2, 1), (23, 7)]
    return [random_prompts(source, [max(shortest, length) for length in pair], seed=pair[0]) for pair in lengths]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied-small-heads",
        "llama-one-kv-head",
        "llama-rope-llama3",
        "mistral-window",
        "qwen2-windows",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "phi3-partly-rotated",
        "granite",
        "smollm3",
        "olmo2",
        "olmo3",
        "cohere",
        "cohere2",
        "glm4",
        "starcoder2",
        "stablelm-parallel",
        "exaone4",
    ],
)
def test_it_says_what_our_runner_says(
    genai_python: OtherPython, get_model: GetModel, make_bundle: MakeBundle, name: str
) -> None:
    source = get_model(name)
    bundle = make_bundle(source, mixed(source))
    assert bundle.schedule.prefill != bundle.schedule.decode
    assert_same_conversations(genai_python, bundle.folder, some_conversations(source))


def test_it_says_what_our_runner_says_with_keys_and_values_in_8_bits(
    genai_python: OtherPython, llama: TinyModel, tmp_path: Path
) -> None:
    """Its cache is of the type that the graphs ask for."""
    schedule = mixed(llama)
    steps = measure_kv_steps(llama.model, llama.checkpoint, schedule, samples(2, num_samples=8))
    kv = RoundedKv(steps, ("0123456789abcdef",))
    export_bundle(llama.checkpoint, schedule, tmp_path / "bundle", verify=lambda _: None, kv=kv)
    assert_same_conversations(genai_python, tmp_path / "bundle", some_conversations(llama))


def test_it_says_what_our_runner_says_of_the_demo_model(genai_python: OtherPython, tmp_path: Path) -> None:
    source = TinyModel("demo", demo_folder())
    schedule = replace(full_schedule(source.identity), prefill=(A.FULL,) * 6 + (A.KV_ONLY,) * 6)
    export_bundle(source.checkpoint, schedule, tmp_path / "bundle", verify=lambda _: None)
    assert_same_conversations(genai_python, tmp_path / "bundle", some_conversations(source))


@pytest.mark.parametrize("precision", ["int4", "int8", W8A8, W8A8_INT4])
def test_it_runs_packed_matrices(
    genai_python: OtherPython, get_model: GetModel, tmp_path: Path, precision: str
) -> None:
    source = get_model("qwen2")
    schedule = mixed(source)
    packing = uniform_packing(precision, len(schedule.union), activations="int8" if "w8a8" in precision else "fp32")
    export_bundle(
        source.checkpoint, schedule, tmp_path / "bundle", verify=lambda _: None, formats=("onnx",), packing=packing
    )
    assert_same_conversations(genai_python, tmp_path / "bundle", some_conversations(source))


def test_with_the_prefill_boundary_a_single_token_is_a_decode_step(
    genai_python: OtherPython, llama: TinyModel, make_bundle: MakeBundle
) -> None:
    """A limit of theirs, in the documentation: the phase is chosen by the number of new tokens."""
    bundle = make_bundle(llama, mixed(llama, boundary=Boundary.PREFILL))
    assert_same_conversations(genai_python, bundle.folder, some_conversations(llama, shortest=2))
    (answer,) = run_genai(genai_python, bundle.folder, conversations=[[[5]]])["conversations"][0]
    decoded = bundle.session.start(max_positions=2).decode(np.array([[5]]))[0, -1]
    prefilled = bundle.session.start(max_positions=2).prefill([[5]])[0]
    np.testing.assert_allclose(answer["logits"], decoded, atol=TOLERANCE)
    assert np.abs(answer["logits"] - prefilled).max() > 100 * TOLERANCE


def test_a_batch_of_equal_lengths_and_no_rewinding(
    genai_python: OtherPython, llama: TinyModel, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(llama, mixed(llama))
    rows = random_prompts(llama, [6, 6, 6])
    found = run_genai(genai_python, bundle.folder, conversations=[], rows=rows)
    ends = end_tokens(bundle.folder)
    expected = bundle.session.generate(rows, max_new_tokens=NUM_TOKENS, end_tokens=ends)
    for row, tokens in zip(found["rows"], expected, strict=True):
        assert row[: len(tokens)] == tokens, "behind an end token they pad"
    assert "not supported for decoder-pipeline" in found["rewind_error"]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-tied"])
def test_it_runs_a_single_graph(genai_python: OtherPython, get_model: GetModel, tmp_path: Path, name: str) -> None:
    source = get_model(name)
    export_bundle(
        source.checkpoint, shared_schedule(source), tmp_path / "bundle", verify=lambda _: None, layout="single"
    )
    assert_same_conversations(genai_python, tmp_path / "bundle", some_conversations(source))


def shared_schedule(source: TinyModel) -> Schedule:
    """The same in both phases: a layer dropped, one without its MLP, one without its attention."""
    actions = (A.FULL, A.SKIP, A.SKIP_MLP, A.SKIP_ATTENTION, A.FULL, A.FULL)
    return Schedule(model=source.identity, prefill=actions, decode=actions)


def test_config_of_a_single_graph(llama: TinyModel, tmp_path: Path) -> None:
    export_bundle(llama.checkpoint, shared_schedule(llama), tmp_path / "bundle", verify=lambda _: None, layout="single")
    model = read_genai(tmp_path / "bundle")["model"]
    assert model["type"] == "decoder"
    assert model["decoder"]["filename"] == "model.onnx"
    assert "pipeline" not in model["decoder"]
    assert model["decoder"]["num_hidden_layers"] == 4
