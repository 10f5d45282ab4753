"""Steps of channels, and the record of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from voidprune.execution.kv_cache import KvCache, KvSteps
from voidprune.execution.packing_record import Fidelity

FIDELITY = Fidelity(top1=0.99, kl=0.001, perplexity_ratio=1.002, num_tokens=12)


def test_what_was_reached_is_127_steps() -> None:
    reached = np.array([[0.5, 0.0], [254.0, 1e-3]], np.float32)
    steps = KvSteps.reaching(reached, np.zeros((2, 2), np.float32))
    np.testing.assert_allclose(steps.keys_NH * 127, [[0.5, 254.0], [254.0, 1e-3]], rtol=1e-6)
    np.testing.assert_allclose(steps.values_NH * 127, np.ones((2, 2)), rtol=1e-6)
    assert steps.keys_NH.dtype == steps.values_NH.dtype == np.float32


def test_no_step_is_too_small_to_divide_by() -> None:
    steps = KvSteps.reaching(*[np.full((1, 2), 1e-44, np.float32)] * 2)
    assert np.isfinite(1 / steps.keys_NH).all()


@pytest.mark.parametrize("fidelity", [None, FIDELITY])
def test_records_come_back_as_they_were(fidelity: Fidelity | None) -> None:
    record = KvCache("int8", 64, ("00", "ff"), fidelity)
    assert KvCache.from_document(record.to_document()) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "keep"}, "dtype is 'keep'"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"prompts": []}, r"prompts is \(\)"),
        ({"prompts": [1]}, r"prompts is \(1,\)"),
        ({"prompts": "abc"}, "prompts is 'abc'"),
        ({"bytes_per_token": -1}, "bytes_per_token is -1"),
        ({"bytes_per_token": 6.5}, "bytes_per_token is 6.5"),
    ],
)
def test_broken_records_are_refused(change: dict[str, Any], message: str) -> None:
    document = {**KvCache("int8", 64, ("00",)).to_document(), **change}
    with pytest.raises(ValueError, match=message):
        KvCache.from_document(document)


def test_records_with_other_keys_are_refused() -> None:
    with pytest.raises(TypeError):
        KvCache.from_document({**KvCache("int8", 64, ("00",)).to_document(), "bits": 8})
