"""Bits where they matter most, what packing changes, and packed folders in every command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import GetModel
from tests.test_cli import expect_error, invoke
from tests.tiny_models import TinyModel
from voidprune.errors import BudgetError, HealingError, ModelError, NoiseError, RuntimeProviderError
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.execution.reference import scheduled
from voidprune.export.block_rounding import restore_rows
from voidprune.export.bundle import export_bundle
from voidprune.export.quantize import LayerBits, average_bits, packed_bytes, uniform_packing
from voidprune.healing.training_data import prompt_hash
from voidprune.models.checkpoint import open_checkpoint
from voidprune.models.packed import BlockFormat
from voidprune.models.pretrained import load_model
from voidprune.pipeline import benchmark, precision
from voidprune.pipeline import export as pipeline_export
from voidprune.pipeline.benchmark import benchmark_bundle
from voidprune.pipeline.evaluation import check_never_fitted_to
from voidprune.pipeline.export import check_graphs, export_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import Calibrated
from voidprune.pipeline.precision import (
    PackingRequest,
    allocate_bits,
    choose_rounding,
    default_activations,
    measure_harm,
    measure_packed_sizes,
)
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Schedule, dropped_schedule, full_schedule, write_schedule

A = LayerAction
FOUR = BlockFormat(bits=4, block_size=32, zero_points=False)
EIGHT = BlockFormat(bits=8, block_size=32, zero_points=False)
SAMPLES = [Sample((5, 6, 7), (8, 9, 10), None, "default", "one"), Sample((11, 12), (13,), None, "default", "two")]

# ---- which layers


sizes = st.builds(LayerBits, st.integers(0, 50), st.integers(1, 50))


@given(st.lists(st.tuples(sizes, st.tuples(st.floats(0, 9), st.floats(0, 9))), min_size=1, max_size=6), st.floats(4, 8))
def test_average_is_kept(layers: list[tuple[LayerBits, tuple[float, float]]], average: float) -> None:
    weights, harm = [size for size, _ in layers], [pair for _, pair in layers]
    bits = allocate_bits(harm, weights, average=average)
    found = average_bits(bits, weights)
    assert found <= average + 1e-9
    left = (average - found) / 4 * sum(size.attention + size.mlp for size in weights)
    for pair, size in zip(bits, weights, strict=True):
        for used, count in ((pair.attention, size.attention), (pair.mlp, size.mlp)):
            assert used == 8 or count == 0 or count > left - 1e-6, "what still fits is used"


def test_most_harm_for_its_size_comes_first() -> None:
    weights = [LayerBits(10, 30)] * 3
    harm = [(0.1, 0.9), (0.4, 0.1), (0.0, 0.6)]  # for one weight: .01 .03, .04 .0033, 0 .02
    bits = [allocate_bits(harm, weights, average=average) for average in (4, 4.5, 5.5, 8)]
    assert bits[0] == (LayerBits(4, 4),) * 3
    assert bits[1] == (LayerBits(4, 4), LayerBits(8, 4), LayerBits(4, 4))
    assert bits[2] == (LayerBits(4, 8), LayerBits(8, 4), LayerBits(4, 4))
    assert bits[3] == (LayerBits(8, 8),) * 3


def test_harm_is_the_divergence_with_one_sublayer_packed(llama: TinyModel) -> None:
    schedule = Schedule(
        model=llama.identity,
        prefill=(A.FULL, A.SKIP, A.KV_ONLY, A.FULL, A.FULL, A.FULL),
        decode=(A.FULL, A.SKIP, A.SKIP_MLP, A.FULL, A.FULL, A.FULL),
    )
    model = load_model(llama.folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    harm = measure_harm(llama.checkpoint, model, schedule, SAMPLES, blocks=FOUR)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert len(harm) == 5, "one pair for each layer that is kept"
    assert harm[1][1] == 0.0, "an MLP that runs in no phase does no harm"
    assert min(value for pair in harm for value in pair if pair is not harm[1]) > 0
    finer = measure_harm(llama.checkpoint, model, schedule, SAMPLES, blocks=EIGHT)
    assert sum(map(sum, finer)) < sum(map(sum, harm)) / 10

    prompts, responses = [sample.prompt for sample in SAMPLES], [sample.response or () for sample in SAMPLES]
    with scheduled(model, schedule) as runner:
        whole = np.concatenate(runner.predict(prompts, responses)).astype(np.float64)
    down, gate, up = (model.get_submodule(f"model.layers.4.mlp.{name}_proj") for name in ("down", "gate", "up"))
    with torch.no_grad():
        for module in (down, gate, up):
            module.weight.copy_(torch.from_numpy(restore_rows(module.weight.numpy(), FOUR)))
    with scheduled(model, schedule) as runner:
        packed = np.concatenate(runner.predict(prompts, responses)).astype(np.float64)
    expected = (np.exp(whole) * (whole - packed)).sum(-1).mean()
    assert harm[3][1] == pytest.approx(expected, rel=1e-3)


def test_average_outside_of_the_formats_is_refused() -> None:
    with pytest.raises(BudgetError, match="an average of 9 bits is not between 4 and 8"):
        PackingRequest("mixed", average_bits=9)


def test_without_a_tokenizer_nothing_says_which_layers(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    with pytest.raises(ModelError, match="nothing says which layers need 8 bits"):
        export_model(llama.checkpoint, schedule, tmp_path / "mixed", formats=("onnx",), packing=PackingRequest("mixed"))
    manifest = export_model(
        llama.checkpoint, schedule, tmp_path / "int4", formats=("onnx",), packing=PackingRequest("int4")
    )
    assert manifest.quantization is not None
    assert manifest.quantization.fidelity is None


# ---- in every command


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model with half of its prompt layers, packed: in mixed bits without a checkpoint, in 4 bits beside one."""
    folder = tmp_path_factory.mktemp("packed")
    few = ("--num-samples", 4, "--max-new-tokens", 8, "--quiet", "--dataset", "demo", "--responses", "dataset")
    demo = open_model("demo")
    write_schedule(folder / "schedule.json", dropped_schedule(demo.identity, {3, 4}))
    common = ("export", "demo", "--schedule", folder / "schedule.json", *few)
    mixed = invoke(*common, "-o", folder / "mixed", "--precision", "mixed", "--bits", 5.5, "--format", "onnx")
    assert mixed.exit_code == 0, mixed.output
    both = invoke(*common, "-o", folder / "both", "--precision", "int4", "--activations", "fp32", "--zero-points")
    assert both.exit_code == 0, both.output
    for result, kinds in ((mixed, "mixed"), (both, "F32 and int4")):
        assert f" {kinds}, of 7.41 MB" in result.stdout
        assert "same likeliest token" in result.stdout
    return {"mixed": folder / "mixed", "both": folder / "both"}


def test_manifest_says_how_it_is_packed(bundles: dict[str, Path]) -> None:
    mixed, both = (read_manifest(bundles[name]) for name in ("mixed", "both"))
    assert mixed.quantization is not None
    assert 5 < mixed.quantization.average_bits <= 5.5
    assert {number for pair in mixed.quantization.layer_bits for number in pair} == {4, 8}
    assert mixed.quantization.head_bits == 8
    assert mixed.quantization.activations == "int8"
    assert not mixed.has_checkpoint
    assert both.quantization is not None
    assert (both.quantization.average_bits, both.quantization.zero_points) == (4, True)
    assert both.has_checkpoint
    for manifest in (mixed, both):
        fidelity = manifest.quantization.fidelity if manifest.quantization else None
        assert fidelity is not None
        assert fidelity.top1 > 0.9
        assert 0 < fidelity.kl < 0.1
        assert 0.9 < fidelity.perplexity_ratio < 1.1
        assert fidelity.num_tokens > 50
        assert Manifest.from_document(manifest.to_document(), place="here") == manifest


def test_card_tells_of_it(bundles: dict[str, Path]) -> None:
    mixed, both = ((bundles[name] / "README.md").read_text() for name in ("mixed", "both"))
    assert "The ONNX graphs read model.mixed.safetensors alone" in mixed
    assert "There are no weights for transformers here" in mixed
    assert "With activations rounded to 8 bits" in mixed
    assert "only the ONNX graphs read the packed ones" in both
    assert "With activations rounded to 8 bits" not in both


@pytest.mark.parametrize("name", ["mixed", "both"])
def test_packed_folder_goes_through_the_commands(bundles: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = bundles[name]
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "Is 7 larger than 3?", "response": "yes", "answer": "yes"}\n')
    shown = invoke("show", folder)
    assert shown.exit_code == 0
    assert "weights of the graphs" in shown.stdout
    generated = invoke("generate", folder, "--prompt", "Is 7 larger than 3? Answer yes or no.", "--max-new-tokens", 4)
    assert generated.exit_code == 0
    evaluated = invoke("eval", folder, "--tasks", items, "--json", "--quiet")
    assert evaluated.exit_code == 0, evaluated.output
    assert [runner["name"] for runner in json.loads(evaluated.stdout)["runners"]] == ["reference", "onnx"]


def test_genai_packs_weights_where_they_are_packed(bundles: dict[str, Path]) -> None:
    document = json.loads((bundles["both"] / "genai_config.json").read_text())
    assert "session.disable_prepacking" not in document["model"]["decoder"]["session_options"]


def watch_samples(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, list[Sample]]:
    """The samples that functions of the module are called with, their fourth argument, by the name of the function."""
    seen: dict[str, list[Sample]] = {}

    def watch(name: str) -> None:
        function = getattr(precision, name)

        def watched(*args: Any, **options: Any) -> Any:
            seen[name] = list(args[3])
            return function(*args, **options)

        monkeypatch.setattr(precision, name, watched)

    for name in names:
        watch(name)
    monkeypatch.setattr(pipeline_export, "measure_fidelity", precision.measure_fidelity)
    return seen


def test_rounding_on_samples_is_written_measured_on_others_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified as every export: the graphs give what the file means, whichever way it was rounded."""
    seen = watch_samples(monkeypatch, "round_layers", "measure_fidelity")
    found = {}
    for rounding in ("nearest", "gptq"):
        seen.clear()
        folder = tmp_path / rounding
        result = invoke(
            "export", "demo", "-o", folder, "--precision", "int4", "--block-size", 128, "--rounding", rounding,
            "--keep", 1, "--format", "onnx", "--dataset", "demo", "--responses", "dataset", "--num-samples", 60, "--quiet",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        manifest = read_manifest(folder)
        assert manifest.quantization is not None
        assert manifest.quantization.rounding == rounding
        assert manifest.quantization.fidelity is not None
        assert ("rounded by GPTQ" in result.stdout) is (rounding == "gptq")
        card = (folder / "README.md").read_text()
        assert (f"rounded by GPTQ on {len(manifest.quantization.prompts)} prompts" in card) is (rounding == "gptq")
        assert Manifest.from_document(manifest.to_document(), place="here") == manifest
        found[rounding] = manifest
        if rounding == "gptq":
            rounded_on, measured_on = ({sample.prompt for sample in samples} for samples in seen.values())
            assert len(rounded_on) > 2 * len(measured_on) > 0
            assert not rounded_on & measured_on
            assert manifest.quantization.prompts == tuple(sorted(map(prompt_hash, rounded_on)))
            bundle = open_checkpoint(folder)
            check_never_fitted_to(bundle, seen["measure_fidelity"], dataset="others")
            with pytest.raises(HealingError, match="when this model was healed or rounded"):
                check_never_fitted_to(bundle, seen["round_layers"][:1], dataset="the same")
    nearest, gptq = (one.quantization for one in found.values())
    assert nearest is not None
    assert gptq is not None
    assert nearest.fidelity is not None
    assert gptq.fidelity is not None
    assert gptq.fidelity.kl < 0.5 * nearest.fidelity.kl
    assert gptq.weight_error > nearest.weight_error, "each weight by itself is further off"
    assert found["nearest"].graph_weight_bytes == found["gptq"].graph_weight_bytes


def test_sublayers_in_4_bits_of_mixed_ones_are_rounded_on_samples(tmp_path: Path) -> None:
    result = invoke(
        "export", "demo", "-o", tmp_path / "out", "--precision", "mixed", "--rounding", "gptq", "--keep", 1, "--format",
        "onnx", "--dataset", "demo", "--responses", "dataset", "--num-samples", 20, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.quantization is not None
    assert manifest.quantization.rounding == "gptq"
    assert {number for pair in manifest.quantization.layer_bits for number in pair} == {4, 8}


def test_where_nothing_has_4_bits_nothing_is_rounded_on_samples(tmp_path: Path) -> None:
    result = invoke(
        "export", "demo", "-o", tmp_path / "out", "--precision", "mixed", "--bits", 8, "--rounding", "gptq", "--keep", 1,
        "--format", "onnx", "--dataset", "demo", "--responses", "dataset", "--num-samples", 12, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    quantization = read_manifest(tmp_path / "out").quantization
    assert quantization is not None
    assert (quantization.rounding, quantization.prompts) == ("nearest", ())


@pytest.mark.integer_products
def test_a_bundle_in_16_bits_is_rounded_as_it_is(tmp_path: Path) -> None:
    few = ("--dataset", "demo", "--responses", "dataset", "--num-samples", 16, "--format", "onnx", "--quiet")
    slim = invoke(
        "export",
        "demo",
        "-o",
        tmp_path / "slim",
        "--drop-layers",
        "7",
        "--format",
        "hf",
        "--precision",
        "bf16",
        "--quiet",
    )
    assert slim.exit_code == 0, slim.output
    packed = invoke(
        "export", tmp_path / "slim", "-o", tmp_path / "out", "--precision", "w8a8-int4", "--rounding", "gptq", *few
    )
    assert packed.exit_code == 0, packed.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kept_layers == (*range(7), *range(8, 12))
    assert manifest.quantization is not None
    assert manifest.quantization.rounding == "gptq"
    assert manifest.quantization.fidelity is not None
    assert manifest.quantization.fidelity.kl < 0.1


def test_rounding_on_samples_takes_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the model alone has room in is not enough: a byte a weight, and matrices of the widest inputs."""
    demo = open_model("demo")
    needed = 1.25 * demo.num_bytes
    monkeypatch.setattr(precision, "free_memory", lambda _device: int(needed + 1e6))
    schedule, few = full_schedule(demo.identity), Calibrated(num_samples=8, dataset="demo", responses="dataset")
    with pytest.raises(ModelError, match="nothing says how to round its matrices") as caught:
        choose_rounding(PackingRequest("int4", rounding="gptq", calibrated=few), demo, schedule)
    assert caught.value.hint == "leave --rounding out"
    with pytest.raises(ModelError) as caught:
        choose_rounding(PackingRequest("mixed", rounding="gptq", calibrated=few), open_model("demo"), schedule)
    assert caught.value.hint == "choose --precision int8 or int4, and leave --rounding out"
    assert choose_rounding(PackingRequest("int4", calibrated=few), demo, schedule).rounded is None


def test_rounding_on_samples_takes_a_model_that_runs_and_4_bits(llama: TinyModel, tmp_path: Path) -> None:
    request = PackingRequest("int4", rounding="gptq")
    with pytest.raises(ModelError, match="cannot run here, so nothing says how to round its matrices"):
        export_model(
            llama.checkpoint, full_schedule(llama.identity), tmp_path / "out", formats=("onnx",), packing=request
        )
    with pytest.raises(ModelError, match="w8a8 has no matrices in 4 bits"):
        PackingRequest("w8a8", rounding="gptq")
    result = invoke(
        "export", "demo", "-o", tmp_path / "few", "--precision", "int4", "--rounding", "gptq", "--keep", 1, "--format",
        "onnx", "--num-samples", 2, "--max-new-tokens", 4, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "too few to fit to some and hold others out" in result.output


def test_baseline_has_the_same_precision(bundles: dict[str, Path]) -> None:
    found = benchmark_bundle(bundles["mixed"], baseline="demo", prompt_lengths=(4,), num_new_tokens=2, num_rounds=1)
    whole, pruned = found["timings"]
    manifest = read_manifest(bundles["mixed"])
    assert pruned["weight_bytes"] == manifest.graph_weight_bytes
    assert pruned["weight_bytes"] < whole["weight_bytes"] < 2 * pruned["weight_bytes"]


# ---- usage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int4", "--bits", "5"), "--bits goes with --precision mixed"),
        (("--block-size", "128"), "--block-size goes with --precision int8 or int4 or mixed or w8a8"),
        (("--precision", "fp16", "--zero-points"), "--zero-points goes with --precision int8 or int4 or mixed or w8a8"),
        (("--precision", "int8", "--rounding", "gptq"), "--rounding goes with --precision int4 or mixed or w8a8-int4"),
        (("--activations", "fp32"), "--activations goes with --precision int8 or int4 or mixed or w8a8"),
    ],
)
def test_options_of_packing_go_with_packing(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = invoke("export", "demo", "-o", tmp_path / "out", "--keep", 1, *options)
    assert result.exit_code == 2
    assert message in result.output


def test_schedule_goes_with_samples_only_to_measure_packing(tmp_path: Path) -> None:
    write_schedule(tmp_path / "schedule.json", full_schedule(open_model("demo").identity))
    options = ("export", "demo", "-o", tmp_path / "out", "--schedule", tmp_path / "schedule.json", "--dataset", "demo")
    result = invoke(*options)
    assert result.exit_code == 2
    assert "does not go with --dataset" in result.output


def test_samples_to_measure_packing_leave_a_bundle_its_schedule(tmp_path: Path) -> None:
    options = ("--format", "onnx", "--provider", "cpu", "--quiet")
    dropped = invoke("export", "demo", "-o", tmp_path / "slim", "--drop-layers", "7", "--format", "hf", "--quiet")
    assert dropped.exit_code == 0, dropped.output
    packed = invoke(
        "export", tmp_path / "slim", "-o", tmp_path / "packed", "--precision", "int8", "--num-samples", 2,
        "--max-new-tokens", 4, *options,
    )  # fmt: skip
    assert packed.exit_code == 0, packed.output
    slim, manifest = read_manifest(tmp_path / "slim"), read_manifest(tmp_path / "packed")
    assert manifest.schedule == slim.schedule
    assert manifest.quantization is not None
    assert manifest.quantization.fidelity is not None
    assert manifest.quantization.fidelity.num_tokens <= 8
    expect_error(
        "export", tmp_path / "slim", "-o", tmp_path / "out", "--num-samples", 2, *options,
        message="nothing says how small the schedule is to be",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8", "--format", "hf"), "int8 is a precision of ONNX graphs"),
        (("--precision", "w8a8", "--activations", "fp32"), "w8a8 multiplies by activations in 8 bits"),
        (("--precision", "w8a8-int4", "--activations", "fp32"), "w8a8-int4 multiplies by activations in 8 bits"),
        (("--precision", "w8a8-int4", "--provider", "cuda"), "for which onnxruntime has no kernel on CUDA"),
        (("--precision", "int8", "--ops", "standard"), "take the zero points of packed matrices from the file"),
        (("--precision", "w8a8", "--provider", "cuda"), "for which onnxruntime has no kernel on CUDA"),
        (("--precision", "bf16", "--provider", "cpu"), "would be in bf16, for which onnxruntime has no kernels"),
        (
            ("--precision", "int4", "--activations", "bf16", "--provider", "cpu"),
            "would be in bf16, for which onnxruntime",
        ),
        (("--precision", "int4", "--activations", "fp32", "--provider", "cuda"), "would attend in float32"),
        (("--precision", "fp32", "--provider", "cuda"), "would attend in float32"),
        (
            ("--precision", "int8", "--zero-points", "--ops", "standard", "--provider", "cuda"),
            "has no kernel on CUDA for matrices packed as the standard has them",
        ),
        (("--precision", "w8a8", "--activations", "fp16"), "w8a8 multiplies by activations in 8 bits"),
    ],
)
def test_graphs_that_cannot_be_are_refused_before_anything_is_planned(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = expect_error("export", "demo", "-o", tmp_path / "out", "--keep", 0.5, *options, message=message)
    assert result.stdout == ""


def test_a_baseline_computes_in_what_the_bundle_does(llama: TinyModel, tmp_path: Path) -> None:
    schedule = full_schedule(llama.identity)
    manifests = {
        activations: export_bundle(
            llama.checkpoint,
            schedule,
            tmp_path / activations,
            verify=lambda _: None,
            formats=("onnx",),
            packing=uniform_packing("int4", len(schedule.union), activations=activations),
        )
        for activations in ("int8", "fp16")
    }
    benchmark._check_baseline(manifests["fp16"], manifests["fp16"], place="whole")
    with pytest.raises(ModelError, match=r"whole is not the whole model in int4 .* and activations in fp16"):
        benchmark._check_baseline(manifests["int8"], manifests["fp16"], place="whole")


def test_on_cuda_packed_graphs_compute_in_16_bits_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert default_activations("int4", "cuda") == default_activations("mixed", "cuda") == "fp16"
    assert default_activations("int4", "cpu") == "int8"
    assert default_activations("w8a8", "cuda") == default_activations("w8a8-int4", "cuda") == "int8", (
        "refused there anyway"
    )
    assert default_activations("int4") == "int8", "on this machine"
    monkeypatch.setattr(precision, "default_provider", lambda: "cuda")
    assert default_activations("int4") == "fp16"


def test_capped_attention_is_refused_on_cuda(get_model: GetModel) -> None:
    settings: dict[str, Any] = {"formats": ("onnx",), "precision": "fp16", "operators": "ort", "packing": None}
    check_graphs(get_model("gemma2").checkpoint, **settings, provider="cpu")
    check_graphs(get_model("gemma").checkpoint, **settings, provider="cuda")
    with pytest.raises(RuntimeProviderError, match="caps attention scores, and onnxruntime leaves that out on CUDA"):
        check_graphs(get_model("gemma2").checkpoint, **settings, provider="cuda")


# ---- sizes


@pytest.mark.parametrize("name", ["llama", "llama-tied-small-heads", "phi3", "qwen2", "starcoder2"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 128}, {"zero_points": True}, {"activations": "fp16"}])
@pytest.mark.parametrize("precision", ["int4", "int8", "w8a8", "w8a8-int4"])
def test_sizes_are_those_of_the_file_that_graphs_read(
    get_model: GetModel, name: str, precision: str, settings: dict[str, Any]
) -> None:
    source = get_model(name).checkpoint
    request = PackingRequest(precision, **settings)
    sizes = measure_packed_sizes(source, request)
    layers = range(source.architecture.num_layers)
    assert sizes.total_bytes == packed_bytes(source, layers, request.uniform(len(layers)))


def test_sizes_of_two_kinds_of_matrices_are_both_and_decode_reads_one(get_model: GetModel) -> None:
    source = get_model("llama").checkpoint
    rows, blocks, both = (
        measure_packed_sizes(source, PackingRequest(precision)) for precision in ("w8a8", "int4", "w8a8-int4")
    )
    norms = 2 * source.architecture.hidden_size * 4
    assert (both.head_bytes, both.other_bytes) == (blocks.head_bytes, blocks.other_bytes)
    for one, other, found in zip(rows.layers, blocks.layers, both.layers, strict=True):
        assert replace(found, total_bytes=0) == replace(other, total_bytes=0)
        assert found.total_bytes == one.total_bytes + other.total_bytes - norms


def test_sizes_of_mixed_bits_lie_between(get_model: GetModel) -> None:
    source = get_model("llama").checkpoint
    few, mixed, many = (
        measure_packed_sizes(source, PackingRequest(precision, average_bits=5.0))
        for precision in ("int4", "mixed", "int8")
    )
    assert few.layers[0].mlp_bytes < mixed.layers[0].mlp_bytes < many.layers[0].mlp_bytes
    assert mixed.head_bytes == many.head_bytes
    assert mixed.kv_bytes_per_token == few.kv_bytes_per_token == many.kv_bytes_per_token


# ---- keys and values


@pytest.mark.parametrize("kind", ["keep", "int4"])
def test_keys_and_values_in_8_bits_are_measured_on_samples_and_judged_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With packed matrices that are rounded on samples, on the same ones; what both changed is then in one record."""
    seen = watch_samples(monkeypatch, "measure_kv_steps", "round_layers", "measure_fidelity")
    packed = () if kind == "keep" else ("--rounding", "gptq")
    result = invoke(
        "export", "demo", "-o", tmp_path / "out", "--precision", kind, *packed, "--kv-cache", "int8", "--drop-layers", 7,
        "--dataset", "demo", "--responses", "dataset", "--num-samples", 40, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    record = manifest.kv_cache
    assert record is not None
    measured_on, judged_on = (
        {sample.prompt for sample in seen[name]} for name in ("measure_kv_steps", "measure_fidelity")
    )
    assert len(measured_on) > 2 * len(judged_on) > 0
    assert not measured_on & judged_on
    assert record.prompts == tuple(sorted(map(prompt_hash, measured_on)))
    assert manifest.fitted_prompts == set(record.prompts)
    fidelity = record.fidelity
    if manifest.quantization is not None:
        assert fidelity is None
        assert seen["round_layers"] == seen["measure_kv_steps"]
        fidelity = manifest.quantization.fidelity
    assert fidelity is not None
    assert fidelity.kl < (0.01 if kind == "keep" else 0.1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"hold keys and values in int8, with steps that were measured on {len(record.prompts)} prompts" in card
    assert "With keys and values in 8 bits, as they run, they differ by" in card
    with pytest.raises(HealingError, match="when this model was healed or rounded"):
        check_never_fitted_to(open_checkpoint(tmp_path / "out"), seen["measure_kv_steps"][:1], dataset="the same")


def test_a_bundle_may_hold_them_so_later(tmp_path: Path) -> None:
    """A schedule and samples go together here; a token's K/V are planned with a byte a number."""
    few = ("--dataset", "demo", "--responses", "dataset", "--num-samples", 20)
    slim = invoke("export", "demo", "-o", tmp_path / "slim", "--drop-layers", 7, "--quiet")
    assert slim.exit_code == 0, slim.output
    for source, wanted in ((tmp_path / "slim", ()), ("demo", ("--schedule", tmp_path / "schedule.json"))):
        write_schedule(tmp_path / "schedule.json", read_manifest(tmp_path / "slim").schedule, overwrite=True)
        folder = tmp_path / f"out-{len(wanted)}"
        result = invoke("export", source, "-o", folder, *wanted, "--kv-cache", "int8", *few, "--quiet")
        assert result.exit_code == 0, result.output
        manifest = read_manifest(folder)
        assert manifest.kv_cache is not None
        assert manifest.kept_layers == (*range(7), *range(8, 12))
        assert " 1.41 kB" in result.stdout, "11 layers of 128 numbers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ops", "standard"), "the standard's attention takes keys and values in the dtype of its queries only"),
        (("--format", "hf"), "only ONNX graphs say how keys and values are held"),
        (("--format", "hf", "--dry-run"), "only ONNX graphs say how keys and values are held"),
    ],
)
def test_what_cannot_hold_them_is_refused_before_anything_runs(
    tmp_path: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "load_model", None)
    result = invoke("export", "demo", "-o", tmp_path / "out", "--drop-layers", 7, "--kv-cache", "int8", *options)
    assert result.exit_code == 1
    assert message in result.output


def test_the_whole_model_is_timed_with_keys_and_values_held_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--dataset", "demo", "--responses", "dataset", "--num-samples", 20, "--quiet")
    for name, options in (("plain", ()), ("held", ("--kv-cache", "int8"))):
        result = invoke("export", "demo", "-o", tmp_path / name, "--drop-layers", 7, *options, *few)
        assert result.exit_code == 0, result.output
    seen: list[Manifest | None] = []

    def look(folders: dict[str, Path], **_options: Any) -> Any:
        seen.extend(map(read_manifest, folders.values()))
        raise NoiseError("enough")

    monkeypatch.setattr(benchmark, "run_benchmark", look)
    with pytest.raises(NoiseError):
        benchmark_bundle(tmp_path / "held", baseline="demo")
    whole, pruned = (one.kv_cache for one in seen if one is not None)
    assert whole is not None
    assert pruned is not None
    assert (whole.dtype, whole.bytes_per_token, whole.fidelity) == ("int8", 128, None)
    assert pruned.fidelity is not None
    with pytest.raises(ModelError, match="keys and values in int8"):
        benchmark_bundle(tmp_path / "held", baseline=str(tmp_path / "plain"))
    told = invoke("diff", tmp_path / "plain", tmp_path / "held").stdout
    assert "made in the same way" not in told
    costs = json.loads(invoke("diff", tmp_path / "plain", tmp_path / "held", "--json").stdout)["costs"]
    assert costs[0]["kv_bytes_per_token"] == 4 * costs[1]["kv_bytes_per_token"]
    assert "keys and values" in told


def test_keys_and_values_of_a_model_that_cannot_run_are_not_rounded(llama: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot run here, so nothing says how to round its K/V") as caught:
        export_model(llama.checkpoint, full_schedule(llama.identity), tmp_path / "out", kv=Calibrated())
    assert caught.value.hint == "leave --kv-cache out"
