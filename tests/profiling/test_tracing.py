"""LAC's golden vectors, and counts that depend on neither batch nor order nor padding."""

from __future__ import annotations

import pytest
import torch

from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.models.pretrained import load_model
from voidprune.profiling.calibration import Sample
from voidprune.profiling.profile import LacSettings, Profile
from voidprune.profiling.tracing import generate_responses, lac_activity, trace_model
from voidprune.schedule import Phase

V1 = [1, 3, 4, 4.5, 10, 10.5, 9.5, 20, 30]
V2 = [*V1[:-1], 25]
V3 = [1, 900, 905, 903, 910, 912, 915, 920, 300]
V4 = [5, 4, 3, 6, 6, 12, 11, 30, 24]


@pytest.mark.parametrize(
    ("norms", "alphas", "active"),
    [
        (V1, [0.8], "11010011"),
        (V1, [0.0], "11111011"),
        (V1, [0.2, 0.5], "11110011"),
        (V1, [1.0], "11010010"),
        (V2, [0.8], "11010010"),
        (V3, [0.2, 0.5, 0.8, 1.0], "11000000"),
        (V3, [0.0], "11011110"),
        (V4, [0.0], "00111010"),
        (V4, [0.2, 0.5, 0.8, 1.0], "00101010"),
    ],
)
def test_golden_vectors(norms: list[float], alphas: list[float], active: str) -> None:
    """Made by running the published hook (github manishemirani/void_in_language_models)."""
    for alpha in alphas:
        mask = lac_activity(torch.tensor(norms, dtype=torch.float32), alpha)
        assert "".join(str(int(value)) for value in mask) == active


def test_published_arithmetic_differs() -> None:
    norms = torch.tensor([300, 301.4, 302.5, 303.1, 303.8])
    assert lac_activity(norms, 0.8).tolist() == [True] * 4
    assert lac_activity(norms.bfloat16(), 0.8).tolist() == [True, True, True, False]


def test_samples_of_a_batch_are_not_coupled() -> None:
    first, second = torch.tensor([1.0, 3, 4, 7]), torch.tensor([1.0, 9, 12, 13])
    together = lac_activity(torch.stack([first, second], dim=1), 0.8)
    assert torch.equal(together[:, 0], lac_activity(first, 0.8))
    assert torch.equal(together[:, 1], lac_activity(second, 0.8))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    from voidprune.pipeline.models import demo_folder

    return open_checkpoint(demo_folder())


@pytest.fixture(scope="module")
def samples(checkpoint: Checkpoint) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = [(9, 4), (3, 1), (17, 6), (5, 5), (8, 2), (12, 3)]

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, checkpoint.architecture.vocab_size, (count,), generator=generator).tolist())

    return [
        Sample(draw(prompt), draw(response), None, f"group {number % 2}", f"sample {number}")
        for number, (prompt, response) in enumerate(lengths)
    ]


def trace(checkpoint: Checkpoint, samples: list[Sample], **settings: object) -> Profile:
    model = load_model(checkpoint.folder)
    profile = trace_model(model, checkpoint, samples, responses="dataset", **settings)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())
    return profile


def counts(profile: Profile) -> dict[str, dict[Phase, tuple[int, ...]]]:
    return {
        name: {phase: (statistics.num_tokens, *statistics.active) for phase, statistics in phases.items()}
        for name, phases in profile.groups.items()
    }


def test_counts_depend_on_neither_batch_nor_order(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    alone = counts(trace(checkpoint, samples, batch_size=1))
    assert counts(trace(checkpoint, samples, batch_size=8)) == alone
    assert counts(trace(checkpoint, samples[::-1], batch_size=4)) == alone


def test_only_real_tokens_count(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    profile = trace(checkpoint, samples, batch_size=8)
    assert profile.statistics(Phase.PREFILL).num_tokens == sum(len(sample.prompt) for sample in samples)
    assert profile.statistics(Phase.DECODE).num_tokens == sum(len(sample.response or ()) - 1 for sample in samples)


def test_measurements_agree_with_hidden_states(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    """The same figures from transformers' own hidden states, by other formulas. The last of those is behind the final norm."""
    sample = samples[2]
    model = load_model(checkpoint.folder)
    ids = torch.tensor([[*sample.prompt, *(sample.response or ())[:-1]]])
    with torch.inference_mode():
        states = torch.stack(model(ids, output_hidden_states=True).hidden_states)[:, 0, : len(sample.prompt)]
    found = trace(checkpoint, [sample]).statistics(Phase.PREFILL)
    before, after = states[:-2].double(), states[1:-1].double()
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    assert found.block_influence[:-1] == pytest.approx((1 - cosine).mean(-1).tolist(), abs=1e-5)
    change = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert found.relative_norm_change[:-1] == pytest.approx(change.mean(-1).tolist(), rel=1e-4)
    active = lac_activity(states[:-1].norm(dim=-1), 0.8).sum(-1)
    assert list(found.active[:-1]) == active.tolist()


def test_settings_are_recorded(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    profile = trace(checkpoint, samples, lac=LacSettings(alpha=0.3, arithmetic="model"))
    assert profile.lac == LacSettings(alpha=0.3, arithmetic="model")
    assert profile.calibration.num_samples == len(samples)
    assert set(profile.groups) == {"group 0", "group 1"}


def test_generated_responses_do_not_depend_on_the_batch(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    model = load_model(checkpoint.folder)
    by_size = [
        generate_responses(model, samples, max_new_tokens=8, end_tokens=(3,), batch_size=size) for size in (1, 4)
    ]
    assert by_size[0] == by_size[1]
    for sample in by_size[0]:
        assert sample.response is not None
        assert 1 <= len(sample.response) <= 8
        assert 3 not in sample.response[:-1]
