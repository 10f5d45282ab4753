"""LAC's golden vectors, and counts that depend on neither batch nor order nor padding."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from tests.conftest import TRAINED
from tests.tiny_models import TinyModel, build_model
from voidprune import artifacts
from voidprune.errors import ModelError
from voidprune.execution.reference import scheduled
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.models.pretrained import end_tokens, load_model, load_tokenizer
from voidprune.pipeline.tasks import task_rows
from voidprune.profiling.calibration import Sample, encode_rows, read_rows
from voidprune.profiling.profile import (
    MEASURES,
    NUM_BLOCKS,
    LacSettings,
    LayerStatistics,
    Profile,
    empty_statistics,
    merge_profiles,
    sum_statistics,
)
from voidprune.profiling.tracing import generate_responses, lac_activity, trace_model
from voidprune.schedule import LayerAction, Phase, Schedule, full_schedule

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


def totals(profile: Profile) -> dict[tuple[str, Phase], LayerStatistics]:
    return {
        (name, phase): sum_statistics(blocks, num_layers=profile.model.num_layers)
        for name, phases in profile.groups.items()
        for phase, blocks in phases.items()
    }


def check_same_counts(found: Profile, expected: Profile) -> None:
    """Counts are equal; sums of distances differ by what batching does to the last bits of a float32."""
    assert totals(found).keys() == totals(expected).keys()
    for key, other in totals(expected).items():
        one = totals(found)[key]
        assert (one.num_tokens, one.active, one.num_spans) == (other.num_tokens, other.active, other.num_spans)
        for name in (*MEASURES[1:], "span_distance"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-6)


def test_counts_depend_on_neither_batch_nor_order(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint.folder)
    rows = task_rows("demo", num_items=8, split="calibration")
    samples = encode_rows(rows, tokenizer, end_tokens=end_tokens(checkpoint.folder), max_length=400)
    alone = trace(checkpoint, samples, batch_size=1)
    check_same_counts(trace(checkpoint, samples, batch_size=8), alone)
    check_same_counts(trace(checkpoint, samples[::-1], batch_size=8), alone)


def test_counts_of_a_trained_model_depend_on_neither_batch_nor_order(stories260k: TinyModel) -> None:
    texts = TRAINED.parent / "text" / "tinystories_500.jsonl"
    tokenizer = load_tokenizer(stories260k.folder)
    samples = encode_rows(read_rows(texts)[:24], tokenizer, end_tokens=(), max_length=120)
    alone = trace(stories260k.checkpoint, samples, batch_size=1)
    check_same_counts(trace(stories260k.checkpoint, samples, batch_size=8), alone)
    check_same_counts(trace(stories260k.checkpoint, samples[::-1], batch_size=8), alone)


def test_a_sample_measures_the_same_alone_and_in_any_batch(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    apart = [replace(sample, group=sample.place) for sample in samples]
    together = trace(checkpoint, apart, batch_size=6)
    for sample in apart:
        alone = trace(checkpoint, [sample])
        check_same_counts(replace(together, groups={sample.group: together.groups[sample.group]}), alone)


def test_the_order_of_samples_leaves_no_trace_in_the_totals(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    """One at a time, each sample's sums are the same numbers, and these add without rounding."""
    forth, back = (trace(checkpoint, order, batch_size=1) for order in (samples, samples[::-1]))
    assert totals(forth) == totals(back)
    halves = merge_profiles(trace(checkpoint, samples[:3], batch_size=1), trace(checkpoint, samples[3:], batch_size=1))
    assert totals(halves) == totals(forth)


def test_samples_go_round_the_blocks_of_their_group(checkpoint: Checkpoint) -> None:
    samples = [Sample((5, number), (7, 8), None, "ab"[number % 2], "") for number in range(2 * NUM_BLOCKS + 6)]
    first, rest = samples[: 2 * NUM_BLOCKS], samples[2 * NUM_BLOCKS :]
    whole, part = trace(checkpoint, samples, batch_size=1), trace(checkpoint, first, batch_size=1)
    assert [block.num_tokens for block in whole.groups["a"][Phase.PREFILL]] == [4, 4, 4] + [2] * (NUM_BLOCKS - 3)
    assert merge_profiles(part, trace(checkpoint, rest, batch_size=1)).groups == whole.groups
    lines = [artifacts.canonical_bytes(profile.to_document()).count(b"\n") for profile in (whole, part)]
    assert lines[0] == lines[1]  # a profile grows with its layers and groups only


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


def test_sublayers_agree_with_the_model_run_without_them(tiny_model: TinyModel) -> None:
    """The state after attention is the one that the reference has where this layer's MLP does not run. Any family, any norm."""
    sample = Sample((5, 9, 17, 33, 2), (40, 41, 42), None, "default", "")
    ids = torch.tensor([[*sample.prompt, 40, 41]])
    layers = attrgetter(tiny_model.checkpoint.architecture.spec.modules.layers)(tiny_model.model)
    states: dict[int, torch.Tensor] = {}

    def note(layer: int, output: object) -> None:
        states[layer] = (output[0] if isinstance(output, tuple) else output)[0].double()  # type: ignore[index]

    def run(schedule: Schedule) -> dict[int, torch.Tensor]:
        states.clear()
        handles = [layers[0].register_forward_pre_hook(lambda _m, args: note(-1, args))]
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(lambda _m, _a, output, number=number: note(number, output)))
        with scheduled(tiny_model.model, schedule) as runner:
            runner.forward(ids, is_decode_BT=torch.zeros(1, 7, dtype=torch.bool))
        for handle in handles:
            handle.remove()
        return dict(states)

    whole = full_schedule(tiny_model.identity)
    dense = run(whole)
    found = trace_model(tiny_model.model, tiny_model.checkpoint, [sample], responses="dataset")
    statistics = found.statistics(Phase.PREFILL)
    attention, mlp = statistics.attention_influence, statistics.mlp_influence
    for layer in range(len(layers)):
        actions = list(whole.prefill)
        actions[layer] = LayerAction.SKIP_MLP
        between = run(replace(whole, prefill=tuple(actions)))[layer]
        turned = 1 - torch.cosine_similarity(dense[layer - 1], between, dim=-1)[: len(sample.prompt)].sum() / 5
        assert attention[layer] == pytest.approx(turned.item(), rel=1e-3, abs=1e-6)
        turned = 1 - torch.cosine_similarity(between, dense[layer], dim=-1)[: len(sample.prompt)].sum() / 5
        assert mlp[layer] == pytest.approx(turned.item(), rel=1e-3, abs=1e-6)


def test_spans_agree_with_hidden_states(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    """At the last prompt token for prefill, at the last token that is fed for decode. The last state lies behind the final norm."""
    sample = samples[0]
    profile = trace(checkpoint, [replace(sample, group="x"), *samples[1:]], batch_size=6)
    ids = torch.tensor([[*sample.prompt, *(sample.response or ())[:-1]]])
    with torch.inference_mode():
        hidden = torch.stack(load_model(checkpoint.folder)(ids, output_hidden_states=True).hidden_states)[
            :-1, 0
        ].double()
    for phase, token in ((Phase.PREFILL, len(sample.prompt) - 1), (Phase.DECODE, -1)):
        statistics = sum_statistics(profile.groups["x"][phase], num_layers=profile.model.num_layers)
        assert statistics.num_spans == 1
        for start, before in enumerate(hidden[:, token]):
            for end, after in list(enumerate(hidden[:, token]))[start + 1 :]:
                angle = torch.arccos(before @ after / before.norm() / after.norm()).item() / math.pi
                assert statistics.angular_distances(end - start)[start] == pytest.approx(angle, abs=1e-5)


def test_a_response_of_one_token_has_no_decode(checkpoint: Checkpoint) -> None:
    profile = trace(checkpoint, [Sample((5, 6), (7,), None, "default", "")])
    assert profile.statistics(Phase.DECODE) == empty_statistics(profile.model.num_layers)
    assert profile.statistics(Phase.PREFILL).num_spans == 1


def test_overflow_is_named(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1e38)
    with pytest.raises(ModelError, match="hidden states overflow"):
        trace_model(model.model, model.checkpoint, [Sample((5, 6), (7, 8), None, "default", "")], responses="dataset")


def test_remembered_batches_are_not_run_again(checkpoint: Checkpoint, samples: list[Sample], tmp_path: Path) -> None:
    runs: list[int] = []
    model = load_model(checkpoint.folder)
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))

    def measure(output: Path | None) -> Profile:
        runs.clear()
        with Journal(output, key={}) as journal:
            asked = [replace(sample, response=None) for sample in samples]
            answered = generate_responses(model, asked, max_new_tokens=4, end_tokens=(), batch_size=2, journal=journal)
            return trace_model(model, checkpoint, answered, responses="generate", batch_size=2, journal=journal)

    expected = measure(None)
    assert len(runs) == 3 * 4 + 3
    assert measure(tmp_path / "out") == expected
    assert measure(tmp_path / "out") == expected
    assert runs == []
    partial = tmp_path / "out.partial"
    partial.write_bytes(partial.read_bytes()[:-9])
    assert measure(tmp_path / "out") == expected
    assert len(runs) == 1


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
