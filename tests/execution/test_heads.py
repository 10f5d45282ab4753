"""The likeliest token from a head in 8 bits is that of the whole head, whatever is in it; and heads leave their graphs unharmed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import MakeBundle
from tests.execution.test_session import mixed, random_prompts
from tests.tiny_models import TinyModel
from voidprune.execution import detached_head, heads
from voidprune.execution.detached_head import BLOCK_SIZE, MOST_ROWS, DetachedHead, find_common_head
from voidprune.execution.heads import ScreenedHead, WholeHead
from voidprune.execution.session import BundleSession
from voidprune.schedule import full_schedule

Array = np.ndarray[Any, Any]
WIDTH = 3 * BLOCK_SIZE


def screened(folder: Path, table_VD: Array, *, tail: tuple[float | None, ...] = ()) -> ScreenedHead:
    """A head that begins somewhere in a file."""
    (folder / "weights").write_bytes(bytes(64) + table_VD.astype(np.float32).tobytes())
    return ScreenedHead(folder, DetachedHead("weights", 64, *table_VD.shape, tail))


def opened(head: ScreenedHead) -> set[str]:
    return {"_whole", "_screening"} & vars(head).keys()


def ordinary(random: np.random.Generator) -> Array:
    return random.standard_normal((500, WIDTH)).astype(np.float32)


def of_all_lengths(random: np.random.Generator) -> Array:
    """Some rows of zeros, some a million times as long as others."""
    table_VD = ordinary(random) * 10.0 ** random.integers(-3, 4, (500, 1))
    table_VD[random.integers(0, 500, 20)] = 0
    return table_VD.astype(np.float32)


def with_outliers(random: np.random.Generator) -> Array:
    """One number of many blocks is far larger than all others, which are rounded to nothing beside it."""
    return np.where(random.random((500, WIDTH)) < 0.02, 300, 1) * ordinary(random)


def nearly_alike(random: np.random.Generator) -> Array:
    """Rows that differ less than 8 bits can tell."""
    return ordinary(random)[:1] + np.float32(1e-3) * ordinary(random)


def of_whole_numbers(random: np.random.Generator) -> Array:
    """Rows that their copies are: all of the error is that of the hidden states."""
    table_VD = random.integers(-127, 128, (500, WIDTH))
    table_VD[:, ::BLOCK_SIZE] = 127
    return table_VD.astype(np.float32)


@pytest.mark.parametrize("make_table", [ordinary, of_all_lengths, with_outliers, nearly_alike, of_whole_numbers])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 4), (3, 3)])
def test_the_token_is_that_of_the_whole_head(tmp_path: Path, make_table: Any, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    table_VD = make_table(random)
    head = screened(tmp_path, table_VD)
    for _ in range(30):
        hidden_BTD = random.standard_normal((*shape, WIDTH)).astype(np.float32)
        hidden_BTD[..., 5] *= random.choice([1, 100])  # activations have outliers, too
        products_BTV = hidden_BTD.astype(np.float64) @ table_VD.astype(np.float64).T
        found_BT = head.likeliest(hidden_BTD)
        assert found_BT.shape == shape
        best_BT = products_BTV.max(-1)
        reached_BT = np.take_along_axis(products_BTV, found_BT[..., np.newaxis], -1)[..., 0]
        np.testing.assert_allclose(reached_BT, best_BT, rtol=1e-5)  # what float32 sums cannot tell apart
    assert head.keeps_bounds
    assert opened(head) == ({"_screening"} if shape[0] * shape[1] <= MOST_ROWS else {"_whole"})


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-8, 1.0, 1e6]), sharpness=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_bounds_hold_for_any_table(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float, sharpness: int
) -> None:
    random = np.random.default_rng(seed)
    table_VD = (scale * ordinary(random) ** sharpness).astype(np.float32)
    head = screened(tmp_path_factory.mktemp("head"), table_VD)
    hidden_BTD = (random.standard_normal((4, 1, WIDTH)) ** sharpness).astype(np.float32)
    products_BTV = hidden_BTD.astype(np.float64) @ table_VD.astype(np.float64).T
    reached_BTV = np.take_along_axis(products_BTV, head.likeliest(hidden_BTD)[..., np.newaxis], -1)
    np.testing.assert_allclose(reached_BTV[..., 0], products_BTV.max(-1), rtol=1e-5)
    assert head.keeps_bounds


def test_of_equals_the_first_is_taken(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table_VD = ordinary(random)
    hidden_BTD = table_VD[np.newaxis, [37]]
    table_VD[[90, 411]] = table_VD[37]
    assert screened(tmp_path, table_VD).likeliest(hidden_BTD).tolist() == [[37]]


def test_of_logits_that_a_cap_made_equal_the_first_is_taken(tmp_path: Path) -> None:
    """Products of 50 and more are all the same behind it, in either head."""
    table_VD = np.zeros((200, WIDTH), np.float32)
    table_VD[[20, 60, 150], 0] = 50, 70, 60
    head = screened(tmp_path, table_VD, tail=(1.0, None, 2.0))
    hidden_BTD = np.zeros((1, 1, WIDTH), np.float32)
    hidden_BTD[..., 0] = 1
    assert head.logits(hidden_BTD).argmax(-1).tolist() == [[20]]
    assert head.likeliest(hidden_BTD).tolist() == [[60]]


def test_few_rows_are_multiplied_and_logits_are_opened_for_themselves(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table_VD = ordinary(random)
    head = screened(tmp_path, table_VD)
    hidden_BTD = random.standard_normal((1, 1, WIDTH)).astype(np.float32)
    assert not opened(head)
    head.likeliest(hidden_BTD)
    assert opened(head) == {"_screening"}
    found = head._screening.run(None, {"hidden": hidden_BTD[0]})
    assert 1 <= found[0][0] == len(found[1]) < 25
    np.testing.assert_allclose(head.logits(hidden_BTD), hidden_BTD @ table_VD.T, atol=1e-4)
    assert opened(head) == {"_screening", "_whole"}


def test_what_follows_the_product_leaves_its_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table_VD = ordinary(random)
    head = screened(tmp_path, table_VD, tail=(0.5, 1 / 3, None, 3.0))
    hidden_BTD = random.standard_normal((2, 3, WIDTH)).astype(np.float32) / 10
    expected_BTV = 3 * np.tanh(hidden_BTD @ table_VD.T / 6)
    np.testing.assert_allclose(head.logits(hidden_BTD), expected_BTV, atol=1e-5)
    np.testing.assert_array_equal(head.likeliest(hidden_BTD), expected_BTV.argmax(-1))


def test_where_bounds_tell_nothing_the_whole_head_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows alike, of which more are in question than are multiplied by themselves; and hidden states that are no numbers."""
    monkeypatch.setattr(heads, "MOST_CANDIDATES", 100)
    alike = screened(tmp_path, np.ones((500, WIDTH)))
    assert alike.likeliest(np.ones((1, 1, WIDTH), np.float32)).tolist() == [[0]]
    assert opened(alike) == {"_screening", "_whole"}
    assert alike.keeps_bounds
    broken = screened(tmp_path, ordinary(np.random.default_rng(0)))
    hidden_BTD = np.full((1, 1, WIDTH), np.nan, np.float32)
    assert broken.likeliest(hidden_BTD).tolist() == broken.logits(hidden_BTD).argmax(-1).tolist()
    for strange in (np.nan, np.inf):
        hidden_BTD = np.random.default_rng(1).standard_normal((2, 1, WIDTH)).astype(np.float32)
        hidden_BTD[1, 0, 3] = strange
        np.testing.assert_array_equal(broken.likeliest(hidden_BTD), broken.logits(hidden_BTD).argmax(-1))
        assert broken.keeps_bounds


def test_an_operator_that_keeps_no_bounds_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_SLACK", 1e-3)
    random = np.random.default_rng(0)
    table_VD = nearly_alike(random)
    head = screened(tmp_path, table_VD)
    hidden_BTD = random.standard_normal((1, 1, WIDTH)).astype(np.float32)
    expected = (hidden_BTD @ table_VD.T).argmax(-1)
    np.testing.assert_array_equal(head.likeliest(hidden_BTD), expected)
    assert not head.keeps_bounds
    vars(head)["_screening"] = None
    np.testing.assert_array_equal(head.likeliest(hidden_BTD), expected)


# ---- bundles


def test_every_family_says_the_same_by_either_head(
    tiny_model: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tokens and logits, two turns, rows of unequal length; as exported, and with the head apart."""
    folder = make_bundle(tiny_model, mixed(tiny_model)).folder  # with a session that others use: nothing is patched yet
    monkeypatch.setattr(detached_head, "LEAST_BYTES", 0)
    apart, exported = BundleSession(folder), BundleSession(folder, as_exported=True)
    in_blocks = json.loads((folder / "config.json").read_bytes())["hidden_size"] % BLOCK_SIZE == 0
    assert apart.head.is_screened == in_blocks
    assert not exported.head.is_screened
    assert apart.vocab_size == exported.vocab_size
    prompts = random_prompts(tiny_model, (5, 3))
    logits, tokens = [], []
    for session in (apart, exported):
        conversation = session.start(2, max_positions=40)
        logits += [conversation.prefill(prompts), conversation.decode(np.full((2, 1), 5))[:, 0]]
        logits.append(conversation.decode(np.full((2, 3), 6))[:, -1])
        said = conversation.prefill_greedily(random_prompts(tiny_model, (2, 4), seed=1))[:, np.newaxis]
        tokens.append([said, *(said := conversation.decode_greedily(said) for _ in range(6))])
    for first, second in zip(logits[:3], logits[3:], strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
    np.testing.assert_array_equal(*tokens)
    assert apart.generate(prompts, max_new_tokens=8) == exported.generate(prompts, max_new_tokens=8)
    assert not isinstance(apart.head, ScreenedHead) or apart.head.keeps_bounds


def test_small_heads_packed_ones_and_unpacked_graphs_keep_their_head(
    llama: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(llama, full_schedule(llama.identity))
    assert isinstance(BundleSession(bundle.folder).head, WholeHead)
    monkeypatch.setattr(detached_head, "LEAST_BYTES", 0)
    assert isinstance(BundleSession(bundle.folder).head, ScreenedHead)
    assert isinstance(BundleSession(bundle.folder, prepack=False).head, WholeHead)
    monkeypatch.setattr(detached_head, "MOST_SCREENED_BYTES", 100)
    assert isinstance(BundleSession(bundle.folder).head, WholeHead)


def test_graphs_that_end_in_different_ways_have_no_common_head(
    llama: TinyModel, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(llama, full_schedule(llama.identity)).folder
    monkeypatch.setattr(detached_head, "LEAST_BYTES", 0)
    graphs = [onnx.load(folder / f"{phase}.onnx", load_external_data=False).graph for phase in ("prefill", "decode")]
    head = find_common_head(graphs)
    assert head is not None
    assert (head.vocab_size, head.tail) == (llama.checkpoint.architecture.vocab_size, ())
    (last,) = (node for node in graphs[0].node if "logits" in node.output)
    last.output[0] = "product"
    for number, factor in enumerate((2.0, -1.0)):
        graphs[0].initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), f"factor.{number}"))
        nodes = [*graphs[0].node, onnx.helper.make_node("Mul", ["product", f"factor.{number}"], ["logits"])]
        changed = onnx.helper.make_graph(
            nodes, "prefill", graphs[0].input, graphs[0].output, list(graphs[0].initializer)
        )
        assert find_common_head([changed, graphs[1]]) is None
        twice = find_common_head([changed, changed])
        assert (twice and twice.tail) == ((2.0,) if factor > 0 else None)
