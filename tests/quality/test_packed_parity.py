"""Graphs with packed matrices equal the source run with what these matrices mean; whatever is wrong with them is found."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from tests.conftest import W8A8, W8A8_INT4, GetModel, open_plainly
from tests.strategies import schedules
from tests.tiny_models import NUM_LAYERS, TinyModel, build_model
from voidprune.artifacts import file_hash
from voidprune.errors import CheckpointError, ModelError, ParityError, RuntimeProviderError
from voidprune.execution.manifest import FILE, Manifest, Parity, read_manifest
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.emitter import Emitter
from voidprune.export.fused_operators import ORT, FusedOperators
from voidprune.export.graph_author import IR_VERSION, OPSET
from voidprune.export.hf_checkpoint import write_slim_files
from voidprune.export.onnx_graph import author_decode, multiply_exactly, round_activations, save_graph
from voidprune.export.quantize import LayerBits, Packing, uniform_packing, write_packed
from voidprune.export.weights import PackedMatrix, Rows
from voidprune.models.checkpoint import WEIGHTS_FILE, Checkpoint, open_checkpoint, open_packed
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.packed import PackedRecord, dequantize_rows, packed_file
from voidprune.pipeline.evaluation import open_runners
from voidprune.quality.packed_parity import check_packed
from voidprune.quality.parity import count_passes, verify_bundle
from voidprune.schedule import Boundary, LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction
EXACT: dict[str, Any] = {"activations": "fp32"}


def export_packed(
    source: TinyModel,
    schedule: Schedule,
    folder: Path,
    packing: Packing,
    *,
    formats: Collection[str] = ("onnx",),
    operators: str = "ort",
    **memory: int,
) -> Manifest:
    return export_bundle(
        source.checkpoint,
        schedule,
        folder,
        verify=lambda stage: verify_bundle(stage, source=source.checkpoint, schedule=schedule, **memory),
        formats=formats,
        operators=operators,
        packing=packing,
    )


def export_unverified(
    source: TinyModel, folder: Path, packing: Packing, *, formats: Collection[str] = ("onnx",), precision: str = "keep"
) -> Manifest:
    """Of the whole model."""
    return export_bundle(
        source.checkpoint,
        full_schedule(source.identity),
        folder,
        verify=lambda _: None,
        formats=formats,
        precision=precision,
        packing=packing,
    )


def packing_of(schedule: Schedule, precision: str, **settings: Any) -> Packing:
    return uniform_packing(precision, len(schedule.union), **settings)


def assert_equal_to_reference(manifest: Manifest) -> None:
    parity = manifest.parity
    assert parity is not None
    assert parity.onnx is not None
    assert parity.onnx <= 1e-4
    assert parity.hf is None
    assert parity.num_prompts == 6


MIXED_PREFILL = (A.FULL, A.KV_MLP, A.SKIP_ATTENTION, A.KV_ONLY, A.FULL, A.SKIP)
MIXED_DECODE = (A.FULL, A.FULL, A.SKIP_ATTENTION, A.SKIP_MLP, A.KV_ONLY, A.SKIP)


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("int4", EXACT),
        ("int8", EXACT),
        *(pytest.param(name, {}, marks=pytest.mark.integer_products) for name in ("w8a8", "w8a8-int4")),
    ],
)
def test_every_family_equals_its_reference(
    tiny_model: TinyModel, tmp_path: Path, precision: str, settings: dict[str, Any]
) -> None:
    schedule = Schedule(model=tiny_model.identity, prefill=MIXED_PREFILL, decode=MIXED_DECODE)
    manifest = export_packed(tiny_model, schedule, tmp_path / "out", packing_of(schedule, precision, **settings))
    assert_equal_to_reference(manifest)
    assert manifest.weight_files == (packed_file(precision),)


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize(
    "settings", [{"block_size": 128}, {"zero_points": True}, {"block_size": 128, "zero_points": True}]
)
@pytest.mark.parametrize("name", ["llama", "llama-tied-small-heads", "phi3", "qwen2"])
def test_every_format_equals_its_reference(
    get_model: GetModel, tmp_path: Path, name: str, precision: str, settings: dict[str, Any]
) -> None:
    source = get_model(name)
    schedule = full_schedule(source.identity, boundary=Boundary.PREFILL)
    assert_equal_to_reference(
        export_packed(source, schedule, tmp_path / "out", packing_of(schedule, precision, **EXACT, **settings))
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-tied", "stablelm"])
@pytest.mark.parametrize(("precision", "settings"), [("int4", {}), ("int8", {"block_size": 128, "zero_points": True})])
@pytest.mark.parametrize("formats", [("onnx",), ("hf", "onnx")])
def test_graphs_in_16_bits_are_as_near_as_torch_in_16_bits(
    get_model: GetModel, tmp_path: Path, name: str, precision: str, settings: dict[str, Any], formats: tuple[str, ...]
) -> None:
    source, passes = get_model(name), []
    schedule = Schedule(model=source.identity, prefill=MIXED_PREFILL, decode=MIXED_DECODE)
    packing = packing_of(schedule, precision, activations="fp16", **settings)

    def verify(stage: Path) -> Parity:
        expected = count_passes(stage)
        found = verify_bundle(
            stage, source=source.checkpoint, schedule=schedule, on_pass=lambda: passes.append(expected)
        )
        assert passes == [expected] * expected
        return found

    manifest = export_bundle(
        source.checkpoint, schedule, tmp_path / "out", verify=verify, formats=formats, packing=packing
    )
    parity = manifest.parity
    assert parity is not None
    assert parity.onnx is not None
    assert 1e-4 < parity.onnx <= parity.tolerance < 0.2
    assert (parity.rounded, parity.rounded_tolerance) == (None, None)
    assert not manifest.is_exact
    for graph in ("prefill.onnx", "decode.onnx"):
        model = onnx_ir.load(tmp_path / "out" / graph)
        types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
        assert {kind for value, kind in types.items() if "." in str(value) or value == "logits"} == {
            onnx_ir.DataType.FLOAT16
        }
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"stay within twice what torch loses when it computes in the same 16 bits, {parity.tolerance:.2g}" in card
    assert manifest.dtype == "F32", "for transformers"
    assert BundleSession(tmp_path / "out").weight_copies == 1
    records = open_packed(tmp_path / "out" / packed_file(precision)).tensors.values()
    floats = {record.scales.dtype if isinstance(record, PackedRecord) else record.dtype for record in records}
    assert floats == {"F16"}


def test_graphs_that_lose_more_than_16_bits_do_are_refused(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    folder = tmp_path / "out"
    export_packed(llama, schedule, folder, packing_of(schedule, "int4", activations="fp16"))
    model = onnx_ir.load(folder / "decode.onnx")
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization":
            node.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 0.05)
    save_graph(model, folder / "decode.onnx")
    document = json.loads((folder / FILE).read_text())
    document["files"]["decode.onnx"] = file_hash(folder / "decode.onnx")
    document["sizes"]["decode.onnx"] = (folder / "decode.onnx").stat().st_size
    (folder / FILE).write_text(json.dumps(document))
    with pytest.raises(ParityError, match="the logits of the ONNX graphs"):
        check_packed(folder, source=llama.checkpoint, schedule=schedule)


def test_packed_graphs_are_one_copy_beside_any_checkpoint(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    manifest = export_unverified(
        llama, tmp_path / "out", packing_of(schedule, "int4"), formats=("hf", "onnx"), precision="fp16"
    )
    assert manifest.dtype == "F16"
    assert BundleSession(tmp_path / "out").weight_copies == 1


@pytest.mark.parametrize("layer_streamed", [False, True])
def test_what_overflows_in_16_bits_is_refused_by_name(tmp_path: Path, layer_streamed: bool) -> None:
    source = build_model("llama", tmp_path / "source")
    record = source.checkpoint.tensors["model.layers.2.mlp.down_proj.weight"]
    with record.file.open("r+b") as file:
        file.seek(record.offset)
        file.write(np.full(record.shape, 40000, np.float32).tobytes())
    schedule = full_schedule(source.identity)
    memory = {"available_bytes": 300_000} if layer_streamed else {}
    with pytest.raises(ParityError, match="the weights in F16 give logits that are not finite") as caught:
        export_packed(source, schedule, tmp_path / "out", packing_of(schedule, "int8", activations="fp16"), **memory)
    assert "--activations bf16" in str(caught.value.hint)


def test_rows_of_whole_numbers_do_not_go_with_16_bits(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    for operators in ("ort", "standard"):
        packing = packing_of(schedule, "w8a8", activations="fp16", zero_points=True)
        with pytest.raises(ModelError, match="w8a8 multiplies by activations in 8 bits"):
            export_packed(llama, schedule, tmp_path / "out", packing, operators=operators)


def test_bf16_is_written_for_devices_and_refused_on_the_cpu(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    manifest = export_unverified(llama, tmp_path / "out", packing_of(schedule, "int4", activations="bf16"))
    assert manifest.quantization is not None
    assert manifest.quantization.activations == "bf16"
    assert open_packed(tmp_path / "out" / packed_file("int4")).dtype == "BF16"
    with pytest.raises(RuntimeProviderError, match="cannot load"):
        BundleSession(tmp_path / "out")


@settings(max_examples=8)
@given(data=st.data())
def test_random_schedules_and_bits_equal_reference(llama: TinyModel, data: st.DataObject) -> None:
    schedule = data.draw(schedules(llama.identity))
    bits = st.sampled_from([4, 8])
    layers = tuple(LayerBits(data.draw(bits), data.draw(bits)) for _ in schedule.union)
    packing = Packing("mixed", layers, data.draw(bits), activations="fp32", zero_points=data.draw(st.booleans()))
    with tempfile.TemporaryDirectory() as folder:
        assert_equal_to_reference(export_packed(llama, schedule, Path(folder) / "out", packing))


def test_a_packed_table_is_not_read_past_its_end(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "int4"))
    with pytest.raises(ModelError, match="there is no token 101"):
        BundleSession(tmp_path / "out").generate([[5, 101]], max_new_tokens=1)


@pytest.mark.parametrize("name", ["llama", "gemma", "stablelm"])
@pytest.mark.parametrize("precision", ["int4", "int8", W8A8, W8A8_INT4])
def test_rounded_activations_stay_within_what_rounding_changes(
    get_model: GetModel, tmp_path: Path, name: str, precision: str
) -> None:
    source = get_model(name)
    schedule = full_schedule(source.identity)
    manifest = export_packed(source, schedule, tmp_path / "out", packing_of(schedule, precision))
    assert_equal_to_reference(manifest)
    parity = manifest.parity
    assert parity is not None
    assert parity.rounded is not None
    assert parity.rounded_tolerance is not None
    assert 1e-4 < parity.rounded <= parity.rounded_tolerance, (
        "rounding is there, and no more of it than in the reference"
    )
    levels = {
        attribute.i
        for phase in ("prefill", "decode")
        for node in onnx.load(tmp_path / "out" / f"{phase}.onnx", load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {4}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "genai_config.json", "voidprune.json"),
        *("prefill.onnx", "decode.onnx", packed_file(precision)),
    }


def test_both_formats_are_both_compared(llama: TinyModel, tmp_path: Path) -> None:
    schedule = dropped_schedule(llama.identity, {1})
    manifest = export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "int4"), formats=("hf", "onnx"))
    assert manifest.weight_files == (packed_file("int4"), WEIGHTS_FILE)
    assert manifest.graph_weight_files == (packed_file("int4"),)
    assert manifest.graph_weight_bytes < manifest.weight_bytes / 3
    assert manifest.parity is not None
    assert manifest.parity.hf is not None
    assert manifest.parity.hf <= 1e-4
    assert manifest.dtype == "F32"
    assert read_manifest(tmp_path / "out") == manifest
    assert not open_checkpoint(tmp_path / "out").is_packed, "transformers and voidprune read the checkpoint"


@pytest.mark.parametrize("formats", [("onnx",), ("hf", "onnx")])
@pytest.mark.parametrize("precision", ["int4", W8A8, W8A8_INT4])
def test_too_large_for_memory_is_checked_layer_by_layer(
    llama: TinyModel, tmp_path: Path, precision: str, formats: tuple[str, ...]
) -> None:
    schedule = dropped_schedule(llama.identity, {1})
    manifest = export_packed(
        llama, schedule, tmp_path / "out", packing_of(schedule, precision), formats=formats, available_bytes=300_000
    )
    assert manifest.parity is not None
    assert manifest.parity.layer_streamed
    assert manifest.parity.onnx is not None
    assert manifest.parity.onnx <= 1e-4


# ---- what is wrong is found


@pytest.fixture
def bundle(llama: TinyModel, tmp_path: Path) -> Path:
    schedule = full_schedule(llama.identity)
    export_packed(llama, schedule, tmp_path / "bundle", packing_of(schedule, "int8"))
    return tmp_path / "bundle"


def external_data(graph: onnx.ModelProto, label: str) -> Any:
    """Where the one initializer whose name has `label` in it, and is of packed numbers or scales, lies."""
    names = [found.name for found in graph.graph.initializer]
    (index,) = (
        number
        for number, name in enumerate(names)
        if label in name and not (name.endswith("scales") and label[-1] == ".")
    )
    return graph.graph.initializer[index].external_data


def test_graphs_over_other_matrices_are_found(bundle: Path, llama: TinyModel) -> None:
    """Two layers with each other's gates and up projections: of the same shape, so that only the numbers tell."""
    schedule = full_schedule(llama.identity)
    check_packed(bundle, source=llama.checkpoint, schedule=schedule)
    path = bundle / "decode.onnx"
    graph = onnx.load(path, load_external_data=False)
    both = [external_data(graph, f"layers.{layer}.mlp.up_proj.weight.UINT8") for layer in (1, 2)]
    places = [{pair.key: pair.value for pair in data} for data in both]
    for data, place in zip(both, reversed(places), strict=True):
        for pair in data:
            pair.value = place[pair.key]
    onnx.save(graph, path)
    document = json.loads((bundle / FILE).read_text())
    document["files"]["decode.onnx"] = file_hash(path)
    (bundle / FILE).write_text(json.dumps(document))
    with pytest.raises(ParityError, match="the logits of the ONNX graphs on cpu"):
        check_packed(bundle, source=llama.checkpoint, schedule=schedule)


@pytest.mark.parametrize("label", ["layers.1.mlp.down_proj.weight.UINT8", "layers.1.mlp.down_proj.weight.scales"])
def test_every_byte_counts(bundle: Path, label: str) -> None:
    """The reference of a bundle reads the same file, so another bundle is compared with."""
    good = shutil.copytree(bundle, bundle.parent / "good")
    graph = onnx.load(bundle / "decode.onnx", load_external_data=False)
    (offset,) = (int(pair.value) for pair in external_data(graph, label) if pair.key == "offset")
    with (bundle / packed_file("int8")).open("r+b") as file:
        file.seek(offset + 3)
        (before,) = file.read(1)
        file.seek(offset + 3)
        file.write(bytes([before ^ 0x40]))
    prompt, response = [5, 6, 7, 8, 9], [10, 11, 12]
    spoiled, right = (BundleSession(folder).predict([prompt], [response])[0] for folder in (bundle, good))
    assert not np.abs(spoiled - right).max() <= 1e-4, "NaN is found, too"


def test_more_rounding_than_asked_for_is_found(llama: TinyModel, bundle: Path) -> None:
    """Graphs that round although the manifest says they do not."""
    document = (bundle / "voidprune.json").read_text().replace('"activations": "int8"', '"activations": "fp32"')
    (bundle / "voidprune.json").write_text(document)
    with pytest.raises(ParityError, match="differ from the reference"):
        check_packed(bundle, source=llama.checkpoint, schedule=full_schedule(llama.identity))


def test_swapped_file_is_refused_at_load(bundle: Path, llama: TinyModel) -> None:
    schedule = full_schedule(llama.identity)
    write_packed(
        llama.checkpoint, range(NUM_LAYERS), bundle / packed_file("int8"), packing_of(schedule, "int8", block_size=128)
    )
    with pytest.raises(CheckpointError, match=r"it was exported with [\d,]+: truncated, damaged or swapped"):
        BundleSession(bundle)


# ---- refusals


def test_transformers_does_not_read_packed_matrices(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    with pytest.raises(ModelError, match="int4 is a precision of ONNX graphs"):
        export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "int4"), formats=("hf",))
    assert not (tmp_path / "out").exists()


def test_packed_bundle_is_no_source(bundle: Path, tmp_path: Path) -> None:
    packed = TinyModel("packed", bundle)
    with pytest.raises(ModelError, match="holds packed matrices"):
        export_packed(packed, full_schedule(packed.identity), tmp_path / "again", uniform_packing("int4", NUM_LAYERS))


# ---- operators of the ONNX standard


def pack_folder(source: TinyModel, folder: Path, precision: str, **settings: Any) -> Checkpoint:
    write_slim_files(source.checkpoint, range(NUM_LAYERS), folder)
    packing = uniform_packing(precision, NUM_LAYERS, **settings)
    write_packed(source.checkpoint, range(NUM_LAYERS), folder / packed_file(precision), packing)
    return open_checkpoint(folder)


@pytest.mark.parametrize("precision", ["int4", "int8", "w8a8", "w8a8-int4"])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("tied", [False, True])
def test_standard_operators_read_the_same_bytes(tmp_path: Path, precision: str, block_size: int, tied: bool) -> None:
    """In onnxruntime and in the reference evaluator of ONNX; rows of 192 and 256 are two blocks of 128."""
    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = build_model("qwen2", tmp_path / "source", **sizes, tie_word_embeddings=tied)
    packed = pack_folder(source, tmp_path, precision, block_size=block_size, zero_points=True)
    schedule, found = full_schedule(packed.identity), {}
    for operators in ("ort", "standard"):
        model = author_decode(packed, schedule, operators=operators)
        multiply_exactly(model)
        save_graph(model, tmp_path / f"{operators}.onnx")
        session = open_plainly(tmp_path / f"{operators}.onnx")
        found[operators] = session.run(["logits"], feeds_of(model))[0]
    (found["evaluator"],) = ReferenceEvaluator(str(tmp_path / "standard.onnx")).run(["logits"], feeds_of(model))
    for name in ("standard", "evaluator"):
        assert np.abs(found[name] - found["ort"]).max() <= 1e-4


def test_standard_operators_refuse_zero_points_that_share_no_bytes_with_rows(llama: TinyModel, tmp_path: Path) -> None:
    packed = pack_folder(llama, tmp_path, "int4", zero_points=True)
    with pytest.raises(ModelError, match="cannot read zero points of 4 bits in rows of 3 blocks"):
        author_decode(packed, full_schedule(packed.identity), operators="standard")


def feeds_of(model: onnx_ir.Model) -> dict[str, Any]:
    feeds: dict[str, Any] = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for value in model.graph.inputs:
        if value.name not in feeds:
            assert value.shape is not None
            feeds[str(value.name)] = np.zeros((1, int(value.shape[1]), 8, int(value.shape[3])), np.float32)  # type: ignore[arg-type]
    return feeds


def test_standard_operators_need_zero_points(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    with pytest.raises(ModelError, match="take the zero points of packed matrices from the file") as caught:
        export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "int8"), operators="standard")
    assert "--zero-points" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_standard_operators_round_no_activations(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    packing = packing_of(schedule, "int8", zero_points=True)
    assert packing.activations == "int8"
    manifest = export_packed(llama, schedule, tmp_path / "out", packing, operators="standard")
    assert manifest.is_exact
    assert_equal_to_reference(manifest)
    assert manifest.parity is not None
    assert manifest.parity.rounded is None


def test_rounding_is_an_attribute_of_products_alone(llama: TinyModel, bundle: Path) -> None:
    packed = open_checkpoint(bundle)
    model = author_decode(packed, full_schedule(packed.identity))
    before = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    round_activations(model)
    assert onnx_ir.to_proto(model).SerializeToString(deterministic=True) != before
    multiply_exactly(model)
    assert onnx_ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.integer_products
def test_products_of_whole_numbers_lose_nothing_where_rounding_does_not(tmp_path: Path) -> None:
    """Tokens of whole 127ths of what is largest in them: they stay as they are, and so does one of zeros."""
    source = build_model("qwen2", tmp_path / "source")
    packed = pack_folder(source, tmp_path, "w8a8")
    architecture = describe_graph_architecture(packed.config, packed.architecture.spec)
    emit = Emitter(packed)
    matrix = emit.weights.matrix([Rows("model.layers.0.mlp.up_proj.weight")])
    assert isinstance(matrix, PackedMatrix)
    rows, columns = matrix.shape
    value = emit.input("value", onnx_ir.DataType.FLOAT, ["batch", "tokens", columns])
    product = FusedOperators(emit, architecture).product(value, matrix, None, rows)
    product.name, product.type = "product", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    inputs = [emit.input_ids, emit.attention_mask, value]
    graph = onnx_ir.Graph(
        inputs, [product], nodes=emit.tape.nodes, initializers=emit.tape.initializers, opset_imports={"": OPSET, ORT: 1}
    )
    save_graph(onnx_ir.Model(graph, ir_version=IR_VERSION), tmp_path / "product.onnx")
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (2, 3, columns)).astype(np.float32)
    values[:, :, 0] = -127
    values *= 2.0 ** np.array([[-20, -3, 0], [4, 20, 0]], np.float32)[:, :, np.newaxis]
    values[1, 2] = 0
    tokens = {"input_ids": np.zeros((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}
    (found,) = open_plainly(tmp_path / "product.onnx").run(None, {**tokens, "value": values})
    record = packed.tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(record, PackedRecord)
    expected = values @ dequantize_rows(record, 0, rows).T
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(found - expected) <= 1e-5 * largest).all()
    assert not found[1, 2].any()


@pytest.mark.integer_products
def test_odd_widths_put_numbers_where_they_are_looked_for(tmp_path: Path) -> None:
    """Matrices of 37 times 37 bytes: scales and norms behind them begin at any byte."""
    sizes = {"hidden_size": 37, "intermediate_size": 37, "num_attention_heads": 1, "num_key_value_heads": 1}
    source = build_model("llama", tmp_path / "source", **sizes, head_dim=8)
    schedule = full_schedule(source.identity)
    manifest = export_packed(source, schedule, tmp_path / "out", packing_of(schedule, "w8a8"))
    assert_equal_to_reference(manifest)
    records = open_checkpoint(tmp_path / "out").tensors.values()
    scales = [record.scales for record in records if isinstance(record, PackedRecord)]
    assert any(record.offset % 4 for record in scales)


def test_products_of_whole_numbers_cannot_be_exact(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    with pytest.raises(ModelError, match="w8a8 multiplies by activations in 8 bits") as caught:
        export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "w8a8", **EXACT))
    assert "--precision int8" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_matrices_of_each_phase_have_no_single_graph(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    with pytest.raises(ModelError, match="w8a8-int4 has matrices of its own for each phase"):
        export_bundle(
            llama.checkpoint,
            schedule,
            tmp_path / "out",
            verify=lambda _: None,
            formats=("onnx",),
            layout="single",
            packing=packing_of(schedule, "w8a8-int4"),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.integer_products
def test_a_phase_that_reads_the_matrices_of_the_other_is_found(llama: TinyModel, tmp_path: Path) -> None:
    """Decode over rows of 8 bits: nearer to the model than it says, and so not what it says."""
    schedule = full_schedule(llama.identity)
    folder = tmp_path / "out"
    export_packed(llama, schedule, folder, packing_of(schedule, "w8a8-int4"))
    check_packed(folder, source=llama.checkpoint, schedule=schedule)
    packed = open_packed(folder / packed_file("w8a8-int4"), phase=Phase.PREFILL)
    save_graph(author_decode(packed, schedule.on_slim_model(packed.identity)), folder / "decode.onnx")
    document = json.loads((folder / FILE).read_text())
    document["files"]["decode.onnx"] = file_hash(folder / "decode.onnx")
    document["sizes"]["decode.onnx"] = (folder / "decode.onnx").stat().st_size
    (folder / FILE).write_text(json.dumps(document))
    with pytest.raises(ParityError, match="the logits of the ONNX graphs"):
        check_packed(folder, source=llama.checkpoint, schedule=schedule)


@pytest.mark.parametrize("boundary", list(Boundary))
def test_evaluations_put_graphs_beside_a_reference_of_both_phases(tmp_path: Path, boundary: Boundary) -> None:
    source = build_model("qwen2", tmp_path / "source", intermediate_size=128)
    schedule = full_schedule(source.identity, boundary=boundary)
    packing = packing_of(schedule, "w8a8-int4", zero_points=True)
    export_packed(source, schedule, tmp_path / "out", packing, operators="standard")
    runners, _ = open_runners(open_checkpoint(tmp_path / "out"))
    prompts, responses = [[5, 6, 7, 8, 9], [10]], [[11, 12, 13], [14, 15]]
    with runners["reference"]() as reference, runners["onnx"]() as graphs:
        for expected, found in zip(
            reference.predict(prompts, responses), graphs.predict(prompts, responses), strict=True
        ):
            assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.integer_products
def test_a_padded_row_is_answered_by_no_number(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    export_packed(llama, schedule, tmp_path / "out", packing_of(schedule, "w8a8"))
    feeds = feeds_of(onnx_ir.load(tmp_path / "out" / "decode.onnx"))
    session = open_plainly(tmp_path / "out" / "decode.onnx")
    assert np.isfinite(session.run(["logits"], feeds)[0]).all()
    assert np.isnan(session.run(["logits"], {**feeds, "attention_mask": np.array([[1, 1, 0]])})[0]).all()
