"""`voidprune.json`: what is written is what is read, and a broken one is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import schedules
from tests.test_schedule import GOLDEN_SCHEDULE, MODEL
from voidprune import artifacts
from voidprune.errors import ArtifactError, ModelError, ScheduleError
from voidprune.execution.manifest import (
    FILE,
    KIND,
    OPERATORS,
    VERSION,
    Graph,
    Healing,
    HeldOutLoss,
    Manifest,
    Parity,
    is_bundle,
    packs_weights,
    read_manifest,
)
from voidprune.execution.packing_record import Quantization
from voidprune.export.graph_author import OPERATOR_SETS
from voidprune.export.onnx_graph import graph_slots
from voidprune.schedule import Phase

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle.json"
MANIFEST = Manifest(
    schedule=GOLDEN_SCHEDULE,
    kept_layers=(0, 1, 2, 3),
    slots=(0, 1, 2),
    dtype="F32",
    context_length=2048,
    graphs={
        Phase.PREFILL: Graph(file="prefill.onnx", slots=(0, 1, 2)),
        Phase.DECODE: Graph(file="decode.onnx", slots=(0, 1, 2)),
    },
    source="org/model",
    source_bytes=12345,
    weights_header="sha256:3",
    files={"config.json": "sha256:1", "model.safetensors": "sha256:2"},
    sizes={"config.json": 600, "model.safetensors": 9000},
    parity=Parity(hf=0.0, onnx=1.9073486328125e-06, tolerance=1e-4, num_prompts=6, num_decode_steps=4),
    written_by="voidprune 0.1.0",
)


def test_file_is_byte_for_byte_the_golden_file(tmp_path: Path) -> None:
    content = artifacts.canonical_bytes(MANIFEST.to_document())
    assert content == GOLDEN.read_bytes()
    (tmp_path / FILE).write_bytes(content)
    assert is_bundle(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST


@given(schedules(MODEL), st.booleans(), st.booleans())
def test_round_trip(schedule: Any, with_graphs: bool, verified: bool) -> None:
    manifest = dataclasses.replace(
        MANIFEST,
        schedule=schedule,
        kept_layers=schedule.union,
        slots=schedule.kv_layers,
        graphs={phase: Graph(f"{phase}.onnx", graph_slots(schedule, phase)) for phase in Phase} if with_graphs else {},
        parity=dataclasses.replace(MANIFEST.parity, onnx=None) if verified else None,  # type: ignore[type-var]
    )
    content = artifacts.canonical_bytes(manifest.to_document())
    document = artifacts.parse_document(content, kind=KIND, version=VERSION, place="here")
    assert Manifest.from_document(document, place="here") == manifest


def test_operators_are_those_that_graphs_are_written_in() -> None:
    assert set(OPERATORS) == set(OPERATOR_SETS)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(ModelError, match=r"is not a bundle: it holds no voidprune\.json") as caught:
        read_manifest(tmp_path)
    assert caught.value.hint == "write one with voidprune export"


def change(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def act(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return act


def remove(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(key)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (remove("slots"), "here lacks slots"),
        (change("colour", value="red"), "here has unknown keys: colour"),
        (change("kept_layers", value=7), "here is broken"),
        (change("graphs", value=[]), "here is broken"),
        (change("graphs", value={"middle": {"file": "x", "slots": []}}), "here is broken"),
        (change("graphs", "prefill", value={"file": "x"}), "here is broken"),
        (change("graphs", "prefill", "slots", value=None), "here is broken"),
        (change("graphs", "prefill", "file", value="../x.onnx"), r"names the file '\.\./x\.onnx', outside"),
        (change("graphs", "prefill", "file", value="/x.onnx"), "outside of its folder"),
        (change("graphs", "prefill", "file", value="sub/x.onnx"), "outside of its folder"),
        (change("graphs", "prefill", "file", value=".."), "outside of its folder"),
        (change("graphs", "prefill", "file", value=""), "outside of its folder"),
        (change("graphs", "prefill", "file", value=None), "outside of its folder"),
        (change("parity", value={"hf": 0.0}), "here is broken"),
        (change("parity", value=[]), "here is broken"),
        (change("files", value=3), "here is broken"),
        (change("files", "../x", value="sha256:00"), r"\.\./x lies outside of its folder"),
        (change("sizes", "/x.safetensors", value=1), r"/x\.safetensors lies outside of its folder"),
        (change("operators", value="other"), "operators is 'other'"),
        (change("operators", value=["ort"]), "here is broken: operators is"),
        (change("sizes", value="big"), "here is broken"),
        (change("schedule", "colour", value=1), "here: schedule has unknown keys: colour"),
        (change("schedule", "boundary", value="x"), "here: schedule: boundary is 'x'"),
    ],
)
def test_hostile_documents_have_named_errors(act: Callable[[dict[str, Any]], None], message: str) -> None:
    document = json.loads(GOLDEN.read_bytes())
    act(document)
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_document(document, place="here")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("schedule",), []),
        (("kept_layers",), "abcd"),
        (("kept_layers",), [0, 1, 2, 7]),
        (("slots",), ["0", "1", "2"]),
        (("graphs", "decode", "slots"), [0, 9]),
        (("dtype",), 32),
        (("dtype",), "F7"),
        (("context_length",), "long"),
        (("source_bytes",), None),
        (("sizes",), {"model.safetensors": "9000"}),
        (("parity", "hf"), "small"),
    ],
    ids=str,
)
def test_values_of_the_wrong_type_or_range_are_refused(keys: tuple[str, ...], value: Any) -> None:
    """They would surface later, as a traceback far from the file that is to blame."""
    document = json.loads(GOLDEN.read_bytes())
    change(*keys, value=value)(document)
    with pytest.raises(ArtifactError):
        Manifest.from_document(document, place="here")


def test_broken_rule_of_the_schedule_names_the_place() -> None:
    document = json.loads(GOLDEN.read_bytes())
    document["schedule"]["prefill"][1] = "skip"
    with pytest.raises(ScheduleError, match=r"layer 1 attends in decode .* \(here: schedule\)"):
        Manifest.from_document(document, place="here")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(artifacts.canonical_bytes(GOLDEN_SCHEDULE.to_document()))
    with pytest.raises(ArtifactError, match=r"is not a bundle: its schema is 'voidprune\.schedule/1'"):
        read_manifest(tmp_path)


HEALING = Healing(
    methods=("linear",),
    settings={"linear": {"held_out": 0.1}},
    outcomes={"linear": {"branches": [{"layer": 1, "ridge": None}]}},
    samples="sha256:4",
    prompts=("0123456789abcdef",),
    held_out=HeldOutLoss(num_samples=3, num_tokens=40, whole=0.5, before=2.0, after=1),
    origin={"dataset": "demo", "rounds": 2},
)


def test_healing_round_trip() -> None:
    manifest = dataclasses.replace(MANIFEST, healing=HEALING)
    document = json.loads(artifacts.canonical_bytes(manifest.to_document()))
    assert Manifest.from_document(document, place="here") == manifest
    del document["healing"]["origin"]  # as older versions wrote it
    assert Manifest.from_document(document, place="here").healing == dataclasses.replace(HEALING, origin={})
    assert HEALING.has_helped
    assert HEALING.held_out.describe() == "perplexity 7.389 before, 2.718 after, 1.649 of the whole model"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((), []),
        (("methods",), []),
        (("methods",), [1]),
        (("samples",), None),
        (("prompts",), [7]),
        (("settings",), {"other": {}}),
        (("outcomes",), 3),
        (("held_out",), None),
        (("held_out", "num_tokens"), 0),
        (("held_out", "after"), "low"),
        (("colour",), "red"),
    ],
    ids=str,
)
def test_a_broken_healing_is_named(keys: tuple[str, ...], value: Any) -> None:
    document = json.loads(artifacts.canonical_bytes(dataclasses.replace(MANIFEST, healing=HEALING).to_document()))
    change("healing", *keys, value=value)(document)
    with pytest.raises(ArtifactError, match="here is broken"):
        Manifest.from_document(document, place="here")


QUANTIZATION = Quantization(
    "int4", 128, False, ((4, 4),) * len(MANIFEST.kept_layers), 4, "int8", 4.0, 0.1,
    rounding="gptq", prompts=("0123456789abcdef", "f123456789abcdef"),
)  # fmt: skip
PACKED = dataclasses.replace(
    MANIFEST, quantization=QUANTIZATION, sizes={**MANIFEST.sizes, "model.int4.safetensors": 5000}
)


def test_rounding_round_trip() -> None:
    document = json.loads(artifacts.canonical_bytes(PACKED.to_document()))
    assert Manifest.from_document(document, place="here") == PACKED
    assert PACKED.fitted_prompts == set(QUANTIZATION.prompts)
    assert dataclasses.replace(PACKED, healing=HEALING).fitted_prompts == {*QUANTIZATION.prompts, *HEALING.prompts}
    nearest = dataclasses.replace(QUANTIZATION, rounding="nearest", prompts=())
    plain = dataclasses.replace(PACKED, quantization=nearest)
    written = json.loads(artifacts.canonical_bytes(plain.to_document()))
    assert not {"rounding", "prompts"} & written["quantization"].keys(), "as older versions wrote it"
    assert Manifest.from_document(written, place="here") == plain
    assert plain.fitted_prompts == MANIFEST.fitted_prompts == set()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounding", "up"),
        ("rounding", "nearest"),  # and yet prompts
        ("prompts", []),
        ("prompts", "0123456789abcdef"),
        ("prompts", [7]),
        ("precision", "int8"),
    ],
)
def test_a_broken_rounding_is_named(key: str, value: Any) -> None:
    document = json.loads(artifacts.canonical_bytes(PACKED.to_document()))
    change("quantization", key, value=value)(document)
    with pytest.raises(ArtifactError, match="here is broken"):
        Manifest.from_document(document, place="here")


def test_float32_is_not_packed_and_all_else_is() -> None:
    assert [packs_weights(dtype, quantized=False) for dtype in ("F32", "F16", "BF16")] == [False, True, True]
    assert packs_weights("F32", quantized=True)
