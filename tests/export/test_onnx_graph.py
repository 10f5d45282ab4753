"""The authored graphs: equal to the reference for every family and any schedule, small, and without dead parts."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from tests.conftest import Bundle, GetModel, MakeBundle
from tests.strategies import schedules
from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.errors import ModelError
from voidprune.execution.manifest import Parity
from voidprune.execution.session import BundleSession, remove_padding
from voidprune.export.bundle import export_bundle
from voidprune.export.hf_checkpoint import write_slim_checkpoint
from voidprune.export.onnx_graph import author_decode, author_prefill, graph_slots
from voidprune.models.checkpoint import WEIGHTS_FILE, open_checkpoint
from voidprune.quality.parity import check_bundle
from voidprune.schedule import (
    Boundary,
    LayerAction,
    ModelIdentity,
    Phase,
    Schedule,
    dropped_schedule,
    full_schedule,
    satisfy_kv_contract,
)

A = LayerAction
NO_TOKEN = 10**6
PADDED_PROMPT = [5, 9, 17, 3, 44]
LONGROPE = "phi3-longrope"
MIXED_PREFILL = (A.FULL, A.KV_MLP, A.SKIP_ATTENTION, A.KV_ONLY, A.FULL, A.KV_ONLY)
MIXED_DECODE = (A.FULL, A.FULL, A.SKIP_MLP, A.FULL, A.SKIP, A.SKIP_MLP)


def make_schedule(
    model: ModelIdentity,
    prefill: tuple[LayerAction, ...],
    decode: tuple[LayerAction, ...],
    *,
    boundary: Boundary = Boundary.DECODE,
    single_turn: bool = False,
) -> Schedule:
    prefill, decode = satisfy_kv_contract(prefill, decode, single_turn=single_turn)
    return Schedule(model=model, prefill=prefill, decode=decode, boundary=boundary, single_turn=single_turn)


def prefill_cut(model: ModelIdentity, first: int, *, boundary: Boundary = Boundary.DECODE) -> Schedule:
    """SwiftKV, "freeze": from layer `first` up, prefill writes keys and values only."""
    prefill = (A.FULL,) * first + (A.KV_ONLY,) * (model.num_layers - first)
    return Schedule(model=model, prefill=prefill, decode=(A.FULL,) * model.num_layers, boundary=boundary)


def verified_parity(source: TinyModel, schedule: Schedule, *, operators: str = "ort") -> Parity:
    """Export into a folder that is thrown away. `check_bundle` raises where a logit is off by more than 1e-4."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = export_bundle(
            source.checkpoint,
            schedule,
            Path(folder) / "bundle",
            operators=operators,
            verify=lambda stage: check_bundle(stage, source=source.model, schedule=schedule),
        )
    assert manifest.parity is not None
    return manifest.parity


def assert_equal_to_reference(parity: Parity) -> None:
    assert parity.tolerance == 1e-4
    assert parity.hf <= 1e-4
    assert parity.onnx is not None
    assert parity.onnx <= 1e-4
    assert parity.num_prompts == 6
    assert parity.num_decode_steps >= 3


def loaded_graphs(bundle: Bundle) -> dict[Phase, onnx.ModelProto]:
    return {
        phase: onnx.load(bundle.folder / f"{phase}.onnx", load_external_data=False)
        for phase in (Phase.PREFILL, Phase.DECODE)
    }


def weight_layers(graph: onnx.ModelProto) -> dict[int, set[str]]:
    """Per layer of the checkpoint, the sublayer weights that a graph refers to: {0: {"k_proj", "v_proj"}, ...}."""
    found: dict[int, set[str]] = {}
    for initializer in graph.graph.initializer:
        for layer, name in re.findall(r"model\.layers\.(\d+)\.[a-z_]+\.?([a-z_]*)\.weight", initializer.name):
            found.setdefault(int(layer), set()).add(name)
    return found


def operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


# ---- conformance


def test_whole_model_equals_reference(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    assert_equal_to_reference(make_bundle(graph_model, full_schedule(graph_model.identity)).parity)


@pytest.mark.parametrize("boundary", Boundary)
def test_mixed_schedule_equals_reference(graph_model: TinyModel, make_bundle: MakeBundle, boundary: Boundary) -> None:
    schedule = make_schedule(graph_model.identity, MIXED_PREFILL, MIXED_DECODE, boundary=boundary)
    assert_equal_to_reference(make_bundle(graph_model, schedule).parity)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ("full kv_only kv_only kv_only kv_only kv_only", "full full full full full full"),
        ("full full skip skip full full", "full full skip skip full full"),
        ("full skip_attention full skip_attention full full", "full skip_attention full skip_attention full full"),
        ("skip_attention skip skip skip skip skip", "skip skip skip skip skip skip_attention"),
        ("skip kv_only skip skip skip_attention skip", "skip full skip skip skip skip"),
        ("full full full full full full", "kv_only kv_only kv_mlp kv_mlp kv_only kv_mlp"),
        ("skip_mlp skip_mlp skip_mlp skip_mlp skip_mlp skip_mlp", "full kv_mlp full kv_mlp full kv_only"),
        ("skip_attention kv_mlp skip skip skip skip", "kv_only kv_only kv_mlp skip_attention skip kv_only"),
        ("full skip skip skip skip skip", "full kv_only kv_mlp skip_attention skip skip"),
    ],
)
@pytest.mark.parametrize("boundary", Boundary)
def test_special_schedules_equal_reference(llama: TinyModel, prefill: str, decode: str, boundary: Boundary) -> None:
    schedule = make_schedule(
        llama.identity, tuple(map(A, prefill.split())), tuple(map(A, decode.split())), boundary=boundary
    )
    assert schedule.prefill == tuple(prefill.split()), "the case is as it is written"
    assert schedule.decode == tuple(decode.split())
    assert_equal_to_reference(verified_parity(llama, schedule))


def test_64_greedy_tokens_are_those_of_transformers(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    """Two rows with prompts of different length, without any padding on our side."""
    session = make_bundle(graph_model, full_schedule(graph_model.identity)).session
    prompts = [[5, 9, 17, 3, 44, 21, 8, 80, 33, 2, 11, 60, 7], [7, 90, 4]]
    if graph_model.name == LONGROPE:
        prompts = [(prompt * 15)[:50] for prompt in prompts]  # long from the start: on the way there see below
    found = session.generate(prompts, max_new_tokens=64)
    for prompt, response in zip(prompts, found, strict=True):
        stock = graph_model.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, do_sample=False,
            eos_token_id=NO_TOKEN, pad_token_id=0,
        )  # fmt: skip
        assert response == stock[0, len(prompt) :].tolist()


def test_a_batch_padded_on_the_left_gives_the_logits_of_transformers(
    graph_model: TinyModel, make_bundle: MakeBundle
) -> None:
    session = make_bundle(graph_model, full_schedule(graph_model.identity)).session
    tokens = np.array([[5, 9, 17, 3, 44, 21, 8, 80, 33], [0, 0, 0, 0, 0, 0, 7, 90, 4]])
    mask = (tokens != 0).astype(np.int64)
    with torch.inference_mode():
        stock = graph_model.model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits[:, -1]
    found = session.start(2, max_positions=9).prefill(remove_padding(tokens, mask))
    np.testing.assert_allclose(found, stock.numpy(), atol=1e-4)


def test_chunks_of_a_prompt_are_the_prompt(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    session = make_bundle(graph_model, full_schedule(graph_model.identity)).session
    prompt = [5, 9, 17, 3, 44, 21, 8, 80, 33, 2, 11, 60, 7]
    whole, chunked = (session.start(max_positions=len(prompt)) for _ in range(2))
    expected = whole.prefill([prompt])
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        chunked.prefill([prompt[start:stop]])
    np.testing.assert_allclose(chunked.prefill([prompt[9:]]), expected, atol=1e-4)


def test_longrope_changes_its_frequencies_row_by_row(get_model: GetModel, make_bundle: MakeBundle) -> None:
    """Each row as if it were alone; and what was cached before it grew long stays, unlike in transformers' `generate`."""
    source = get_model(LONGROPE)
    session = make_bundle(source, full_schedule(source.identity)).session
    short, long = [5, 9, 17, 3] * 8, [5, 9, 17, 3] * 11  # of 40 tokens that are short
    steps = [7, 90, 4]

    def run(*rows: list[int]) -> np.ndarray[Any, Any]:
        conversation = session.start(len(rows), max_positions=60)
        logits = [conversation.prefill(rows)]
        logits += [conversation.decode(np.array([[step]] * len(rows)))[:, -1] for step in steps]
        return np.stack(logits)

    np.testing.assert_allclose(run(short, long), np.concatenate([run(short), run(long)], axis=1), atol=1e-4)
    for row in (short, long):
        stock = source.model(torch.tensor([row + steps])).logits[0, len(row) - 1 :].detach().numpy()
        np.testing.assert_allclose(run(row)[:, 0], stock, atol=1e-4)
    grown = session.start(max_positions=60)
    grown.prefill([long[:30]])
    assert np.abs(grown.prefill([long[30:]])[0] - run(long)[0, 0]).max() > 0.01


@settings(max_examples=2)
@given(data=st.data())
def test_random_schedules_equal_reference(graph_model: TinyModel, data: st.DataObject) -> None:
    assert_equal_to_reference(verified_parity(graph_model, data.draw(schedules(graph_model.identity))))


@settings(max_examples=10)
@given(data=st.data())
def test_random_schedules_of_a_trained_model_equal_reference(stories260k: TinyModel, data: st.DataObject) -> None:
    assert_equal_to_reference(verified_parity(stories260k, data.draw(schedules(stories260k.identity))))


# ---- form


@pytest.mark.parametrize("phase", Phase)
def test_graph_is_small_and_passes_the_checker(llama: TinyModel, make_bundle: MakeBundle, phase: Phase) -> None:
    bundle = make_bundle(llama, make_schedule(llama.identity, MIXED_PREFILL, MIXED_DECODE))
    path = bundle.folder / f"{phase}.onnx"
    assert path.stat().st_size < 40_000
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"  # onnxruntime keeps it in the domain of ONNX, whose checker does not know it
    for initializer in graph.graph.initializer:
        del initializer.external_data[:]
        initializer.data_location = onnx.TensorProto.DEFAULT
        initializer.raw_data = b""
        del initializer.dims[:]
        initializer.dims.append(0)
    onnx.checker.check_model(graph)


def test_every_weight_lies_inside_the_one_file(graph_model: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(graph_model, make_schedule(graph_model.identity, MIXED_PREFILL, MIXED_DECODE))
    size = (bundle.folder / WEIGHTS_FILE).stat().st_size
    for graph in loaded_graphs(bundle).values():
        external = 0
        for initializer in graph.graph.initializer:
            if initializer.data_location != onnx.TensorProto.EXTERNAL:
                assert initializer.ByteSize() < 1000, f"{initializer.name} is a weight and lies in the graph"
                continue
            entry = {pair.key: pair.value for pair in initializer.external_data}
            assert entry["location"] == WEIGHTS_FILE
            assert int(entry["offset"]) + int(entry["length"]) <= size
            external += 1
        assert external >= 10


def test_folder_holds_one_copy_of_the_weights(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, full_schedule(llama.identity))
    weights = (bundle.folder / WEIGHTS_FILE).stat().st_size
    rest = sum(path.stat().st_size for path in bundle.folder.iterdir() if path.name != WEIGHTS_FILE)
    assert rest < weights / 4
    assert weights < llama.checkpoint.num_bytes + 3 * 4096


def test_inputs_and_outputs_follow_the_contract(llama: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = make_schedule(llama.identity, MIXED_PREFILL, MIXED_DECODE)
    bundle = make_bundle(llama, schedule)
    for phase, graph in loaded_graphs(bundle).items():
        slots = bundle.manifest.graphs[phase].slots
        cache = [f"{slot}.{part}" for slot in slots for part in ("key", "value")]
        inputs = [value.name for value in graph.graph.input]
        assert inputs == ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache)]
        assert [value.name for value in graph.graph.output] == ["logits", *(f"present.{name}" for name in cache)]
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert metadata["voidprune.phase"] == phase
        assert metadata["voidprune.slots"] == " ".join(str(schedule.kv_layers[slot]) for slot in slots)


def test_slots_have_no_gaps(llama: TinyModel) -> None:
    schedule = make_schedule(llama.identity, MIXED_PREFILL, MIXED_DECODE)
    used = {slot for phase in Phase for slot in graph_slots(schedule, phase)}
    assert used == set(range(len(schedule.kv_layers)))
    assert schedule.kv_layers == (0, 1, 2, 3, 4, 5)
    schedule = make_schedule(
        llama.identity,
        (A.SKIP, A.FULL, A.SKIP_ATTENTION, A.SKIP, A.FULL, A.SKIP),
        (A.SKIP, A.SKIP, A.SKIP, A.SKIP, A.FULL, A.SKIP),
        single_turn=True,
    )
    assert schedule.kv_layers == (1, 4)
    assert graph_slots(schedule, Phase.PREFILL) == (0, 1)
    assert graph_slots(schedule, Phase.DECODE) == (1,)


# ---- dead parts


def test_prefill_cut_at_a_layer_has_nothing_above_but_keys_and_values(
    llama: TinyModel, make_bundle: MakeBundle
) -> None:
    cut = 2
    graph = loaded_graphs(make_bundle(llama, prefill_cut(llama.identity, cut)))[Phase.PREFILL]
    # Prompt tokens before the last attend in the layers below the cut, the last token in all of them.
    assert operators(graph).count("GroupQueryAttention") == NUM_LAYERS
    assert operators(graph).count("TensorScatter") == 2 * (NUM_LAYERS - cut)
    # MLPs: the two layers below the cut for all tokens together, the others for the last token alone.
    assert operators(graph).count("QuickGelu") == NUM_LAYERS


def test_prompt_tokens_end_with_the_last_keys_and_values(llama: TinyModel, make_bundle: MakeBundle) -> None:
    """All full, decode boundary: of the last layer, the tokens before the last one need keys and values, no more."""
    graph = loaded_graphs(make_bundle(llama, full_schedule(llama.identity)))[Phase.PREFILL]
    assert operators(graph).count("GroupQueryAttention") == NUM_LAYERS
    assert operators(graph).count("QuickGelu") == NUM_LAYERS
    assert operators(graph).count("TensorScatter") == 2
    assert [
        value.type.tensor_type.shape.dim[1].dim_value for value in graph.graph.output if value.name == "logits"
    ] == [1]


def test_layers_that_only_decode_runs_appear_once_in_prefill(llama: TinyModel, make_bundle: MakeBundle) -> None:
    """Above the last K/V of prefill only the last token goes on: no layer is emitted twice, none for the other tokens."""
    schedule = make_schedule(
        llama.identity,
        (A.FULL, A.FULL, A.SKIP, A.SKIP, A.SKIP, A.SKIP_ATTENTION),
        (A.FULL, A.FULL, A.SKIP_ATTENTION, A.SKIP, A.SKIP_ATTENTION, A.SKIP),
    )
    graph = loaded_graphs(make_bundle(llama, schedule))[Phase.PREFILL]
    # The checkpoint has layers 0, 1, 2, 4, 5 of the model; prefill's own MLP in the last one is read by nothing.
    assert weight_layers(graph).keys() == {0, 1, 2, 3}
    assert operators(graph).count("QuickGelu") == 4


def test_prefill_boundary_has_no_decode_layers(llama: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = make_schedule(
        llama.identity,
        (A.FULL, A.KV_ONLY, A.KV_ONLY, A.KV_ONLY, A.KV_ONLY, A.KV_ONLY),
        (A.FULL,) * NUM_LAYERS,
        boundary=Boundary.PREFILL,
    )
    graph = loaded_graphs(make_bundle(llama, schedule))[Phase.PREFILL]
    weights = weight_layers(graph)
    assert operators(graph).count("GroupQueryAttention") == 1
    for layer in range(1, NUM_LAYERS):
        assert weights[layer] <= {"k_proj", "v_proj", ""}, "an input norm, keys, values, and nothing else"


def test_decode_has_only_what_decode_runs(llama: TinyModel, make_bundle: MakeBundle) -> None:
    schedule = make_schedule(
        llama.identity,
        (A.FULL, A.FULL, A.SKIP_ATTENTION, A.KV_ONLY, A.FULL, A.FULL),
        (A.FULL, A.SKIP_MLP, A.SKIP, A.FULL, A.KV_ONLY, A.KV_MLP),
    )
    weights = weight_layers(loaded_graphs(make_bundle(llama, schedule))[Phase.DECODE])
    whole = {"", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert weights == {
        0: whole,
        1: whole - mlp,
        3: whole,
        4: {"", "k_proj", "v_proj"},
        5: {"", "k_proj", "v_proj"} | mlp,
    }


# ---- refusals


def test_missing_tensor_is_named(llama: TinyModel, tmp_path: Path) -> None:
    write_slim_checkpoint(llama.checkpoint, range(NUM_LAYERS), tmp_path)
    slim = open_checkpoint(tmp_path)
    name = "model.layers.3.mlp.down_proj.weight"
    lacking = {key: record for key, record in slim.tensors.items() if key != name}
    broken = type(slim)(folder=slim.folder, name=slim.name, config=slim.config, tensors=lacking)
    with pytest.raises(ModelError, match=re.escape(f"lacks {name}, which its config asks for")):
        author_decode(broken, full_schedule(slim.identity))


def test_authoring_needs_no_torch_and_reads_no_weights(llama: TinyModel, tmp_path: Path) -> None:
    write_slim_checkpoint(llama.checkpoint, range(NUM_LAYERS), tmp_path)
    with (tmp_path / WEIGHTS_FILE).open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
        file.truncate(8 + header)  # the numbers are gone; a hole of the same length stands in for them
        file.truncate(size)
    script = f"""
import sys
from pathlib import Path
from typing import Any
from voidprune.export.onnx_graph import author_decode, author_prefill, save_graph
from voidprune.models.checkpoint import open_checkpoint
from voidprune.schedule import full_schedule
checkpoint = open_checkpoint(Path({str(tmp_path)!r}))
for author in (author_prefill, author_decode):
    save_graph(author(checkpoint, full_schedule(checkpoint.identity)), Path({str(tmp_path)!r}) / (author.__name__ + ".onnx"))
print(sorted(name for name in ("torch", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert (tmp_path / "author_prefill.onnx").stat().st_size < 40_000


def test_authoring_is_deterministic(llama: TinyModel, tmp_path: Path) -> None:
    schedule = dropped_schedule(llama.identity, {1})
    write_slim_checkpoint(llama.checkpoint, schedule.union, tmp_path)
    slim = open_checkpoint(tmp_path)
    renumbered = schedule.on_slim_model(slim.identity)
    from onnx_ir import to_proto

    first, second = (to_proto(author_prefill(slim, renumbered)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# ---- padding


def padded_feeds(graph: ort.InferenceSession) -> dict[str, np.ndarray[Any, Any]]:
    """PROMPT in the first row; in the second, three tokens of it behind two that are none."""
    cache = {
        value.name: np.zeros((2, value.shape[1], 8, value.shape[3]), np.float32)
        for value in graph.get_inputs()
        if value.name.startswith("past")
    }
    return {
        "input_ids": np.array([PADDED_PROMPT, [0, 0, *PADDED_PROMPT[:3]]]),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        **cache,
    }


def test_a_padded_row_gets_no_answer_and_the_others_their_own(llama: TinyModel, make_bundle: MakeBundle) -> None:
    """Runtimes that pad prompts on the left, as transformers does, must not take what comes out for logits."""
    session = BundleSession(make_bundle(llama, full_schedule(llama.identity)).folder, as_exported=True)
    graph = session.sessions[Phase.DECODE]
    logits = graph.run(["logits"], {**padded_feeds(graph), **session.choices[Phase.DECODE]})[0][:, -1]
    expected = session.start(max_positions=8).prefill([PADDED_PROMPT])[0]
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
    assert np.isnan(logits[1]).all()


@pytest.mark.parametrize(
    ("operators", "phase"), [("ort", Phase.PREFILL), ("standard", Phase.PREFILL), ("standard", Phase.DECODE)]
)
def test_onnxruntime_refuses_padded_rows_where_positions_are_seen(
    llama: TinyModel, make_bundle: MakeBundle, operators: str, phase: Phase
) -> None:
    folder = make_bundle(llama, full_schedule(llama.identity), operators=operators).folder
    session = BundleSession(folder, as_exported=True)
    graph = session.sessions[phase]
    with pytest.raises((Fail, InvalidArgument), match=r"is negative|out of range"):
        graph.run(["logits"], {**padded_feeds(graph), **session.choices[phase]})
