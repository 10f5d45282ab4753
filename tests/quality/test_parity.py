"""The oracle can fail: whatever is wrong with an export, the comparison says so."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from tests.conftest import Bundle, GetModel, MakeBundle
from tests.tiny_models import NUM_LAYERS, TRANSFORMERS, TinyModel, spell_for_transformers_4
from voidprune.artifacts import file_hash
from voidprune.errors import ParityError
from voidprune.execution.manifest import FILE, Parity
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.onnx_graph import author_decode, author_prefill, save_graph
from voidprune.models.checkpoint import WEIGHTS_FILE, Checkpoint, open_checkpoint, read_header
from voidprune.quality.driving import TOLERANCE, make_scripts, run_reference, run_session
from voidprune.quality.parity import check_bundle, check_layers, verify_bundle
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, full_schedule

A = LayerAction
FULL = (A.FULL,) * NUM_LAYERS
GRAPHS = r"the logits of the ONNX graphs on cpu differ from the reference by"
CHECKPOINT = r"the logits of the slim checkpoint in transformers differ from the reference by"


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle, tmp_path: Path) -> Bundle:
    """A good bundle of the whole model, to spoil."""
    good = make_bundle(llama, full_schedule(llama.identity))
    folder = shutil.copytree(good.folder, tmp_path / "bundle")
    return Bundle(good.source, good.schedule, folder, good.manifest, good.session)


def check(bundle: Bundle) -> Parity:
    return check_bundle(bundle.folder, source=bundle.source.model, schedule=bundle.schedule)


def rewrite_graphs(bundle: Bundle, schedule: Schedule, *, config: dict[str, Any] | None = None) -> None:
    """Graphs as an author gone wrong would have written them, for another schedule or another config, over the same weights."""
    slim = open_checkpoint(bundle.folder)
    slim = Checkpoint(slim.folder, slim.name, {**slim.config, **(config or {})}, slim.tensors)
    renumbered = schedule.on_slim_model(slim.identity)
    save_graph(author_prefill(slim, renumbered), bundle.folder / "prefill.onnx")
    save_graph(author_decode(slim, renumbered), bundle.folder / "decode.onnx")
    document = json.loads((bundle.folder / FILE).read_text())
    document["files"] |= {name: file_hash(bundle.folder / name) for name in ("prefill.onnx", "decode.onnx")}
    (bundle.folder / FILE).write_text(json.dumps(document))


def change_number(bundle: Bundle, name: str, *, add: float) -> None:
    record = read_header(bundle.folder / WEIGHTS_FILE)[name]
    with (bundle.folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(record.offset)
        (number,) = struct.unpack("<f", file.read(4))
        file.seek(record.offset)
        file.write(struct.pack("<f", number + add))


def test_good_bundle_passes_again_where_it_was_copied_to(bundle: Bundle) -> None:
    assert check(bundle) == bundle.parity
    assert bundle.parity.tolerance == TOLERANCE == 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        *(
            f"model.layers.{layer}.{suffix}.weight"
            for layer in (0, 5)
            for suffix in (
                "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
                "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            )
        ),
    ],
)  # fmt: skip
def test_one_wrong_number_is_found(bundle: Bundle, name: str) -> None:
    change_number(bundle, name, add=0.5)
    with pytest.raises(ParityError, match=CHECKPOINT):
        check(bundle)


def test_not_a_number_is_found(bundle: Bundle) -> None:
    change_number(bundle, "model.layers.1.mlp.up_proj.weight", add=float("nan"))
    with pytest.raises(ParityError, match=f"{CHECKPOINT} nan"):
        check(bundle)


def test_tolerance_is_a_tolerance(bundle: Bundle) -> None:
    change_number(bundle, "model.layers.1.mlp.up_proj.weight", add=1e-7)
    assert 0 < check(bundle).hf <= 1e-4


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("action", [A.SKIP_MLP, A.KV_MLP, A.KV_ONLY])
@pytest.mark.parametrize("layer", [0, 4])
def test_wrong_action_in_one_graph_is_found(bundle: Bundle, phase: Phase, action: LayerAction, layer: int) -> None:
    """With the boundary "prefill", so that every action of both lists matters at once."""
    right = Schedule(model=bundle.schedule.model, prefill=FULL, decode=FULL, boundary=Boundary.PREFILL)
    lists = {"prefill": list(FULL), "decode": list(FULL)}
    lists[str(phase)][layer] = action
    wrong = Schedule(model=right.model, boundary=Boundary.PREFILL, **lists)
    rewrite_graphs(bundle, wrong)
    changed = Bundle(bundle.source, right, bundle.folder, bundle.manifest, bundle.session)
    with pytest.raises(ParityError, match=GRAPHS):
        check(changed)


def test_wrong_action_in_the_reference_is_found(bundle: Bundle) -> None:
    """The same from the other side: the bundle is whole, the schedule asks for less."""
    decode = (A.FULL, A.FULL, A.FULL, A.SKIP_MLP, A.FULL, A.FULL)
    wrong = Schedule(model=bundle.schedule.model, prefill=FULL, decode=decode)
    with pytest.raises(ParityError, match=GRAPHS):
        check(Bundle(bundle.source, wrong, bundle.folder, bundle.manifest, bundle.session))


def test_wrong_boundary_is_found(bundle: Bundle, llama: TinyModel, make_bundle: MakeBundle, tmp_path: Path) -> None:
    lists = {"prefill": (A.FULL,) * 3 + (A.KV_ONLY,) * 3, "decode": FULL}
    right = Schedule(model=llama.identity, boundary=Boundary.DECODE, **lists)
    wrong = Schedule(model=llama.identity, boundary=Boundary.PREFILL, **lists)
    folder = shutil.copytree(make_bundle(llama, right).folder, tmp_path / "other")
    spoiled = Bundle(llama, right, folder, bundle.manifest, bundle.session)
    assert check(spoiled).onnx is not None
    rewrite_graphs(spoiled, wrong)
    with pytest.raises(ParityError, match=GRAPHS):
        check(spoiled)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.1}},
        {"rms_norm_eps": 1e-4},
    ],
    ids=str,
)
def test_wrong_config_is_found(bundle: Bundle, config: dict[str, Any]) -> None:
    if TRANSFORMERS < 5:
        config = spell_for_transformers_4(config)
    rewrite_graphs(bundle, bundle.schedule, config=config)
    with pytest.raises(ParityError, match=GRAPHS):
        check(bundle)
    path = bundle.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ParityError, match=CHECKPOINT):
        check(bundle)


def test_forgotten_window_is_found(
    get_model: Callable[[str], TinyModel], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    source = get_model("qwen2-windows")
    good = make_bundle(source, full_schedule(source.identity))
    folder = shutil.copytree(good.folder, tmp_path / "bundle")
    spoiled = Bundle(source, good.schedule, folder, good.manifest, good.session)
    rewrite_graphs(spoiled, good.schedule, config={"layer_types": ["full_attention"] * NUM_LAYERS})
    with pytest.raises(ParityError, match=GRAPHS):
        check(spoiled)


def test_forgotten_bias_is_found(
    get_model: Callable[[str], TinyModel], make_bundle: MakeBundle, tmp_path: Path
) -> None:
    source = get_model("llama-biased")
    good = make_bundle(source, full_schedule(source.identity))
    for field in ("attention_bias", "mlp_bias"):
        folder = shutil.copytree(good.folder, tmp_path / field)
        spoiled = Bundle(source, good.schedule, folder, good.manifest, good.session)
        rewrite_graphs(spoiled, good.schedule, config={field: False})
        with pytest.raises(ParityError, match=GRAPHS):
            check(spoiled)


def test_another_model_of_the_same_shape_is_found(bundle: Bundle) -> None:
    tensors = safetensors.torch.load_file(bundle.folder / WEIGHTS_FILE)
    first, second = (tensors[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (1, 2))
    swapped = first.clone()
    first.copy_(second)
    second.copy_(swapped)
    records = read_header(bundle.folder / WEIGHTS_FILE)
    with (bundle.folder / WEIGHTS_FILE).open("r+b") as file:
        for layer, tensor in ((1, first), (2, second)):
            file.seek(records[f"model.layers.{layer}.mlp.down_proj.weight"].offset)
            file.write(tensor.numpy().tobytes())
    with pytest.raises(ParityError):
        check(bundle)


def test_where_torch_rounds_more_than_the_tolerance_graphs_may_round_as_much(
    get_model: GetModel, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """Logits a thousand times as large: float32 has no more digits for them."""
    config = json.loads((get_model("cohere").folder / "config.json").read_text())
    folder = shutil.copytree(get_model("cohere").folder, tmp_path / "loud")
    (folder / "config.json").write_text(json.dumps({**config, "logit_scale": 1000.0}))
    source = TinyModel("loud", folder)
    bundle = make_bundle(source, full_schedule(source.identity))
    assert bundle.parity.tolerance > 1e-3
    assert bundle.parity.onnx is not None
    assert 1e-4 < bundle.parity.onnx <= bundle.parity.tolerance
    rewrite_graphs(bundle, bundle.schedule, config={"logit_scale": 1000.1})
    with pytest.raises(ParityError, match=GRAPHS):
        check(bundle)


# ---- scripts


def test_scripts_cover_batches_and_short_prompts() -> None:
    scripts = make_scripts(101, context_length=160)
    shapes = [(script.first_BT.shape, script.steps_BK.shape, script.second_BU.shape) for script in scripts]
    assert shapes == [((rows, length), (rows, 4), (rows, 3)) for rows in (1, 2) for length in (1, 2, 13)]
    for script in scripts:
        assert 0 <= script.first_BT.min() <= script.first_BT.max() < 101


def test_scripts_follow_the_seed() -> None:
    def tokens(seed: int) -> list[Any]:
        return [script.first_BT.tolist() for script in make_scripts(101, seed=seed, context_length=160)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_scripts_fit_into_the_context() -> None:
    for script in make_scripts(101, context_length=12):
        assert sum(part.shape[1] for part in (script.first_BT, script.steps_BK, script.second_BU)) <= 12


@pytest.mark.parametrize("single_turn", [False, True])
def test_both_sides_give_the_same_places(llama: TinyModel, make_bundle: MakeBundle, single_turn: bool) -> None:
    schedule = Schedule(model=llama.identity, prefill=FULL, decode=FULL, single_turn=single_turn)
    bundle = make_bundle(llama, schedule)
    for script in make_scripts(101, context_length=160):
        with scheduled(llama.model, schedule) as running:
            expected = run_reference(running, script)
        found = run_session(bundle.session, script)
        assert found.shape == expected.shape == (6 - single_turn, len(script.first_BT), 101)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_parity_counts_what_it_compared(bundle: Bundle) -> None:
    assert (bundle.parity.num_prompts, bundle.parity.num_decode_steps) == (6, 4)
    assert isinstance(bundle.session, BundleSession)


# ---- in as much memory as there is


LITTLE = 700_000  # bytes: enough for one layer of the tiny models, too little for six


@pytest.mark.parametrize("boundary", Boundary)
@pytest.mark.parametrize("precision", ["keep", "fp16"])
def test_layer_by_layer_passes_where_the_whole_does(
    llama: TinyModel, tmp_path: Path, boundary: Boundary, precision: str
) -> None:
    schedule = Schedule(
        model=llama.identity,
        prefill=(A.FULL, A.KV_ONLY, A.SKIP, A.KV_ONLY, A.FULL, A.FULL),
        decode=(A.FULL, A.FULL, A.SKIP, A.FULL, A.SKIP_MLP, A.FULL),
        boundary=boundary,
    )

    def verify(stage: Path) -> Parity:
        whole = verify_bundle(stage, source=llama.checkpoint, schedule=schedule)
        assert not whole.layer_streamed
        return verify_bundle(stage, source=llama.checkpoint, schedule=schedule, available_bytes=LITTLE)

    manifest = export_bundle(
        llama.checkpoint, schedule, tmp_path / "out", verify=verify, precision=precision, max_shard_bytes=150_000
    )
    assert manifest.parity is not None
    assert manifest.parity.layer_streamed
    assert manifest.parity.hf <= TOLERANCE
    assert manifest.parity.onnx is not None
    assert "decoder layers loaded one at a time" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.self_attn.v_proj.weight", "lm_head.weight"])
def test_layer_by_layer_finds_one_wrong_number(bundle: Bundle, name: str) -> None:
    change_number(bundle, name, add=0.5)
    with pytest.raises(ParityError, match=CHECKPOINT):
        check_layers(bundle.folder, source=bundle.source.checkpoint, schedule=bundle.schedule)


def test_layer_by_layer_finds_a_wrong_graph(bundle: Bundle) -> None:
    wrong = Schedule(model=bundle.schedule.model, prefill=FULL, decode=(*FULL[:4], A.SKIP_MLP, A.FULL))
    rewrite_graphs(bundle, wrong)
    with pytest.raises(ParityError, match=GRAPHS):
        check_layers(bundle.folder, source=bundle.source.checkpoint, schedule=bundle.schedule)


def test_no_memory_for_one_layer_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(ParityError, match="one layer of llama takes"):
        verify_bundle(bundle.folder, source=bundle.source.checkpoint, schedule=bundle.schedule, available_bytes=100_000)
