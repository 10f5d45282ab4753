"""Agreement with the whole model: against distributions worked out by hand, and with real runners that take turns."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.conftest import GetModel, MakeBundle
from tests.quality.test_evaluation import Parrot, sample
from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.execution.reference import scheduled
from voidprune.profiling.calibration import Sample
from voidprune.quality import agreement
from voidprune.quality.agreement import measure_agreement
from voidprune.schedule import dropped_schedule, full_schedule


def likelihoods(*shares: float) -> Parrot:
    values = [math.log(share) if share else -math.inf for share in shares]
    return Parrot(likelihood=lambda token: values[token], vocab_size=len(shares))


def test_divergence_worked_out_by_hand() -> None:
    whole, other = likelihoods(0.5, 0.25, 0.25, 0.0), likelihoods(0.25, 0.5, 0.125, 0.125)
    items = [sample(1, None, response=(0, 1)), sample(2, None, response=(2,))]
    runners = {"other": lambda: nullcontext(other), "itself": lambda: nullcontext(whole)}
    found = measure_agreement(lambda: nullcontext(whole), runners, items)
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.25 * math.log(2)
    assert found["other"].kl.value == pytest.approx(by_hand, rel=1e-6)
    assert found["other"].divergence.tolist() == [pytest.approx(2 * by_hand), pytest.approx(by_hand)]
    assert found["other"].top1.value == 0.0
    assert (found["itself"].kl.value, found["itself"].top1.value) == (0.0, 1.0)


def test_runners_of_one_model_take_turns(
    get_model: GetModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain passes of the stock model and of the schedule, a row at a time; the bundle agrees with the reference."""
    source = get_model("llama")
    schedule = dropped_schedule(source.identity, {1, 4})
    items = _items(source)
    expected = []
    for item in items:
        tokens_BT = torch.tensor([item.prompt + (item.response or ())])
        positions = slice(len(item.prompt) - 1, -1)
        with torch.inference_mode():
            whole_TV = source.model(tokens_BT).logits[0, positions].double().log_softmax(-1)
            with scheduled(source.model, schedule) as running:
                is_decode_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
                other_TV = running.forward(tokens_BT, is_decode_BT=is_decode_BT)[0, positions].double().log_softmax(-1)
        expected.append(torch.nn.functional.kl_div(other_TV, whole_TV, log_target=True, reduction="sum").item())
    session = make_bundle(source, schedule).session
    runners = {
        "reference": lambda: scheduled(source.model, schedule),
        "onnx": lambda: nullcontext(session),
        "itself": lambda: scheduled(source.model, full_schedule(source.identity)),
    }
    for limit in (2**25, 1, source.checkpoint.architecture.vocab_size * 6):  # batches of any size
        monkeypatch.setattr(agreement, "PREDICTED_VALUES", limit)
        monkeypatch.setattr(agreement, "_COMPARED_VALUES", limit)
        steps: list[int] = []
        found = measure_agreement(
            lambda: scheduled(source.model, full_schedule(source.identity)), runners, items, on_progress=steps.append
        )
        np.testing.assert_allclose(found["reference"].divergence, expected, rtol=1e-3)
        np.testing.assert_allclose(found["onnx"].divergence, expected, rtol=1e-3)
        assert found["itself"].kl.value < 1e-6
        assert found["itself"].top1.value == 1.0
        assert sum(steps) == len(items)
    assert not any(module._forward_hooks for module in source.model.modules())


def _items(source: TinyModel) -> list[Sample]:
    random = np.random.default_rng(5)
    vocab_size = source.checkpoint.architecture.vocab_size
    tokens = [tuple(random.integers(0, vocab_size, length).tolist()) for length in (7, 4, 2, 9, 1, 3)]
    return [Sample(tokens[row], tokens[row + 3], None, "g", "here") for row in range(3)]


def test_nothing_to_compare() -> None:
    runner = Parrot()
    others = {"other": lambda: nullcontext(runner)}
    assert measure_agreement(lambda: nullcontext(runner), others, [sample(1, "1", response=None)]) == {}


def test_other_vocabularies_and_broken_models_are_refused() -> None:
    items = [sample(1, None)]

    def compare(other: Parrot) -> None:
        measure_agreement(lambda: nullcontext(Parrot()), {"other": lambda: nullcontext(other)}, items)

    with pytest.raises(ModelError, match="the vocabulary of other has 12 tokens, that of the whole model 16"):
        compare(Parrot(vocab_size=12))
    with pytest.raises(ModelError, match="not finite"):
        compare(Parrot(likelihood=lambda _token: math.nan))
    with pytest.raises(ModelError, match="not finite"):  # the other rules out what the whole model expects
        compare(Parrot(likelihood=lambda token: -math.inf if token else 0.0))
