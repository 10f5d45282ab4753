"""Attention by products over buffers is what onnxruntime's own operator computes, whatever it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.conftest import MakeBundle, open_plainly
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import TinyModel, build_model
from voidprune.execution import buffer_attention
from voidprune.execution import session as sessions
from voidprune.execution.buffer_attention import SHORT_PROMPT, rewrite_decode, rewrite_prefill
from voidprune.execution.session import BundleSession
from voidprune.export.rounded_kv import K_STEPS, ROUNDING
from voidprune.schedule import Boundary, full_schedule

HEADS, GROUPS, SIZE = 6, 2, 32
FLOAT, INT8, INT32, INT64 = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT8", "INT32", "INT64"))


def attention_model(
    *, packed: bool, rotary: int, heads: int = HEADS, rounded: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """Two layers of GroupQueryAttention as decode graphs have it. `rotary`: what of a head is turned; `rounded`: K/V in 8 bits."""
    widths = {"query": heads * SIZE, "key": GROUPS * SIZE, "value": GROUPS * SIZE}
    if packed:
        widths = {"query": sum(widths.values())}
    inputs = {name: (FLOAT, ["batch", "tokens", width]) for name, width in widths.items()}
    inputs |= {"input_ids": (INT64, ["batch", "tokens"]), "last": (INT32, ["batch"]), "total": (INT32, [])}
    nodes, constants, tables = [], [], []
    if rotary:
        angles = np.random.default_rng(0).standard_normal((1, rotary // 2)).astype(np.float32)
        places = np.arange(300, dtype=np.float32)[:, np.newaxis]
        constants = [onnx.numpy_helper.from_array(array, name) for name, array in (("a", angles), ("p", places))]
        nodes = [onnx.helper.make_node("Mul", ["p", "a"], ["angles"])]
        nodes += [onnx.helper.make_node(kind, ["angles"], [kind]) for kind in ("Cos", "Sin")]
        tables = ["Cos", "Sin"]
    steps = []
    if rounded:
        random, steps = np.random.default_rng(2), ["key_steps", "value_steps"]
        arrays = [random.uniform(0.01, 0.02, (1, GROUPS, 1, SIZE)).astype(np.float32) for _ in steps]
        constants += map(onnx.numpy_helper.from_array, arrays, steps)
        steps = [*[""] * (K_STEPS - 7 - len(tables)), *steps]
        attributes |= ROUNDING
    outputs = {}
    for layer in range(2):
        cache = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        shape = (INT8 if rounded else FLOAT, ["batch", GROUPS, "positions", SIZE])
        inputs |= dict.fromkeys(cache, shape)
        outputs |= dict.fromkeys(present, shape) | {f"output.{layer}": (FLOAT, ["batch", "tokens", heads * SIZE])}
        fed = ["query", "", ""] if packed else ["query", "key", "value"]
        node = onnx.helper.make_node(
            "GroupQueryAttention",
            [*fed, *cache, "last", "total", *tables, *steps],
            [f"output.{layer}", *present],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=GROUPS,
            do_rotary=int(bool(rotary)),
            **attributes,
        )
        nodes.append(node)
    values = [
        [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in named.items()] for named in (inputs, outputs)
    ]
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(nodes, "attention", *values, constants)
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, path: Path, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    onnx.save(model, path)
    session = open_plainly(path)
    names = [value.name for value in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: array for name, array in feeds.items() if name in known})
    return dict(zip(names, found, strict=True))


def random_feeds(
    model: onnx.ModelProto, lengths: tuple[int, ...], num_tokens: int, *, positions: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of these many tokens before, and as many new ones each. Behind them the buffers hold what must not count."""
    random = np.random.default_rng(1)
    sizes = {"batch": len(lengths), "tokens": num_tokens, "positions": positions}
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
        if kind.elem_type == FLOAT:
            feeds[value.name] = random.standard_normal(shape).astype(np.float32)
        elif kind.elem_type == INT8:
            feeds[value.name] = random.integers(-128, 128, shape).astype(np.int8)
    feeds["input_ids"] = np.zeros((len(lengths), num_tokens), np.int64)
    feeds["last"] = np.array([length + num_tokens - 1 for length in lengths], np.int32)
    feeds["total"] = np.array(max(lengths) + num_tokens, np.int32)
    return feeds


SETTINGS: list[dict[str, Any]] = [
    {"packed": True, "rotary": SIZE},
    {"packed": False, "rotary": SIZE},
    {"packed": True, "rotary": 0},
    {"packed": False, "rotary": 0, "scale": 0.3},
    {"packed": True, "rotary": 16},
    {"packed": True, "rotary": SIZE, "rotary_interleaved": 1},
    {"packed": True, "rotary": SIZE, "local_window_size": 3},
    {"packed": True, "rotary": SIZE, "softcap": 2.0, "local_window_size": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("lengths", "num_tokens"), [((0,), 1), ((7,), 1), ((7,), 4), ((7, 2, 5), 1)])
def test_outputs_and_buffers_are_those_of_the_operator(
    tmp_path: Path, settings: dict[str, Any], lengths: tuple[int, ...], num_tokens: int
) -> None:
    model = attention_model(**settings)
    feeds = random_feeds(model, lengths, num_tokens, positions=12)
    expected = run(model, tmp_path / "operator.onnx", feeds)
    assert rewrite_decode(model, least_width=0) == HEADS
    assert "GroupQueryAttention" not in {node.op_type for node in model.graph.node}
    assert_same(run(model, tmp_path / "products.onnx", feeds), expected, lengths, num_tokens)


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS, {"packed": True, "rotary": SIZE, "heads": GROUPS}, *({**one, "rounded": True} for one in SETTINGS)],
    ids=str,
)
@pytest.mark.parametrize(
    ("lengths", "num_tokens", "positions"),
    [((0,), SHORT_PROMPT, 96), ((0,), 97, 97), ((0, 0), 128, 140), ((50,), 161, 250), ((3,), 1, 5)],
)
def test_long_prompts_attend_in_chunks_to_the_same_end(
    tmp_path: Path, settings: dict[str, Any], lengths: tuple[int, ...], num_tokens: int, positions: int
) -> None:
    """Whole chunks, chunks that overlap, buffers that end with the prompt, tokens before it; and prompts that are short."""
    model = attention_model(**settings)
    feeds = random_feeds(model, lengths, num_tokens, positions=positions)
    expected = run(model, tmp_path / "operator.onnx", feeds)
    rewrite_prefill(model, least_width=0)
    assert [node.op_type for node in model.graph.node].count("If") == 2
    found = run(model, tmp_path / "chunks.onnx", feeds)
    assert_same(found, expected, lengths, num_tokens)
    exact = all((found[name] == values).all() for name, values in expected.items() if name.startswith("output"))
    assert exact == (num_tokens <= SHORT_PROMPT)


def test_beyond_many_keys_the_operator_attends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tokens and those before them count together."""
    monkeypatch.setattr(buffer_attention, "MANY_KEYS", 150)
    model = attention_model(packed=True, rotary=SIZE)
    feeds = {length: random_feeds(model, (length,), 120, positions=160) for length in (30, 31)}
    expected = {length: run(model, tmp_path / "operator.onnx", fed) for length, fed in feeds.items()}
    rewrite_prefill(model, least_width=0)
    for length, fed in feeds.items():
        found = run(model, tmp_path / "chunks.onnx", fed)
        assert_same(found, expected[length], (length,), 120)
        exact = all((found[name] == expected[length][name]).all() for name in ("output.0", "output.1"))
        assert exact == (length + 120 > 150)


def test_with_keys_in_8_bits_the_operator_never_attends_to_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer_attention, "MANY_KEYS", 100)
    model = attention_model(packed=True, rotary=SIZE, rounded=True)
    feeds = random_feeds(model, (30,), 120, positions=160)
    expected = run(model, tmp_path / "operator.onnx", feeds)
    rewrite_prefill(model, least_width=0)
    found = run(model, tmp_path / "chunks.onnx", feeds)
    assert_same(found, expected, (30,), 120)
    assert not all((found[name] == expected[name]).all() for name in ("output.0", "output.1"))


def assert_same(
    found: dict[str, np.ndarray[Any, Any]],
    expected: dict[str, np.ndarray[Any, Any]],
    lengths: tuple[int, ...],
    num_tokens: int,
) -> None:
    for name, values in expected.items():
        if name.startswith("output"):
            np.testing.assert_allclose(found[name], values, atol=2e-6, rtol=1e-5)
            continue
        for row, length in enumerate(lengths):  # the operator leaves zeros behind them where buffers are not shared
            used = length + num_tokens
            np.testing.assert_allclose(found[name][row, :, :used], values[row, :, :used], atol=1e-6)


def test_what_all_layers_share_is_computed_once() -> None:
    model = attention_model(packed=True, rotary=SIZE, local_window_size=3)
    rewrite_decode(model, least_width=0)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Tile"), kinds.count("Softmax")) == (1, 2)


def test_heads_of_their_own_halves_and_narrow_layers_are_left_to_the_operator() -> None:
    alone = attention_model(packed=True, rotary=SIZE, heads=GROUPS)
    half = attention_model(packed=True, rotary=SIZE)
    for value in half.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    narrow = attention_model(packed=True, rotary=SIZE)
    rounded = attention_model(packed=True, rotary=SIZE, rounded=True)
    for model, width in ((alone, 0), (half, 0), (rounded, 0), (narrow, HEADS * SIZE + 1)):
        before = model.SerializeToString(deterministic=True)
        assert rewrite_decode(model, least_width=width) == 0
        assert model.SerializeToString(deterministic=True) == before
    for model, width in ((half, 0), (narrow, HEADS * SIZE + 1)):
        rewrite_prefill(model, least_width=width)
        assert "If" not in {node.op_type for node in model.graph.node}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return build_model("llama", tmp_path_factory.mktemp("wide"), **sizes)


def test_wide_bundles_answer_as_exported(wide: TinyModel, make_bundle: MakeBundle) -> None:
    """Phases that differ, a long prompt, a second turn, rows of unequal length."""
    folder = make_bundle(wide, mixed(wide)).folder
    mended, exported = BundleSession(folder), BundleSession(folder, as_exported=True)
    assert (mended.scored_heads, exported.scored_heads) == (8, 0)
    assert BundleSession(folder, prepack=False).scored_heads == 0
    for lengths in ((110,), (100, 3)):
        found = []
        for session in (mended, exported):
            conversation = session.start(len(lengths), max_positions=150)
            logits = [conversation.prefill(random_prompts(wide, lengths))]
            logits += [conversation.decode(np.full((len(lengths), 1), token))[:, -1] for token in (5, 6, 7)]
            logits.append(conversation.prefill(random_prompts(wide, [20] * len(lengths), seed=1)))
            found.append(np.stack(logits))
        np.testing.assert_allclose(*found, atol=1e-4)
        assert (found[0] != found[1]).any()


@pytest.mark.parametrize("boundary", list(Boundary))
def test_every_family_answers_as_exported(
    tiny_model: TinyModel, make_bundle: MakeBundle, boundary: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns of rows of unequal length and a single one, however narrow the layers and short the prompts."""
    folder = make_bundle(tiny_model, mixed(tiny_model, boundary=boundary)).folder
    monkeypatch.setattr(buffer_attention, "LEAST_WIDTH", 0)
    monkeypatch.setattr(buffer_attention, "SHORT_PROMPT", 2)
    monkeypatch.setattr(buffer_attention, "CHUNK", 4)
    for lengths in ((5, 3), (21,)):
        found = []
        for session in (BundleSession(folder), BundleSession(folder, as_exported=True)):
            conversation = session.start(len(lengths), max_positions=64)
            logits = []
            for seed in (1, 2):
                logits.append(conversation.prefill(random_prompts(tiny_model, lengths, seed=seed)))
                tokens = np.array(random_prompts(tiny_model, [3] * len(lengths), seed=3))
                logits += list(conversation.decode(tokens).transpose(1, 0, 2))
                logits.append(conversation.decode(tokens[:, :1])[:, 0])
            found.append(np.stack(logits))
        np.testing.assert_allclose(*found, atol=1e-4)
        assert (found[0] != found[1]).any()


# ---- buffers


def test_growing_that_is_interrupted_changes_nothing(
    llama: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    conversation, other = session.start(max_positions=150), session.start(max_positions=150)
    for one in (conversation, other):
        one.prefill([[5, 6, 7]])
    made, zeros = [], np.zeros

    def fail_the_second_time(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) == 2:
            raise KeyboardInterrupt
        return zeros(*arguments)

    longer = random_prompts(llama, [80])
    with monkeypatch.context() as patched:
        patched.setattr(sessions.np, "zeros", fail_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            conversation.prefill(longer)
    assert conversation.lengths == [3]
    np.testing.assert_array_equal(conversation.decode(np.array([[9]])), other.decode(np.array([[9]])))
    np.testing.assert_array_equal(conversation.prefill(longer), other.prefill(longer))


def test_buffers_get_shorter_when_much_is_forgotten(llama: TinyModel, make_bundle: MakeBundle) -> None:
    session = make_bundle(llama, full_schedule(llama.identity)).session
    conversation, other = session.start(max_positions=160), session.start(max_positions=160)
    (long,) = random_prompts(llama, [120])
    conversation.prefill([long])
    before = conversation.num_positions
    assert 120 < before <= 160
    conversation.rewind(110)
    assert conversation.num_positions == before
    conversation.rewind(6)
    assert conversation.num_positions < before / 2
    other.prefill([long[:6]])
    np.testing.assert_allclose(conversation.decode(np.array([[9]])), other.decode(np.array([[9]])), atol=1e-5)


def test_buffers_that_grow_hold_what_was_in_them(llama: TinyModel, make_bundle: MakeBundle) -> None:
    """Two rows of unequal length, over several sizes of the buffers, beside buffers that are long enough from the start."""
    session = make_bundle(llama, mixed(llama)).session
    prompts = random_prompts(llama, (9, 4))
    growing, ready = session.start(2, max_positions=160), session.start(2, max_positions=160)
    ready._make_buffers(160)
    sizes = set()
    for turn in range(3):
        np.testing.assert_allclose(growing.prefill(prompts), ready.prefill(prompts), atol=1e-5)
        for token in range(40):
            tokens = np.full((2, 1), 5 + (token + turn) % 50)
            np.testing.assert_allclose(growing.decode(tokens), ready.decode(tokens), atol=1e-5)
            sizes.add(growing.num_positions)
    assert len(sizes) > 2
    assert max(sizes) <= 160
    assert growing.tokens == ready.tokens


def test_buffers_are_no_longer_than_the_conversation_may_be(llama: TinyModel, make_bundle: MakeBundle) -> None:
    conversation = make_bundle(llama, full_schedule(llama.identity)).session.start(max_positions=10)
    conversation.prefill([[5, 6, 7]])
    assert conversation.num_positions == 10


def test_many_tokens_are_decoded_in_pieces(
    wide: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_bundle(wide, full_schedule(wide.identity)).session
    tokens = np.array(random_prompts(wide, (11, 11)))
    found = []
    for values in (sessions.SCORE_VALUES, 3 * session.scored_heads * 32, 1):
        monkeypatch.setattr(sessions, "SCORE_VALUES", values)
        conversation = session.start(2, max_positions=32)
        conversation.prefill([[5, 6, 7], [8, 9]])
        found.append(conversation.decode(tokens))
        assert conversation.lengths == [14, 13]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
