"""Weights that are loaded once and lent to several sessions. Tried on the CPU, where lending takes the same way as on CUDA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.conftest import Bundle, MakeBundle
from tests.execution.test_session import mixed
from tests.tiny_models import TinyModel
from voidprune.execution.device_weights import WeightRange, load_device_weights, overlapping_groups, weight_ranges
from voidprune.execution.session import BundleSession
from voidprune.models.checkpoint import WEIGHTS_FILE
from voidprune.schedule import Phase

FLOAT = 1


@pytest.fixture
def bundle(llama: TinyModel, make_bundle: MakeBundle) -> Bundle:
    return make_bundle(llama, mixed(llama))


def weight(offset: int, num_bytes: int, *, file: str = "a") -> WeightRange:
    return WeightRange(f"{offset}", Path(file), offset, num_bytes, FLOAT, (num_bytes // 4,))


def test_ranges_that_share_bytes_are_one_group() -> None:
    whole, part, tail = weight(0, 96), weight(32, 64), weight(64, 64)
    apart, elsewhere = weight(128, 32), weight(128, 32, file="b")
    found = overlapping_groups([elsewhere, tail, apart, part, whole])
    assert found == [[whole, part, tail], [apart], [elsewhere]]
    assert overlapping_groups([]) == []


def test_all_large_initializers_of_both_graphs_are_found_and_loaded_once(bundle: Bundle) -> None:
    wanted = {name: weight_ranges(bundle.folder / name) for name in ("prefill.onnx", "decode.onnx")}
    loaded = load_device_weights(wanted, device="cpu")
    for name, ranges in wanted.items():
        assert {weight.name for weight in ranges} == set(loaded.values[name])
        assert any("+" in weight.name for weight in ranges), "some span several tensors"
        for weight in ranges:
            expected = np.fromfile(weight.file, np.float32, weight.num_bytes // 4, offset=weight.offset)
            np.testing.assert_array_equal(loaded.values[name][weight.name].numpy().ravel(), expected)
    used = np.zeros((bundle.folder / WEIGHTS_FILE).stat().st_size, bool)
    for ranges in wanted.values():
        for weight in ranges:
            used[weight.offset : weight.offset + weight.num_bytes] = True
    assert loaded.num_bytes == used.sum(), "each byte once, and none that no graph uses"
    assert loaded.num_bytes < sum(weight.num_bytes for ranges in wanted.values() for weight in ranges)


def test_sessions_compute_with_what_they_were_lent(llama: TinyModel, bundle: Bundle) -> None:
    """Zeros, lent in place of what is in the file, give zeros: nothing came from the file."""
    graph = bundle.folder / "decode.onnx"
    inputs = {"input_ids": np.array([[5, 6]]), "attention_mask": np.ones((1, 2), np.int64)}
    apart = BundleSession(bundle.folder, prepack=False)
    for argument in apart.sessions[Phase.DECODE].get_inputs()[2:]:
        inputs[argument.name] = np.zeros((1, *argument.shape[1:2], 2, argument.shape[3]), np.float32)

    def run(*, zeros: bool) -> np.ndarray:
        loaded = load_device_weights({graph.name: weight_ranges(graph)}, device="cpu")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.use_per_session_threads = False
        for tensor in loaded.tensors if zeros else ():
            tensor.zero_()
        for name, value in loaded.values[graph.name].items():
            options.add_initializer(name, value)
        return ort.InferenceSession(graph, options).run(["logits"], inputs)[0]

    straight = bundle.session.start(max_positions=2).decode(np.array([[5, 6]]))
    np.testing.assert_allclose(run(zeros=False), straight, atol=1e-5)
    assert np.abs(run(zeros=True)).max() == 0


def test_a_part_that_would_be_misaligned_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    content = np.arange(64, dtype=np.float32)
    content.tofile(tmp_path / "weights")
    places = {"whole": (0, 256, (64,)), "even": (64, 16, (2, 2)), "odd": (36, 16, (2, 2))}
    ranges = [
        WeightRange(name, tmp_path / "weights", start, size, FLOAT, shape)
        for name, (start, size, shape) in places.items()
    ]
    loaded = load_device_weights({"graph": ranges}, device="cpu")
    values = loaded.values["graph"]
    for name, (start, size, shape) in places.items():
        np.testing.assert_array_equal(values[name].numpy(), content[start // 4 : (start + size) // 4].reshape(shape))
    assert values["even"].data_ptr() == values["whole"].data_ptr() + 64
    assert values["odd"].data_ptr() % 16 == 0
    assert loaded.num_bytes == 256 + 16
