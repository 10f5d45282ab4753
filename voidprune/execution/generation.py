"""Responses, token by token: the one loop for everything that has K/V, whichever runtime is behind it. numpy only.

Token ids in, token ids out. What the tokens spell, and whether that ends a response, is the business of who has the tokenizer.
Shapes: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

from voidprune.errors import ContextLengthError, ModelError
from voidprune.execution.sampling import Sampling, draw_scores, row_dice

Array = np.ndarray[Any, Any]


class Conversation(Protocol):
    """K/V of some token sequences: `execution.session.Conversation`, `execution.reference_conversation`."""

    tokens: list[list[int]]
    """Of each row, those whose K/V are there."""
    max_positions: int
    """How many tokens a row may have."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Process one prompt a row, behind what is there already. Returns the logits of the last tokens, [B, V]."""

    def decode(self, tokens_BT: Array) -> Array:
        """Process T generated tokens a row. Returns the logits after each, [B, T, V]."""

    def prefill_greedily(self, prompts: Sequence[Sequence[int]]) -> Array:
        """As `prefill`, but returns the likeliest next tokens, [B]: the first of equals."""
        return np.asarray(self.prefill(prompts).argmax(-1))

    def decode_greedily(self, tokens_BT: Array) -> Array:
        """As `decode`, but returns the likeliest next tokens, [B, T]."""
        return np.asarray(self.decode(tokens_BT).argmax(-1))

    def rewind(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens of each row."""


class Ending(StrEnum):
    """What ended a response."""

    END_TOKEN = "end token"
    STOPPED = "stopped"
    LENGTH = "length"


class Responses:
    """Responses to one prompt a row, in the making. Iterate for (row, token), end tokens included; `stop` ends a row early.

    The last token of a response is not processed: its K/V come with the next prompt, if there is one.
    """

    def __init__(
        self,
        conversation: Conversation,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> None:
        """Raises ContextLengthError, before anything is run, where a response of `max_new_tokens` would not fit, and ModelError."""
        if not all(prompts):
            raise ModelError("a prompt has no tokens", hint="give at least one token")
        histories = [[*before, *prompt] for before, prompt in zip(conversation.tokens, prompts, strict=True)]
        if (longest := max(map(len, histories)) + max_new_tokens) > conversation.max_positions:
            raise ContextLengthError(
                f"{longest} tokens do not fit into K/V buffers of {conversation.max_positions} positions",
                hint="ask for fewer new tokens, or start the conversation with more positions",
            )
        self.conversation = conversation
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.end_tokens = frozenset(end_tokens)
        self.sampling = sampling
        self.dice = [] if sampling is None else [row_dice(sampling.seed, "tokens", tokens) for tokens in histories]
        self.endings = [Ending.LENGTH] * len(prompts)
        self._running = set(range(len(prompts)))

    def stop(self, row: int) -> None:
        """No further tokens of this row."""
        self._end(row, Ending.STOPPED)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        tokens_B = np.zeros(0, np.int64)
        for step in range(self.max_new_tokens):
            tokens_B = self._next_tokens(tokens_B[:, np.newaxis] if step else None)
            for row in sorted(self._running):
                token = int(tokens_B[row])
                if token in self.end_tokens:
                    self._end(row, Ending.END_TOKEN)
                yield row, token
            if not self._running:
                return

    def _next_tokens(self, tokens_BT: Array | None) -> Array:
        """The first of each response, or those after `tokens_BT`."""
        model = self.conversation
        if self.sampling is None:
            return (
                model.prefill_greedily(self.prompts) if tokens_BT is None else model.decode_greedily(tokens_BT)[:, -1]
            )
        logits_BV = model.prefill(self.prompts) if tokens_BT is None else model.decode(tokens_BT)[:, -1]
        return np.asarray(draw_scores(logits_BV.astype(np.float64), self.sampling, self.dice).argmax(-1))

    def _end(self, row: int, ending: Ending) -> None:
        if row in self._running:
            self._running.remove(row)
            self.endings[row] = ending


def check_vocabulary(tokens: Array, vocab_size: int) -> None:
    """Raise ModelError for a token that the embedding has no row for: runtimes read past its end, or count from it."""
    if tokens.size and tokens.astype(np.uint64).max() >= vocab_size:  # as if numbers below 0 were large ones
        strange = tokens.max() if tokens.max() >= vocab_size else tokens.min()
        raise ModelError(
            f"there is no token {strange}: the vocabulary of the model has {vocab_size}",
            hint="give the tokenizer that belongs to the model, and no tokens that were added to it alone",
        )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    for position, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return position
    return min(len(one), len(other))
