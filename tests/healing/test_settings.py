"""Settings make sense or are refused; the learning rate rises, then falls to zero."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from voidprune.artifacts import canonical_bytes
from voidprune.errors import HealingError
from voidprune.healing.settings import DistillSettings, Parameters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_pass_tokens": 0}, "max_pass_tokens is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"max_minutes": math.inf}, "max_minutes is inf"),
        ({"warmup": 1.0}, "warm-up 1,"),
        ({"held_out": 0.0}, "held-out share 0 "),
        ({"weight_decay": math.nan}, "weight decay nan"),
        ({"embeddings": True}, "embeddings are not trained by adapters"),
        ({"precision": "fp16"}, "training in fp16 is not offered"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HealingError, match=message) as caught:
        DistillSettings(**values)
    assert caught.value.hint


def test_learning_rate_rises_and_falls() -> None:
    settings = DistillSettings(steps=100, warmup=0.1, learning_rate=2.0)
    rates = [settings.learning_rate_at(step, hidden_size=128) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))


def test_default_learning_rate_shrinks_with_the_width() -> None:
    for parameters, at_4096 in ((Parameters.LORA, 1.95e-4), (Parameters.FULL, 3.66e-5)):
        settings = DistillSettings(parameters=parameters, warmup=0.0)
        small, large = (settings.learning_rate_at(0, hidden_size=size) for size in (128, 4096))
        assert small == pytest.approx(32 * large)
        assert large == pytest.approx(at_4096, rel=0.01)


def test_passes_shrink_with_the_vocabulary() -> None:
    settings = DistillSettings()
    assert [settings.pass_tokens(vocab_size=size) for size in (606, 32_000, 152_064, 2**30)] == [8192, 8192, 1765, 1]
    assert DistillSettings(max_pass_tokens=100).pass_tokens(vocab_size=152_064) == 100


def test_document_is_json() -> None:
    assert b'"parameters": "lora"' in canonical_bytes(DistillSettings().to_document())
