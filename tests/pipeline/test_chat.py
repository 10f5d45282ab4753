"""Turns keep the K/V of the turns before, whatever the template makes of the history; limits are said, and lose nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from voidprune.errors import ContextLengthError, DatasetError, ModelError
from voidprune.execution.generation import Ending
from voidprune.execution.sampling import Sampling
from voidprune.export.bundle import export_bundle
from voidprune.models.pretrained import encode_chat
from voidprune.pipeline.chat import Chat
from voidprune.pipeline.generation import Speaker, Style, open_speaker
from voidprune.pipeline.models import open_model
from voidprune.schedule import LayerAction, Schedule

A = LayerAction
FIRST, SECOND = "Sort from smallest to largest: 91, 97, 73", "Sort from smallest to largest: 4, 2, 8"


def half_prefill(*, single_turn: bool = False) -> Schedule:
    unread = A.SKIP if single_turn else A.FULL
    return Schedule(
        model=open_model("demo").identity,
        prefill=(A.FULL,) * 6 + (A.KV_ONLY,) * 6,
        decode=(unread,) + (A.FULL,) * 11,
        single_turn=single_turn,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a bundle whose phases differ."""
    target = tmp_path_factory.mktemp("chat") / "bundle"
    export_bundle(open_model("demo"), half_prefill(), target, verify=lambda _: None)
    return target


@pytest.fixture(params=["bundle", "reference"])
def speaker(request: pytest.FixtureRequest, folder: Path) -> Iterator[Speaker]:
    with open_either(request.param, folder) as opened:
        yield opened


@contextmanager
def open_either(kind: str, folder: Path) -> Iterator[Speaker]:
    schedule = half_prefill() if kind == "reference" else None
    with open_speaker("demo" if schedule else str(folder), schedule=schedule, provider="cpu") as opened:
        yield opened


def say(chat: Chat, text: str) -> str:
    return "".join(chat.say(text))


def test_only_what_is_new_is_processed(speaker: Speaker) -> None:
    chat = Chat(speaker, Style())
    whole = len(encode_chat(speaker.tokenizer, [{"role": "user", "content": FIRST}]))
    answer = say(chat, FIRST)
    assert answer.startswith("Answer:")
    assert chat.num_processed == whole
    assert chat.ending is Ending.END_TOKEN
    assert say(chat, SECOND).startswith("Answer:")
    turn = len(encode_chat(speaker.tokenizer, [{"role": "user", "content": SECOND}])) - 1  # but for the start token
    assert chat.num_processed == 1 + turn, "the end token of the first answer, and the second turn"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == answer


def test_bundle_and_reference_say_the_same(folder: Path) -> None:
    style = Style(sampling=Sampling(0.8, seed=2), max_new_tokens=24)
    told = []
    for kind in ("bundle", "reference"):
        with open_either(kind, folder) as speaker:
            chat = Chat(speaker, style)
            told.append([say(chat, text) for text in (FIRST, SECOND, "Is 9 larger than 3?")])
    assert told[0] == told[1]


def test_a_template_that_rewrites_the_history_is_followed(speaker: Speaker) -> None:
    """Like those that drop what a model thought: the first answer becomes another once it is history."""
    template = speaker.tokenizer.chat_template
    changed = "{%- if message['role'] == 'assistant' -%}gone{%- else -%}{{- message['content'] -}}{%- endif -%}"
    part = "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    assert part in template
    speaker.tokenizer.chat_template = template.replace(
        part, "{{- '<|' + message['role'] + '|>' -}}" + changed + "{{- '<|end|>' -}}"
    )
    chat = Chat(speaker, Style())
    say(chat, FIRST)
    kept = len(encode_chat(speaker.tokenizer, [{"role": "user", "content": FIRST}]))
    whole = len(encode_chat(speaker.tokenizer, [*chat.messages, {"role": "user", "content": SECOND}]))
    say(chat, SECOND)
    assert chat.num_processed == whole - kept
    third = "Is 9 larger than 3?"
    expected = fresh_text(speaker, chat, third)
    assert say(chat, third) == expected


def fresh_text(speaker: Speaker, chat: Chat, text: str) -> str:
    """What a chat says that has to process its whole history at once. In this schedule that is what it says anyway."""
    fresh = Chat(speaker, Style())
    fresh.messages = list(chat.messages)
    return say(fresh, text)


def test_an_answer_that_is_left_in_the_middle_is_history_as_far_as_it_went(speaker: Speaker) -> None:
    chat = Chat(speaker, Style())
    answer = chat.say(FIRST)
    part = next(answer) + next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert chat.ending is None
    assert chat.messages[-1] == {"role": "assistant", "content": part}
    assert say(chat, SECOND).startswith("Answer:")


def test_clear_begins_anew(speaker: Speaker) -> None:
    chat = Chat(speaker, Style())
    first = say(chat, FIRST)
    say(chat, SECOND)
    chat.clear()
    assert chat.messages == []
    assert say(chat, FIRST) == first
    assert chat.num_processed == len(encode_chat(speaker.tokenizer, [{"role": "user", "content": FIRST}]))


def test_a_full_context_is_said_and_what_is_too_long_changes_nothing(speaker: Speaker) -> None:
    turn = len(encode_chat(speaker.tokenizer, [{"role": "user", "content": FIRST}]))
    chat = Chat(speaker, Style(), max_positions=turn + 4)
    cut = say(chat, FIRST)
    assert chat.is_full
    whole = say(Chat(speaker, Style()), FIRST)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)
    history = list(chat.messages)
    with pytest.raises(ContextLengthError, match=rf"the chat has \d+ tokens; there is room for {turn + 4}") as caught:
        say(chat, SECOND)
    assert caught.value.hint == "/clear begins a new chat"
    assert chat.messages == history
    chat.clear()
    assert not chat.is_full
    assert say(chat, FIRST) == cut


def test_an_answer_that_was_to_be_short_is_no_full_context(speaker: Speaker) -> None:
    chat = Chat(speaker, Style(max_new_tokens=3))
    say(chat, FIRST)
    assert chat.ending is Ending.LENGTH
    assert not chat.is_full


def test_more_positions_than_the_context_has(speaker: Speaker) -> None:
    with pytest.raises(ContextLengthError, match="513 positions are asked for; the model's context is 512"):
        Chat(speaker, Style(), max_positions=513)
    assert Chat(speaker, Style()).max_positions == 512


def test_a_system_message_goes_to_the_template(speaker: Speaker) -> None:
    chat = Chat(speaker, Style(), system="Be brief.")
    with pytest.raises(DatasetError, match="trained on user and assistant messages only"):
        say(chat, FIRST)


def test_a_model_without_a_template_needs_raw(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with open_speaker(str(bare), provider="cpu") as speaker:
        with pytest.raises(ModelError, match="has no chat template") as caught:
            Chat(speaker, Style())
        assert str(caught.value.hint).startswith("add --raw")
        chat = Chat(speaker, Style(max_new_tokens=8), raw=True)
        say(chat, FIRST)
        say(chat, SECOND)
        assert chat.num_processed < len(speaker.tokenizer(FIRST + SECOND)["input_ids"])


def test_single_turn_schedules_do_not_chat(tmp_path: Path) -> None:
    export_bundle(open_model("demo"), half_prefill(single_turn=True), tmp_path / "bundle", verify=lambda _: None)
    with open_speaker(str(tmp_path / "bundle"), provider="cpu") as speaker:
        with pytest.raises(ModelError, match="has a single-turn schedule") as caught:
            Chat(speaker, Style())
        assert caught.value.hint == "give one --prompt, or plan without --single-turn"


def test_stop_strings_end_an_answer(speaker: Speaker) -> None:
    whole = say(Chat(speaker, Style()), FIRST)
    chat = Chat(speaker, replace(Style(), stop=(",",)))
    assert say(chat, FIRST) == whole[: whole.index(",")]
    assert chat.ending is Ending.STOPPED
