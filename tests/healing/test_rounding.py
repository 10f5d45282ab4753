"""GPTQ: what later columns can make up for they do, on the tokens that read a matrix, and the file holds what came of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.conftest import GetModel
from tests.tiny_models import SHAPES, TinyModel
from voidprune.errors import ModelError
from voidprune.execution.reference import decoder_layers, scheduled
from voidprune.export.block_rounding import Rounded, quantize_rows, restore_numbers
from voidprune.export.quantize import LayerBits, Packing, matrix_format, uniform_packing, write_packed
from voidprune.healing import rounding
from voidprune.healing.rounding import order_inputs, round_columns, round_layers
from voidprune.models.packed import BlockFormat, PackedRecord, dequantize_rows, read_packed
from voidprune.profiling.calibration import Sample
from voidprune.schedule import LayerAction, Phase, Schedule, dropped_schedule, full_schedule

A = LayerAction
FORMATS = [BlockFormat(4, size, zero_points=points) for size in (32, 128) for points in (False, True)]
NUM_LAYERS = 6


def samples(seed: int, *, num_samples: int = 30) -> list[Sample]:
    """Of many lengths, so that most rows of a batch are padded."""
    random = np.random.default_rng(seed)
    return [
        Sample(
            tuple(random.integers(100, size=random.integers(2, 9)).tolist()),
            tuple(random.integers(100, size=random.integers(2, 12)).tolist()),
            None, "x", "here",
        )
        for _ in range(num_samples)
    ]  # fmt: skip


def correlated_inputs(num_tokens: int, num_columns: int, *, seed: int = 0) -> Tensor:
    """A few directions and some noise, [M, K], columns of different sizes."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, num_columns, generator=random, dtype=torch.float64)
    strengths = torch.randn(num_tokens, 12, generator=random, dtype=torch.float64)
    noise = 0.3 * torch.randn(num_tokens, num_columns, generator=random, dtype=torch.float64)
    return (strengths @ directions + noise) * torch.linspace(0.2, 3, num_columns, dtype=torch.float64)


def random_matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


def meaning(rounded: Rounded, blocks: BlockFormat, columns: int) -> Tensor:
    return torch.from_numpy(restore_numbers(rounded, blocks)[:, :columns])


def loss(inputs: Tensor, one: Tensor, other: Tensor) -> float:
    return float((inputs @ (one - other).mT.double()).square().sum())


# ---- one matrix


def round_one_by_one(weights: Tensor, gram: Tensor, blocks: BlockFormat) -> np.ndarray[Any, Any]:
    """The update of Optimal Brain Quantization, column by column, with the inverse shrunk by elimination. No Cholesky."""
    nearest = quantize_rows(weights.numpy(), blocks)
    columns = weights.shape[1]
    left = weights.double().numpy().copy()
    damped = gram.numpy() + 0.01 * np.diag(gram.numpy()).mean() * np.eye(columns)
    inverse = np.linalg.inv(damped)
    numbers = np.zeros(weights.shape, np.int64)
    for column in sorted(range(columns), key=lambda index: -float(gram[index, index])):
        block = column // blocks.numbers_in_block(columns)
        scales = nearest.scales[:, block].astype(np.float64)
        points = np.full(len(scales), blocks.middle) if nearest.zero_points is None else nearest.zero_points[:, block]
        numbers[:, column] = np.clip(np.rint(left[:, column] / scales) + points, 0, blocks.largest)
        error = left[:, column] - (numbers[:, column] - points) * scales
        left -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # done with; all others see nothing of it any more
    return numbers


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [96, 200])
def test_numbers_are_those_of_the_plain_algorithm(blocks: BlockFormat, columns: int) -> None:
    inputs, weights = correlated_inputs(300, columns), random_matrix(16, columns)
    gram = inputs.mT @ inputs
    found = round_columns(weights, order_inputs(gram), blocks)
    expected = round_one_by_one(weights, gram, blocks)
    assert (found.numbers.reshape(16, -1)[:, :columns] == expected).all()
    nearest = quantize_rows(weights.numpy(), blocks)
    assert (found.scales == nearest.scales).all()
    assert (found.numbers.reshape(16, -1)[:, columns:] == nearest.numbers.reshape(16, -1)[:, columns:]).all()


@pytest.mark.parametrize("blocks", FORMATS, ids=str)
def test_products_are_nearer_than_with_every_weight_nearest(blocks: BlockFormat) -> None:
    weights = random_matrix(24, 256)
    fitting, unseen = correlated_inputs(4000, 256).split(2000)
    found = meaning(round_columns(weights, order_inputs(fitting.mT @ fitting), blocks), blocks, 256)
    nearest = meaning(quantize_rows(weights.numpy(), blocks), blocks, 256)
    assert loss(unseen, weights, found) < 0.6 * loss(unseen, weights, nearest)
    assert float((weights - found).square().sum()) > float((weights - nearest).square().sum())


def test_inputs_that_have_nothing_to_do_with_each_other_leave_every_weight_nearest() -> None:
    (blocks, *_), weights = FORMATS, random_matrix(8, 64)
    found = round_columns(weights, order_inputs(torch.diag(torch.linspace(1, 9, 64).double())), blocks)
    steps = np.abs(np.repeat(found.scales, 32, axis=1))
    numbers = found.numbers.reshape(8, 64)
    within = (numbers > 0) & (numbers < 15)  # behind the ends, nearest is far
    assert within.mean() > 0.8
    assert (np.abs(meaning(found, blocks, 64).numpy() - weights.numpy()) < 0.5001 * steps)[within].all()


def test_without_inputs_every_weight_is_nearest() -> None:
    for blocks in FORMATS:
        weights = random_matrix(8, 100)
        found = round_columns(weights, order_inputs(torch.zeros(100, 100).double()), blocks)
        for part, expected in zip(found, quantize_rows(weights.numpy(), blocks), strict=True):
            assert part is expected is None or (part == expected).all()  # type: ignore[union-attr]


def test_columns_and_blocks_of_zeros_stay_so() -> None:
    for blocks in FORMATS:
        weights, inputs = random_matrix(8, 256), correlated_inputs(100, 256)
        weights[:, 128:] = 0
        inputs[:, 3] = 0
        found = round_columns(weights, order_inputs(inputs.mT @ inputs), blocks)
        assert not meaning(found, blocks, 256)[:, 128:].any()
        assert np.isfinite(found.scales).all()


@pytest.mark.parametrize("smallest", [1e-38, 1e-40])
def test_blocks_of_the_smallest_numbers_spoil_no_others(smallest: float) -> None:
    for blocks in FORMATS:
        weights, inputs = torch.zeros(4, 256), correlated_inputs(100, 256)
        weights[:, :128:2], weights[:, 140] = 1.0, smallest
        found = meaning(round_columns(weights, order_inputs(inputs.mT @ inputs), blocks), blocks, 256)
        nearest = meaning(quantize_rows(weights.numpy(), blocks), blocks, 256)
        assert float((found - weights).abs().max()) < 2 * float((nearest - weights).abs().max()) + 0.5


@pytest.mark.parametrize("size", [1e-23, 1e19])
def test_inputs_may_have_any_size(size: float) -> None:
    """Squares of these do not fit into float32."""
    inputs = correlated_inputs(50, 64).float()
    found, expected = rounding._multiply(inputs * size), rounding._multiply(inputs)
    torch.testing.assert_close(found / size**2, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected, inputs.mT.double() @ inputs.double(), rtol=1e-4, atol=1e-3)
    assert torch.isfinite(order_inputs(found).upper_KK if found.any() else found).all()  # type: ignore[arg-type]


# ---- a model


def packing_of(precision: str = "int4", num_layers: int = NUM_LAYERS, **settings: Any) -> Packing:
    return uniform_packing(precision, num_layers, **settings)


def round_model(
    source: TinyModel, schedule: Schedule, packing: Packing | None = None, **settings: Any
) -> tuple[Any, dict[str, Rounded]]:
    model = copy.deepcopy(source.model)
    packing = packing or packing_of(num_layers=len(schedule.union))
    return model, round_layers(model, source.checkpoint, schedule, samples(1), packing, **settings)


PACKED = sorted(
    name for name, (model_type, _) in SHAPES.items() if model_type not in ("deepseek_v2", "deepseek_v3", "gpt_oss")
)


@pytest.mark.parametrize("shape", PACKED)
def test_file_holds_what_the_model_ends_as(get_model: GetModel, tmp_path: Path, shape: str) -> None:
    """Of every family: all matrices of the kept layers that are packed in 4 bits, by their names in the slim checkpoint."""
    source = get_model(shape)
    num_layers = source.identity.num_layers
    schedule = dropped_schedule(source.identity, {num_layers - 2})
    packing = packing_of(num_layers=num_layers - 1)
    told: list[int] = []
    model, rounded = round_model(source, schedule, packing, advance=told.append)
    assert sum(told) == num_layers - 1
    write_packed(source.checkpoint, schedule.union, tmp_path / "packed", packing, rounded=rounded)
    records = read_packed(tmp_path / "packed")
    names, layers = (
        source.checkpoint.architecture.spec.tensors,
        decoder_layers(model, source.checkpoint.architecture.spec.modules),
    )
    packed = {
        name
        for name, record in records.items()
        if isinstance(record, PackedRecord) and names.layer_of(name) is not None
    }
    assert rounded.keys() == packed
    for name in packed:
        record, place = records[name], names.layer_of(name)
        assert isinstance(record, PackedRecord)
        assert place is not None
        module = layers[schedule.union[place[0]]].get_submodule(place[1].removesuffix(".weight"))
        assert isinstance(module.weight, Tensor)
        assert (dequantize_rows(record, 0, record.shape[0]) == module.weight.detach().numpy()).all(), name


@contextmanager
def inputs_of(model: Any, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What some linear layers are given while the block runs, [B, T, K] a pass."""
    given: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: given[path].append(args[0].clone())
        )
        for path in paths
    ]
    yield given
    for handle in handles:
        handle.remove()


def seen_grams(
    monkeypatch: pytest.MonkeyPatch, source: TinyModel, schedule: Schedule, packing: Packing
) -> tuple[Any, list[Tensor]]:
    """The model as it ends, and x^T x of all inputs in the order in which matrices were rounded."""
    seen: list[Tensor] = []
    order = rounding.order_inputs
    monkeypatch.setattr(rounding, "order_inputs", lambda gram: (seen.append(gram), order(gram))[1])
    model, _ = round_model(source, schedule, packing)
    return model, seen


def expected_gram(
    model: Any, schedule: Schedule, path: str, *, prefill: bool, decode: bool, fed_back_only: bool = False
) -> Tensor:
    """Sample by sample, without padding, over the tokens of some phases; or, of those, over the ones of responses."""
    total = torch.zeros(())
    with scheduled(model, schedule) as running, inputs_of(model, [path]) as given:
        for sample in samples(1):
            tokens = torch.tensor([[*sample.prompt, *(sample.response or ())[:-1]]])
            places = torch.arange(tokens.shape[1])
            is_decode = places >= len(sample.prompt) - 1
            running.forward(tokens, is_decode_BT=is_decode.unsqueeze(0))
            counted = (is_decode & decode) | (~is_decode & prefill)
            if fed_back_only:
                counted &= places >= len(sample.prompt)
            inputs = given[path][-1][0, counted].double()
            total = total + inputs.mT @ inputs
    return total


QUERY, KEY, OUTPUT = "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"
GATE, DOWN = "mlp.gate_proj", "mlp.down_proj"
BOTH, PREFILL, DECODE, NONE = (True, True), (True, False), (False, True), (False, False)
READ_IN = {
    **{(0, name): BOTH for name in (QUERY, OUTPUT, GATE, DOWN)},
    # Prompts only write keys and values, which decode attends to.
    (1, QUERY): DECODE, (1, KEY): BOTH, (1, OUTPUT): DECODE, (1, GATE): DECODE, (1, DOWN): DECODE,
    # No attention in either phase.
    (2, QUERY): NONE, (2, OUTPUT): NONE, (2, GATE): BOTH, (2, DOWN): BOTH,
    # An MLP of prefill alone.
    (3, QUERY): NONE, (3, OUTPUT): NONE, (3, GATE): PREFILL, (3, DOWN): PREFILL,
    # The last keys and values: what else is made of a prompt here or above is read by nobody.
    (4, QUERY): DECODE, (4, KEY): BOTH, (4, OUTPUT): DECODE, (4, GATE): DECODE, (4, DOWN): DECODE,
    (5, QUERY): NONE, (5, OUTPUT): NONE, (5, GATE): DECODE, (5, DOWN): DECODE,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["int4", "w8a8-int4"])
def test_tokens_count_where_a_matrix_is_read(llama: TinyModel, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Prompts that are left out of a sublayer have no say in its matrices, nor in those that the decode graph alone reads."""
    schedule = Schedule(
        llama.identity,
        prefill=(A.FULL, A.KV_ONLY, A.SKIP_ATTENTION, A.SKIP_ATTENTION, A.FULL, A.SKIP_ATTENTION),
        decode=(A.FULL, A.FULL, A.SKIP_ATTENTION, A.SKIP, A.FULL, A.SKIP_ATTENTION),
    )
    monkeypatch.setattr(
        rounding, "round_columns", lambda weights, _order, blocks: quantize_rows(weights.numpy(), blocks)
    )
    model, seen = seen_grams(monkeypatch, llama, schedule, packing_of(precision, len(schedule.union)))
    found, apart = iter(seen), precision == "w8a8-int4"
    for (layer, name), (prefill, decode) in READ_IN.items():
        gram, path = next(found), f"model.layers.{layer}.{name}"
        expected = expected_gram(model, schedule, path, prefill=prefill, decode=decode, fed_back_only=apart)
        # Not the same: by now, what lies before this matrix in its layer is rounded, too.
        assert float(gram.trace()) == pytest.approx(float(expected.trace()), rel=0.05), (layer, name)
    assert next(found, None) is None


def test_prompts_go_through_their_own_matrices(llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In w8a8-int4: what decode attends to are keys and values of the prefill graph, whose matrices have 8 bits."""
    model, seen = seen_grams(monkeypatch, llama, full_schedule(llama.identity), packing_of("w8a8-int4"))
    path, total = "model.layers.5.self_attn.q_proj", torch.zeros(())
    with inputs_of(model, [path]) as given, torch.no_grad():
        for sample in samples(1):
            cache, fed_back = DynamicCache(), (sample.response or ())[:-1]
            llama.model(input_ids=torch.tensor([sample.prompt]), past_key_values=cache)
            model(input_ids=torch.tensor([fed_back]), past_key_values=cache)
            inputs = given[path][-1][0].double()
            total = total + inputs.mT @ inputs
    queries = [gram for gram in seen if gram.shape == total.shape]  # of q, k, v; o; gate, up, layer by layer
    torch.testing.assert_close(queries[3 * 5], total, rtol=1e-4, atol=1e-4)


def test_each_layer_is_given_what_the_rounded_ones_below_it_give(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = full_schedule(llama.identity)
    model, seen = seen_grams(monkeypatch, llama, schedule, packing_of(block_size=128))
    path = "model.layers.5.self_attn.q_proj"
    last = seen[-5]  # of the last layer: q; k, v; o; gate, up; down
    rounded, plain = (expected_gram(one, schedule, path, prefill=False, decode=True) for one in (model, llama.model))
    torch.testing.assert_close(last, rounded, rtol=1e-4, atol=1e-4)
    assert float((last - plain).norm() / plain.norm()) > 0.01


def test_what_has_8_bits_is_left_alone(llama: TinyModel) -> None:
    layers = (LayerBits(4, 8), LayerBits(8, 4)) + (LayerBits(8, 8),) * 4
    _, rounded = round_model(llama, full_schedule(llama.identity), Packing("mixed", layers, 8))
    assert rounded.keys() == {
        *(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    _, none = round_model(llama, full_schedule(llama.identity), packing_of("w8a8"))
    assert none == {}


def test_predictions_are_nearer_than_with_every_weight_nearest(llama: TinyModel, tmp_path: Path) -> None:
    schedule, packing = full_schedule(llama.identity), packing_of(block_size=128)
    model, _ = round_model(llama, schedule, packing)
    nearest = copy.deepcopy(llama.model)
    with torch.no_grad():
        for name, parameter in nearest.named_parameters():
            blocks = matrix_format(llama.checkpoint, name, packing, Phase.DECODE)
            if blocks is not None and "layers" in name:
                weights = parameter.detach().numpy()
                parameter.copy_(meaning(quantize_rows(weights, blocks), blocks, weights.shape[1]))
    items = samples(5, num_samples=20)
    prompts, responses = [item.prompt for item in items], [item.response or () for item in items]
    found = []
    for one in (llama.model, model, nearest):
        with scheduled(one, schedule) as running:
            found.append(np.concatenate(running.predict(prompts, responses)).astype(np.float64))
    whole, calibrated, plain = found
    distances = [float((np.exp(whole) * (whole - other)).sum(-1).mean()) for other in (calibrated, plain)]
    assert distances[0] < distances[1]


def test_streams_that_overflow_are_told(llama: TinyModel) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.fill_(1e38)
    with pytest.raises(ModelError, match="overflow"):
        round_layers(model, llama.checkpoint, full_schedule(llama.identity), samples(1), packing_of())
