"""A chat: turns by the model's own template, and K/V that are kept from turn to turn.

A template renders the whole history each turn, and some rewrite it (they drop what a model thought, or strip blanks). So the tokens
of the history are compared with those whose K/V are there: what is common stays, the rest is rewound and processed again.
"""

from __future__ import annotations

from collections.abc import Iterator

from voidprune.errors import ContextLengthError, ModelError
from voidprune.execution.generation import Ending, common_prefix
from voidprune.models.pretrained import Message
from voidprune.pipeline.generation import Speaker, Style, check_single_turn, encode_prompt, stream_texts

DEFAULT_POSITIONS = 8192
"""Positions of K/V that a chat reserves when nobody says how many, at most."""


class Chat:
    """Turns between a user and a model. `ending` says what ended the last response, None where it was interrupted."""

    def __init__(
        self,
        speaker: Speaker,
        style: Style,
        *,
        system: str | None = None,
        raw: bool = False,
        max_positions: int | None = None,
    ) -> None:
        """With `raw`, each turn is plain text behind the one before it. `max_positions` defaults to the context, within reason.

        Raises ModelError under a single-turn schedule and for a model without a template, and ContextLengthError.
        """
        check_single_turn(speaker)
        if not raw and getattr(speaker.tokenizer, "chat_template", None) is None:
            raise ModelError(
                f"{speaker.name} has no chat template, so nothing says how it was taught to take turns",
                hint="add --raw: then each turn is plain text behind the one before it",
            )
        if max_positions is not None and max_positions > speaker.context_length:
            raise ContextLengthError(
                f"{max_positions} positions are asked for; the model's context is {speaker.context_length}",
                hint="leave --context out, or lower it",
            )
        self.max_positions = max_positions or min(speaker.context_length, DEFAULT_POSITIONS)
        self.ending: Ending | None = None
        self.num_processed = 0
        self.is_full = False
        self._speaker, self._style, self._raw = speaker, style, raw
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._conversation = speaker.start(max_positions=self.max_positions)
        self.messages = list(self._first)

    def clear(self) -> None:
        """Begin anew."""
        self.messages = list(self._first)
        self.is_full = False
        self._conversation.rewind(0)

    def say(self, text: str) -> Iterator[str]:
        """The answer to a turn of the user, in pieces. Closing the iterator, or an interruption, ends the answer where it is.

        Raises ContextLengthError where the turn does not fit; the chat is then what it was before. `num_processed` is how many
        tokens had to be processed before the answer could begin; `is_full` says that it ended for want of room.
        """
        turn: Message = {"role": "user", "content": text}
        tokens = encode_prompt(self._speaker.tokenizer, [*self.messages, turn], raw=self._raw)
        room = self.max_positions - len(tokens)
        if room < 1:
            raise ContextLengthError(
                f"with this turn the chat has {len(tokens)} tokens; there is room for {self.max_positions}",
                hint="/clear begins a new chat",
            )
        max_new_tokens = min(room, self._style.max_new_tokens or room)
        known = min(common_prefix(self._conversation.tokens[0], tokens), len(tokens) - 1)
        self._conversation.rewind(known)
        self.num_processed = len(tokens) - known
        self.ending, self.is_full = None, False
        said: list[str] = []
        pieces = stream_texts(
            self._speaker, self._conversation, [tokens[known:]], self._style, max_new_tokens=max_new_tokens
        )
        try:
            for piece in pieces:
                self.ending = piece.ending
                said.append(piece.text)
                yield piece.text
        finally:
            if said:
                self.messages += [turn, {"role": "assistant", "content": "".join(said)}]
            self.is_full = self.ending is Ending.LENGTH and max_new_tokens == room
