"""Tokens become text piece by piece: no half characters, nothing of a stop string, each token decoded a bounded number of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """One response on its way to the reader. The pieces of `add` and `finish` are, joined, the text that the tokens decode to.

    With `stop` strings the text ends before the first of them: `stopped` is then true, and nothing more comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._told, self._read = 0, 0  # tokens whose text serves as context, and tokens whose text was seen
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now that this token came."""
        self._tokens.append(token)
        return self._release(self._decode_new(), finished=False)

    def finish(self) -> str:
        """What was held back: a character that never became whole, the start of a stop string that did not go on."""
        return self._release(self._decode_new(finished=True), finished=True)

    def _decode_new(self, *, finished: bool = False) -> str:
        """A token's text may depend on the token before it (a leading space, say), so both are decoded together."""
        before = self._decode(self._tokens[self._told : self._read])
        whole = self._decode(self._tokens[self._told :])
        if not finished and (whole.endswith(_UNFINISHED) or len(whole) <= len(before)):
            return ""  # a character may need several tokens
        self._told, self._read = self._read, len(self._tokens)
        return whole[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, new: str, *, finished: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if found := [place for place in map(text.find, self._stop) if place >= 0]:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = 0 if finished else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
