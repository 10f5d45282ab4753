"""A cache that rounds: what it gives back, and that it equals onnxruntime's operator to the last number."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from tests.conftest import open_plainly
from voidprune.execution.kv_cache import KvSteps
from voidprune.execution.rounded_cache import RoundedCache
from voidprune.export.rounded_kv import K_STEPS, ROUNDING

GROUPS, SIZE, POSITIONS = 2, 16, 12


def test_numbers_are_rounded_half_to_even_and_end_at_127_and_minus_128() -> None:
    steps = KvSteps(np.array([[0.5, 2.0]], np.float32), np.array([[1.0, 1.0]], np.float32))
    cache = RoundedCache({1: steps})
    keys = torch.tensor([[0.25, 3.0], [0.75, 5.0], [-100.0, 900.0]]).view(1, 1, 3, 2)
    values = torch.tensor([[0.5, 1.5], [2.5, -0.5], [-128.4, 127.6]]).view(1, 1, 3, 2)
    found = cache.update(keys, values, 1)
    assert found[0].flatten().tolist() == [0.0, 4.0, 1.0, 4.0, -64.0, 254.0]
    assert found[1].flatten().tolist() == [0.0, 2.0, 2.0, 0.0, -128.0, 127.0]
    again = cache.update(keys[:, :, :1], values[:, :, :1], 1)
    assert again[0].shape == (1, 1, 4, 2)
    assert torch.equal(again[0][:, :, :3], found[0])


def test_layers_without_steps_keep_what_they_are_given() -> None:
    cache = RoundedCache({1: KvSteps(*[np.ones((1, 2), np.float32)] * 2)})
    keys = torch.full((1, 1, 3, 2), 0.3)
    assert torch.equal(cache.update(keys, keys, 0)[0], keys)


def test_16_bits_stay_16_bits() -> None:
    cache = RoundedCache({0: KvSteps(*[np.full((1, 2), 0.1, np.float32)] * 2)})
    keys, _ = cache.update(*[torch.full((1, 1, 1, 2), 0.33, dtype=torch.bfloat16)] * 2, 0)
    assert keys.dtype == torch.bfloat16
    assert keys.flatten().tolist() == [torch.tensor(0.3).bfloat16().item()] * 2


def test_the_operator_holds_the_same() -> None:
    """New tokens behind some that are there: what the buffers of onnxruntime hold, times the steps."""
    info, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    cache_shape, width = [1, GROUPS, POSITIONS, SIZE], GROUPS * SIZE
    inputs = [
        *(info(name, types.FLOAT, [1, 5, width]) for name in ("query", "key", "value")),
        *(info(name, types.INT8, cache_shape) for name in ("past_key", "past_value")),
        info("last", types.INT32, [1]),
        info("total", types.INT32, []),
        *(info(name, types.FLOAT, [1, GROUPS, 1, SIZE]) for name in ("key_steps", "value_steps")),
    ]
    names = [value.name for value in inputs]
    node = onnx.helper.make_node(
        "GroupQueryAttention",
        [*names[:7], *[""] * (K_STEPS - 7), *names[7:]],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=GROUPS,
        kv_num_heads=GROUPS,
        **ROUNDING,
    )
    outputs = [info("output", types.FLOAT, [1, 5, width])]
    outputs += [info(name, types.INT8, cache_shape) for name in ("present_key", "present_value")]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "attention", inputs, outputs)
    session = open_plainly(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    random = np.random.default_rng(3)
    steps = KvSteps(*(random.uniform(0.01, 0.02, (GROUPS, SIZE)).astype(np.float32) for _ in range(2)))
    heads = {name: random.standard_normal((1, GROUPS, 5, SIZE)).astype(np.float32) for name in ("key", "value")}
    flat = {name: one.transpose(0, 2, 1, 3).reshape(1, 5, width) for name, one in heads.items()}
    past = {name: random.integers(-128, 128, cache_shape).astype(np.int8) for name in ("past_key", "past_value")}
    _, *presents = session.run(
        None,
        {
            "query": random.standard_normal((1, 5, width)).astype(np.float32),
            **flat,
            **past,
            "last": np.array([6], np.int32),
            "total": np.array(7, np.int32),
            "key_steps": steps.keys_NH[np.newaxis, :, np.newaxis],
            "value_steps": steps.values_NH[np.newaxis, :, np.newaxis],
        },
    )
    expected = RoundedCache({0: steps}).update(*(torch.from_numpy(heads[name]) for name in ("key", "value")), 0)
    pairs = zip(presents, expected, (steps.keys_NH, steps.values_NH), past.values(), strict=True)
    for present, rounded, steps_NH, before in pairs:
        assert np.array_equal(present[:, :, 2:7] * steps_NH[:, np.newaxis], rounded.numpy())
        assert np.array_equal(present[:, :, :2], before[:, :, :2])
        assert {-128, 127} <= set(present[:, :, 2:7].flatten().tolist()), "some reach beyond the ends"
