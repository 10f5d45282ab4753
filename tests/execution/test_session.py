"""A bundle under onnxruntime: the same tokens as the reference, for whole conversations, and errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Bundle, MakeBundle
from tests.strategies import schedules
from tests.tiny_models import TinyModel
from voidprune.errors import ArtifactError, ContextLengthError, ModelError, RuntimeProviderError
from voidprune.execution import session as session_module
from voidprune.execution.reference import decode_mask, scheduled
from voidprune.execution.session import BundleSession, Conversation
from voidprune.quality.parity import TOLERANCE
from voidprune.schedule import Boundary, LayerAction, Schedule, dropped_schedule, full_schedule, satisfy_kv_contract

A = LayerAction
STEPS = 64


def mixed(source: TinyModel, *, boundary: Boundary = Boundary.DECODE, single_turn: bool = False) -> Schedule:
    """Every action in both phases where the number of layers allows it."""
    num_layers = source.identity.num_layers
    prefill, decode = satisfy_kv_contract(
        (A.FULL, A.SKIP_ATTENTION, A.KV_ONLY, A.KV_MLP, A.SKIP, A.SKIP_MLP)[:num_layers],
        (A.FULL, A.FULL, A.SKIP_MLP, A.SKIP_ATTENTION, A.KV_ONLY, A.KV_MLP)[:num_layers],
        single_turn=single_turn,
    )
    return Schedule(model=source.identity, prefill=prefill, decode=decode, boundary=boundary, single_turn=single_turn)


def random_prompts(source: TinyModel, lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    vocab_size = source.checkpoint.architecture.vocab_size
    return [random.integers(3, vocab_size, length).tolist() for length in lengths]


def reference_tokens(bundle: Bundle, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
    with scheduled(bundle.source.model, bundle.schedule) as running:
        return running.generate(prompts, max_new_tokens=max_new_tokens)


def continue_greedily(conversation: Conversation, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> np.ndarray:
    """One turn: the prompts, then `num_tokens` tokens a row, all of them written to the cache. [B, num_tokens]"""
    tokens_B = conversation.prefill(prompts).argmax(-1)
    said = []
    for _ in range(num_tokens):
        said.append(tokens_B)
        tokens_B = conversation.decode(tokens_B[:, np.newaxis])[:, -1].argmax(-1)
    return np.stack(said, axis=1)


def assert_greedy_under_reference(bundle: Bundle, turns: Sequence[tuple[list[int], list[int]]]) -> None:
    """One uncached reference pass over a whole conversation says which token was due at each place.

    Logits agree within TOLERANCE, so where the reference itself has two best tokens that close together, either is due. (Seen: a
    random schedule whose two best logits were 5e-6 apart.)
    """
    tokens: list[int] = []
    is_decode: list[bool] = []
    for prompt, response in turns:
        is_decode += decode_mask(len(prompt), len(prompt) + len(response), bundle.schedule.boundary)
        tokens += [*prompt, *response]
    with scheduled(bundle.source.model, bundle.schedule) as running:
        logits_TV = running.forward(torch.tensor([tokens]), is_decode_BT=torch.tensor([is_decode]))[0]
    position = 0
    for prompt, response in turns:
        position += len(prompt)
        due_TV = logits_TV[position - 1 : position - 1 + len(response)]
        lost_T = due_TV.max(-1).values - due_TV.gather(-1, torch.tensor(response).unsqueeze(-1))[:, 0]
        assert lost_T.max() <= TOLERANCE
        position += len(response)


# ---- generation


@pytest.mark.parametrize("boundary", Boundary)
def test_greedy_tokens_equal_the_reference(tiny_model: TinyModel, make_bundle: MakeBundle, boundary: Boundary) -> None:
    bundle = make_bundle(tiny_model, mixed(tiny_model, boundary=boundary))
    for lengths in ([5], [1], [9, 1]):
        prompts = random_prompts(tiny_model, lengths)
        expected = reference_tokens(bundle, prompts, max_new_tokens=24)
        assert bundle.session.generate(prompts, max_new_tokens=24) == expected


@settings(max_examples=5)
@given(data=st.data())
def test_trained_model_speaks_64_tokens_as_the_reference(
    stories260k: TinyModel, make_bundle: MakeBundle, data: st.DataObject
) -> None:
    bundle = make_bundle(stories260k, data.draw(schedules(stories260k.identity)))
    for lengths in ([1], [12], [3, 3], [7, 1]):
        prompts = random_prompts(stories260k, lengths)
        for prompt, response in zip(prompts, bundle.session.generate(prompts, max_new_tokens=STEPS), strict=True):
            assert len(response) == STEPS
            assert_greedy_under_reference(bundle, [(prompt, response)])


@settings(max_examples=5)
@given(data=st.data())
def test_trained_model_speaks_a_second_turn_as_the_reference(
    stories260k: TinyModel, make_bundle: MakeBundle, data: st.DataObject
) -> None:
    bundle = make_bundle(stories260k, data.draw(schedules(stories260k.identity, single_turn=False)))
    for first, second in (([6], [4]), ([1], [1]), ([2, 9], [5, 1])):
        prompts, later = random_prompts(stories260k, first), random_prompts(stories260k, second, seed=1)
        conversation = bundle.session.start(len(prompts), max_positions=2 * STEPS + 20)
        said = continue_greedily(conversation, prompts, num_tokens=STEPS // 2)
        answered = continue_greedily(conversation, later, num_tokens=STEPS)
        for row in range(len(prompts)):
            turns = [(prompts[row], said[row].tolist()), (later[row], answered[row].tolist())]
            assert_greedy_under_reference(bundle, turns)


@pytest.mark.parametrize("name", ["llama", "llama-tied-small-heads", "mistral-window", "qwen2-windows"])
@pytest.mark.parametrize("boundary", Boundary)
def test_second_turn_equals_the_reference(
    get_model: Callable[[str], TinyModel], make_bundle: MakeBundle, name: str, boundary: Boundary
) -> None:
    source = get_model(name)
    bundle = make_bundle(source, mixed(source, boundary=boundary))
    prompts, later = random_prompts(source, [4, 7]), random_prompts(source, [6, 1], seed=1)
    conversation = bundle.session.start(2, max_positions=60)
    said = continue_greedily(conversation, prompts, num_tokens=8)
    answered = continue_greedily(conversation, later, num_tokens=8)
    assert conversation.lengths == [4 + 8 + 6 + 8, 7 + 8 + 1 + 8]
    for row in range(2):
        turns = [(prompts[row], said[row].tolist()), (later[row], answered[row].tolist())]
        assert_greedy_under_reference(bundle, turns)


def test_rows_do_not_touch_each_other(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama))
    prompts = random_prompts(llama, [3, 11, 3, 1])
    together = bundle.session.generate(prompts, max_new_tokens=16)
    assert together == [bundle.session.generate([prompt], max_new_tokens=16)[0] for prompt in prompts]


def test_tokens_at_once_equal_tokens_one_by_one(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama))
    tokens_BT = np.array(random_prompts(llama, [6, 6], seed=2))
    for prompts in (random_prompts(llama, [4, 4]), random_prompts(llama, [4, 2])):
        at_once = bundle.session.start(2, max_positions=20)
        one_by_one = bundle.session.start(2, max_positions=20)
        np.testing.assert_allclose(at_once.prefill(prompts), one_by_one.prefill(prompts), atol=1e-5)
        steps = np.concatenate([one_by_one.decode(tokens_BT[:, step : step + 1]) for step in range(6)], axis=1)
        np.testing.assert_allclose(at_once.decode(tokens_BT), steps, atol=1e-4)
        assert at_once.lengths == one_by_one.lengths


def test_buffers_longer_than_needed_change_nothing(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama))
    (prompt,) = random_prompts(llama, [8])
    tight, loose = (bundle.session.start(max_positions=size) for size in (8, 150))
    np.testing.assert_allclose(tight.prefill([prompt]), loose.prefill([prompt]), atol=1e-5)


def test_generation_stops_at_the_end_token_of_each_row(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama))
    prompts = random_prompts(llama, [4, 2])
    free = bundle.session.generate(prompts, max_new_tokens=12)
    end = free[1][4]
    stopped = bundle.session.generate(prompts, max_new_tokens=12, end_tokens=[end])
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)
    assert len(stopped[1]) <= 5


def test_score_equals_the_reference(tiny_model: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(tiny_model, mixed(tiny_model))
    prompts, responses = random_prompts(tiny_model, [6, 1, 2]), random_prompts(tiny_model, [4, 7, 1], seed=1)
    with scheduled(tiny_model.model, bundle.schedule) as running:
        expected = running.score(prompts, responses)
    found = bundle.session.score(prompts, responses)
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 250, 2**24])
def test_predictions_are_those_of_the_reference_in_pieces_of_any_size(
    llama: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(session_module, "LOGIT_VALUES", limit)
    bundle = make_bundle(llama, mixed(llama))
    prompts, responses = random_prompts(llama, [6, 1, 2]), random_prompts(llama, [4, 7, 1], seed=1)
    with scheduled(llama.model, bundle.schedule) as running:
        assert running.vocab_size == bundle.session.vocab_size
        expected = running.predict(prompts, responses)
    found, scores = bundle.session.predict(prompts, responses), bundle.session.score(prompts, responses)
    for response, wanted, got, score in zip(responses, expected, found, scores, strict=True):
        assert got.dtype == np.float32
        assert got.shape == (len(response), bundle.session.vocab_size)
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(got[range(len(response)), response], score, atol=1e-5)


# ---- single turn


def test_single_turn_refuses_a_second_turn(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama, single_turn=True))
    prompts = random_prompts(llama, [4])
    assert bundle.session.generate(prompts, max_new_tokens=16) == reference_tokens(bundle, prompts, max_new_tokens=16)
    conversation = bundle.session.start(max_positions=30)
    continue_greedily(conversation, prompts, num_tokens=3)
    with pytest.raises(ModelError, match="the schedule is single-turn") as caught:
        conversation.prefill(prompts)
    assert caught.value.hint == "start a new conversation, or plan without --single-turn"


# ---- limits


def test_more_positions_than_the_model_has(llama: TinyModel, make_bundle: MakeBundle) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    with pytest.raises(ContextLengthError, match=r"161 tokens are asked for; the model's context is 160"):
        session.start(max_positions=161)
    with pytest.raises(ContextLengthError, match=r"165 tokens are asked for"):
        session.generate([[5] * 155], max_new_tokens=10)
    assert len(session.generate([[5] * 155], max_new_tokens=5)[0]) == 5


@pytest.mark.parametrize("first", [3, 1])
def test_more_tokens_than_the_buffers_hold(llama: TinyModel, make_bundle: MakeBundle, first: int) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    conversation = session.start(max_positions=4)
    conversation.prefill([[5] * first])
    with pytest.raises(ContextLengthError, match="5 tokens do not fit into K/V buffers of 4 positions"):
        conversation.decode(np.full((1, 5 - first), 5))
    with pytest.raises(ContextLengthError, match="6 tokens do not fit"):
        conversation.prefill([[5] * (6 - first)])
    assert conversation.lengths == [first], "a refused step leaves the conversation as it was"


def test_last_position_of_the_context_is_right(llama: TinyModel, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(llama, mixed(llama))
    prompts = random_prompts(llama, [150])
    assert bundle.session.generate(prompts, max_new_tokens=10) == reference_tokens(bundle, prompts, max_new_tokens=10)


def test_empty_prompt_is_refused(llama: TinyModel, make_bundle: MakeBundle) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    with pytest.raises(ModelError, match="a prompt has no tokens"):
        session.generate([[5], []], max_new_tokens=2)


# ---- damage


@pytest.fixture
def copy(llama: TinyModel, make_bundle: MakeBundle, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    bundle = make_bundle(llama, dropped_schedule(llama.identity, {2, 3}))
    return shutil.copytree(bundle.folder, tmp_path / "bundle")


def test_copied_bundle_works_where_it_stands(copy: Path) -> None:
    assert len(BundleSession(copy).generate([[5, 6]], max_new_tokens=3)[0]) == 3


def test_threads_are_set_before_the_first_session(copy: Path) -> None:
    """The pool belongs to the process, so this takes one of its own."""
    script = (
        "from pathlib import Path\n"
        "from voidprune.errors import RuntimeProviderError\n"
        "from voidprune.execution.providers import size_thread_pool\n"
        "from voidprune.execution.session import BundleSession\n"
        "size_thread_pool(1)\n"
        f"print(BundleSession(Path({str(copy)!r})).generate([[5, 6]], max_new_tokens=3))\n"
        "try:\n    size_thread_pool(2)\nexcept RuntimeProviderError as error:\n    print(error)"
    )
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines == [
        str(BundleSession(copy).generate([[5, 6]], max_new_tokens=3)),
        "onnxruntime has its threads already",
    ]


@pytest.mark.parametrize("token", [-1, 101])
def test_tokens_that_the_model_has_not(llama: TinyModel, make_bundle: MakeBundle, token: int) -> None:
    bundle = make_bundle(llama, mixed(llama))
    message = f"there is no token {token}: the vocabulary of the model has 101"
    conversation = bundle.session.start(max_positions=8)
    with pytest.raises(ModelError, match=message):
        conversation.prefill([[5, token, 6]])
    assert conversation.tokens == [[]]
    with pytest.raises(ModelError, match=message):
        bundle.session.score([[5, 6]], [[7, token]])
    with scheduled(llama.model, bundle.schedule) as running, pytest.raises(ModelError, match=message):
        running.generate([[5, token, 6]], max_new_tokens=2)


def test_missing_description(copy: Path) -> None:
    (copy / "voidprune.json").unlink()
    with pytest.raises(ModelError, match=r"is not a bundle: it holds no voidprune\.json"):
        BundleSession(copy)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_description_with_one_graph_only(copy: Path, phase: str) -> None:
    document = json.loads((copy / "voidprune.json").read_text())
    del document["graphs"][phase]
    (copy / "voidprune.json").write_text(json.dumps(document))
    with pytest.raises((ArtifactError, ModelError)):
        BundleSession(copy)


def test_checkpoint_without_graphs(copy: Path) -> None:
    document = json.loads((copy / "voidprune.json").read_text())
    document["graphs"] = {}
    (copy / "voidprune.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="holds no ONNX graphs") as caught:
        BundleSession(copy)
    assert caught.value.hint == "export it with --format onnx"


@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="a build without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error_not_a_fallback(copy: Path) -> None:
    with pytest.raises(RuntimeProviderError):
        BundleSession(copy, provider="cuda")


# ---- slips of who calls it


def test_rows_and_prompts_have_to_be_as_many(llama: TinyModel, make_bundle: MakeBundle) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    for prompts in ([[1, 2]], [[1], [2], [3]], []):
        with pytest.raises(ModelError, match=f"{len(prompts)} prompts are given to a conversation of 2 rows"):
            session.start(2, max_positions=8).prefill(prompts)


def test_no_prompts_have_no_responses(llama: TinyModel, make_bundle: MakeBundle) -> None:
    assert make_bundle(llama, full_schedule(llama.identity)).session.generate([], max_new_tokens=3) == []


@pytest.mark.parametrize("positions", [0, -3])
def test_a_conversation_has_room(llama: TinyModel, make_bundle: MakeBundle, positions: int) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    with pytest.raises(ContextLengthError, match=f"{positions} positions hold no token"):
        session.start(max_positions=positions)
