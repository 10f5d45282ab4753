"""Sessions whose tensors live on a device. Tried on the CPU, a device of torch like any other; capturing is CUDA's alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.conftest import Bundle, GetModel, MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import build_model
from voidprune.execution import providers
from voidprune.execution import session as session_module
from voidprune.execution.device_bindings import MOST_CAPTURES, DeviceBinding, DeviceBuffers, DeviceHead
from voidprune.execution.device_weights import load_device_weights, weight_ranges
from voidprune.execution.providers import open_session
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.quantize import uniform_packing
from voidprune.pipeline.models import default_provider
from voidprune.quality.parity import TOLERANCE, verify_bundle
from voidprune.schedule import Phase, full_schedule


@contextmanager
def opened_on_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[BundleSession]:
    """As on CUDA: weights lent by torch, a session a graph, steps that are captured."""

    def open_sessions(folder, manifest, *, provider, prepack, as_exported):
        graphs = {phase: folder / graph.file for phase, graph in manifest.graphs.items()}
        return providers._open_on_device(graphs, provider=provider)

    with monkeypatch.context() as patch:
        patch.setattr(session_module, "open_sessions", open_sessions)
        session = BundleSession(bundle.folder)
    assert session.pool is not None
    yield session


@pytest.fixture(params=["llama", "gemma2", "llama-one-kv-head"])
def bundle(request: pytest.FixtureRequest, get_model: GetModel, make_bundle: MakeBundle) -> Bundle:
    model = get_model(request.param)
    return make_bundle(model, mixed(model))


@pytest.fixture
def session(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[BundleSession]:
    with opened_on_device(bundle, monkeypatch) as opened:
        yield opened


def test_it_says_what_a_session_on_the_host_says(bundle: Bundle, session: BundleSession) -> None:
    prompts = random_prompts(bundle.source, [5, 1, 9])
    assert session.generate(prompts, max_new_tokens=12) == bundle.session.generate(prompts, max_new_tokens=12)
    responses = random_prompts(bundle.source, [6, 1, 3], seed=1)
    for found, expected in zip(
        session.score(prompts, responses), bundle.session.score(prompts, responses), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_turns_steps_and_forgetting_leave_the_logits_of_the_host(bundle: Bundle, session: BundleSession) -> None:
    """Steps have a mask as wide as the buffers, prompts one as wide as they need: behind a row's end is nothing for both."""
    first, second = random_prompts(bundle.source, [4, 7]), random_prompts(bundle.source, [3, 2], seed=1)
    steps = np.array(random_prompts(bundle.source, [2, 2], seed=2))
    talks = [running.start(2, max_positions=40) for running in (session, bundle.session)]

    def agree(*results: np.ndarray) -> None:
        np.testing.assert_allclose(*results, atol=TOLERANCE)

    agree(*(talk.prefill(first) for talk in talks))
    for column in (0, 1):
        agree(*(talk.decode(steps[:, column : column + 1]) for talk in talks))
    agree(*(talk.prefill(second) for talk in talks))
    agree(*(talk.decode(steps) for talk in talks))
    for talk in talks:
        talk.rewind(3)
    agree(*(talk.decode(steps[:, :1]) for talk in talks))
    tokens = [talk.decode_greedily(steps[:, 1:]) for talk in talks]
    np.testing.assert_array_equal(*tokens)


def test_a_result_that_is_kept_is_not_overwritten_by_the_next_step(bundle: Bundle, session: BundleSession) -> None:
    talk = session.start(max_positions=20)
    talk.prefill(random_prompts(bundle.source, [4]))
    before = talk.decode(np.array([[5]]))
    kept = before.copy()
    talk.decode(np.array([[6]]))
    np.testing.assert_array_equal(before, kept)


def test_buffers_go_from_one_conversation_to_the_next_of_their_size(bundle: Bundle, session: BundleSession) -> None:
    prompts = random_prompts(bundle.source, [8])
    expected = session.generate(prompts, max_new_tokens=9)
    gc.collect()
    left = session.pool.captures_left
    poisoned = session.start(max_positions=17)
    assert poisoned._on_device is not None
    buffers = poisoned._on_device.tensors
    for tensor in buffers.values():
        tensor.fill_(float("nan"))
    del poisoned
    gc.collect()
    assert session.generate(prompts, max_new_tokens=9) == expected, "what was in them is gone"
    assert session.pool.captures_left == left == MOST_CAPTURES - 1, "steps that were captured serve again"
    addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}
    gc.collect()
    talks = [session.start(max_positions=17) for _ in range(2)]
    places = [{name: tensor.data_ptr() for name, tensor in talk._on_device.tensors.items()} for talk in talks]
    assert places[0] == addresses
    assert all(not tensor.any() for tensor in talks[0]._on_device.tensors.values()), "what may be read is zeros"
    assert not set(places[0].values()) & set(places[1].values()), "two at a time have their own"


def test_where_nothing_more_may_be_captured_steps_are_run_as_they_are(bundle: Bundle, session: BundleSession) -> None:
    session.pool.captures_left = 1
    prompts = random_prompts(bundle.source, [4, 4])
    expected = bundle.session.generate(prompts, max_new_tokens=5)
    talks = [session.start(2, max_positions=12) for _ in range(2)]
    for talk in talks:
        tokens = [talk.prefill_greedily(prompts)]
        for _ in range(4):
            tokens.append(talk.decode_greedily(tokens[-1][:, np.newaxis])[:, -1])
        assert np.stack(tokens, axis=1).tolist() == expected
    captured = [
        binding.is_captured
        for talk in talks
        for (phase, _, _, repeats), binding in talk._on_device.bindings.items()
        if phase is Phase.DECODE and repeats
    ]
    assert captured == [True, False]


@pytest.mark.parametrize("interrupted", ["bind_input", "bind_output"])
def test_an_interrupted_turn_leaves_nothing_that_is_not_bound(
    bundle: Bundle, session: BundleSession, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    """As by Ctrl-C in a chat, which goes on with the same buffers."""
    first, second = random_prompts(bundle.source, [4]), random_prompts(bundle.source, [6], seed=1)
    talks = [running.start(max_positions=30) for running in (session, bundle.session)]
    for talk in talks:
        talk.prefill(first)
        talk.decode(np.array([[5]]))
        talk.decode(np.array([[6]]))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for say in (lambda talk: talk.prefill(second), lambda talk: talk.decode(np.array([[7, 8]]))):
        with monkeypatch.context() as patch:
            patch.setattr(ort.IOBinding, interrupted, stop)
            with pytest.raises(KeyboardInterrupt):
                say(talks[0])
        np.testing.assert_allclose(say(talks[0]), say(talks[1]), atol=TOLERANCE)
    np.testing.assert_allclose(*(talk.decode(np.array([[9]])) for talk in talks), atol=TOLERANCE)


def test_a_first_step_is_not_captured_and_buffers_of_another_size_make_room(
    bundle: Bundle, session: BundleSession
) -> None:
    prompts, responses = random_prompts(bundle.source, [4]), random_prompts(bundle.source, [2], seed=1)
    session.score(prompts, responses)
    assert session.pool.captures_left == MOST_CAPTURES
    session.generate(prompts, max_new_tokens=3)
    assert session.pool.captures_left == MOST_CAPTURES - 1
    gc.collect()
    assert session.pool._spare is not None
    held = weakref.ref(next(iter(session.pool._spare[1].tensors.values())))
    made, make = [], DeviceBuffers.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceBuffers, "make", lambda *args, **how: (made.append(held()), make(*args, **how))[1])
        session.start(2, max_positions=9)
    assert made == [None], "those of the last conversation are gone before there are new ones"


def test_one_graph_for_both_phases_lives_on_a_device_as_well(
    get_model: GetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model("llama")
    schedule = full_schedule(model.identity)
    manifest = export_bundle(
        model.checkpoint, schedule, tmp_path / "one", layout="single", verify=lambda _: None, precision="fp16"
    )
    on_host = BundleSession(tmp_path / "one")
    prompts = random_prompts(model, [5, 2])
    with opened_on_device(Bundle(model, schedule, tmp_path / "one", manifest, on_host), monkeypatch) as session:
        assert session.dtype == np.float16
        assert session.generate(prompts, max_new_tokens=9) == on_host.generate(prompts, max_new_tokens=9)


def test_buffers_are_no_longer_than_the_context(bundle: Bundle, session: BundleSession) -> None:
    context = session.manifest.context_length
    for asked, made in ((1, 128), (context, context), (128, 128), (129, context)):
        talk = session.start(max_positions=asked)
        assert talk.num_positions == made
        assert {tensor.shape[2] for tensor in talk._on_device.tensors.values()} == {made}
        del talk
        gc.collect()  # and its buffers are there for the next one, if they fit


def test_an_input_stays_where_it_is_while_its_shape_does(session: BundleSession) -> None:
    binding = DeviceBinding(session.sessions[Phase.DECODE], device="cpu", capture=3)
    binding.feed_mask([1, 3], 4)
    mask = binding._tensors["attention_mask"]
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    binding.feed_mask([2, 4], 4)
    assert binding._tensors["attention_mask"] is mask
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    binding.feed_mask([5, 4], 5)
    assert binding._tensors["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    tokens = np.array([[7], [8]])
    binding.feed("input_ids", tokens)
    held = binding._tensors["input_ids"]
    tokens[...] = 9
    assert held.tolist() == [[7], [8]], "it is a copy"
    binding.feed("input_ids", tokens)
    assert binding._tensors["input_ids"] is held
    assert held.tolist() == [[9], [9]]


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_head_on_a_device_gives_numbers_of_the_host(kind: torch.dtype) -> None:
    logits_BTV = torch.tensor([[[0.5, 2.0, 2.0], [3.0, 1.0, -1.0]]], dtype=kind)
    head = DeviceHead(3)
    found = head.logits(logits_BTV)
    assert found.dtype == (ml_dtypes.bfloat16 if kind is torch.bfloat16 else np.dtype(str(kind).removeprefix("torch.")))
    np.testing.assert_array_equal(found.astype(np.float32), logits_BTV.float().numpy())
    assert head.likeliest(logits_BTV).tolist() == [[1, 0]]
    logits_BTV.zero_()
    assert found.astype(np.float32).any(), "in memory of their own"
    assert head.join([logits_BTV, logits_BTV], axis=1).shape == (1, 4, 3)


# ---- on a card; where there is none, as far as a CPU goes, so that these are known to run

needs_card = pytest.mark.skipif(default_provider() != "cuda", reason="onnxruntime and torch see no GPU here")
WRITTEN: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int4": {"packing": {"precision": "int4", "activations": "fp16"}},
    "int8": {"packing": {"precision": "int8", "activations": "fp16", "block_size": 128}},
    "standard float32": {"precision": "fp32", "operators": "standard"},
}


@pytest.mark.parametrize(
    ("provider", "written"),
    [
        *(("cpu", written) for written in WRITTEN if written != "bf16"),  # for which onnxruntime has no kernels there
        *(pytest.param("cuda", written, marks=needs_card) for written in WRITTEN),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "phi3"])
def test_graphs_are_right_and_captured_steps_say_the_same(
    get_model: GetModel, tmp_path: Path, name: str, provider: str, written: str
) -> None:
    model, settings = get_model(name), WRITTEN[written]
    schedule = mixed(model)
    packing = settings.get("packing")
    export_bundle(
        model.checkpoint,
        schedule,
        tmp_path / "bundle",
        verify=lambda stage: verify_bundle(stage, source=model.checkpoint, schedule=schedule, provider=provider),
        formats=("onnx",),
        precision=settings.get("precision", "keep"),
        operators=settings.get("operators", "ort"),
        packing=None if packing is None else uniform_packing(num_layers=len(schedule.union), **packing),
    )
    session = BundleSession(tmp_path / "bundle", provider=provider)
    prompts = random_prompts(model, [5, 3])
    said = session.generate(prompts, max_new_tokens=12)
    assert (session.pool is not None) == (provider == "cuda")
    if session.pool is not None:
        assert session.weight_copies == 1
        assert 0 < session.pool.captures_left < MOST_CAPTURES
        session.pool.captures_left, session.pool._spare = 0, None
    assert session.generate(prompts, max_new_tokens=12) == said


@needs_card
def test_a_second_session_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    source = build_model(
        "llama", tmp_path / "source", hidden_size=2048, intermediate_size=8192, num_attention_heads=16, head_dim=128
    )
    schedule = full_schedule(source.identity)
    folder = tmp_path / "bundle"
    export_bundle(source.checkpoint, schedule, folder, verify=lambda _: None, formats=("onnx",), precision="fp16")
    graphs = [folder / "prefill.onnx", folder / "decode.onnx"]
    weights = load_device_weights({graph.name: weight_ranges(graph) for graph in graphs}, device="cuda")
    sessions, free = [], [torch.cuda.mem_get_info()[0]]
    for graph in graphs:
        sessions.append(open_session(graph, folder, provider="cuda", weights=weights.values[graph.name]))
        free.append(torch.cuda.mem_get_info()[0])
    assert weights.num_bytes > 700_000_000
    assert free[1] - free[2] < weights.num_bytes / 4
