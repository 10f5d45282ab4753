"""Text streams with the tokenizer that ships: joined pieces are the whole text, and never half a character or a stop string."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from voidprune.models.pretrained import load_tokenizer
from voidprune.pipeline.models import demo_folder
from voidprune.pipeline.text_stream import TextStream


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, as for rare characters in the vocabularies of GPT-2 and its heirs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@functools.cache
def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Words carry their leading space, which the decoder strips at the start of a text, as SentencePiece does."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁sat", "▁"]
    made = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop=stop)
    return [*(stream.add(token) for token in tokens), stream.finish()]


@given(st.text(max_size=12))
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    tokens = byte_tokenizer()(text)["input_ids"]
    pieces = pieces_of(byte_tokenizer(), tokens)
    assert "".join(pieces) == byte_tokenizer().decode(tokens, clean_up_tokenization_spaces=False) == text
    for piece in pieces:
        assert "\N{REPLACEMENT CHARACTER}" not in piece or "\N{REPLACEMENT CHARACTER}" in text


def test_a_character_that_never_became_whole_is_told_at_the_end() -> None:
    tokens = byte_tokenizer()("aß")["input_ids"]
    assert pieces_of(byte_tokenizer(), tokens[:-1]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert pieces_of(byte_tokenizer(), tokens) == ["a", "", "ß", ""]


@given(st.lists(st.integers(1, 5), max_size=12))
def test_spaces_between_words_are_kept(tokens: list[int]) -> None:
    expected = piece_tokenizer().decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(piece_tokenizer(), tokens)) == expected


@given(st.lists(st.integers(0, 605), max_size=30))
def test_any_tokens_of_the_demo_model(tokens: list[int]) -> None:
    tokenizer = demo_tokenizer()
    expected = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, tokens)) == expected


@functools.cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_folder())


@given(st.text(alphabet="abc", max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    found = [text.find(end) for end in stop if end in text]
    stream = TextStream(byte_tokenizer(), stop=stop)
    told = ""
    for token in byte_tokenizer()(text)["input_ids"]:
        told += stream.add(token)
        if stream.stopped:
            break
    told += stream.finish()
    assert stream.stopped == bool(found)
    if not found:
        assert told == text
    else:  # the first to be complete, which is not always the first to begin
        assert not any(end in told for end in stop)
        assert text.startswith(told)
        assert any(text[len(told) :].startswith(end) for end in stop)


@pytest.mark.parametrize(("text", "told"), [("ab--c", ["a", "b", "", "", ""]), ("a-b-", ["a", "", "-b", "", "-"])])
def test_what_may_become_a_stop_string_is_held_back(text: str, told: list[str]) -> None:
    tokens = byte_tokenizer()(text)["input_ids"]
    assert pieces_of(byte_tokenizer(), tokens, stop=["--"])[: len(told)] == told
