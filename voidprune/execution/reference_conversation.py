"""A conversation with a stock model under a schedule, in torch: the counterpart of `session.Conversation`.

Shapes: B rows, T new tokens, S tokens with the past, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from voidprune.execution.generation import Conversation
from voidprune.execution.reference import ScheduledModel, decode_mask

Array = np.ndarray[Any, Any]


class ReferenceConversation(Conversation):
    """A transformers cache, and the `tokens` of each row that are in it.

    Rows whose prompts differ in length are padded on the left. Several rows have one prompt each; further turns are for one row.
    """

    def __init__(self, model: ScheduledModel, num_rows: int = 1, *, max_positions: int) -> None:
        self.model = model
        self.max_positions = max_positions
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._cache = DynamicCache()
        self._mask_BS = torch.zeros(num_rows, 0, dtype=torch.long)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Process one prompt a row, behind what is there already. Returns the logits of the last tokens, [B, V]."""
        assert len(self.tokens) == 1 or not any(self.tokens)
        width = max(map(len, prompts))
        flags = decode_mask(width, width, self.model.schedule.boundary)
        return self._run(prompts, width, flags)[:, -1]

    def decode(self, tokens_BT: Array) -> Array:
        """Process one generated token a row. Returns the logits after it, [B, 1, V]."""
        assert tokens_BT.shape[1] == 1
        return self._run(tokens_BT.tolist(), 1, [True])

    def rewind(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens of the only row."""
        assert len(self.tokens) == 1
        del self.tokens[0][length:]
        self._mask_BS = self._mask_BS[:, :length]
        self._cut_cache()

    def _cut_cache(self) -> None:
        """To the tokens that every layer has. transformers 5 takes only the number of tokens to remove, 4.57 that, too."""
        length = self._mask_BS.shape[1]
        if not length:
            self._cache = DynamicCache()
            return
        layers: Any = self._cache.layers  # of attention all of them, which is more than their type says
        for layer in layers:
            if (excess := layer.get_seq_length() - length) > 0:
                layer.crop(-excess)

    def _run(self, rows: Sequence[Sequence[int]], width: int, is_decode: list[bool]) -> Array:
        input_ids_BT = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        new_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        mask_BS = torch.cat([self._mask_BS, new_BT], dim=1)
        try:
            logits_BTV = self.model.forward(
                input_ids_BT,
                is_decode_BT=torch.tensor(is_decode).expand_as(input_ids_BT),
                attention_mask_BS=mask_BS,
                cache=self._cache,
                last_only=True,
            )
        except BaseException:  # Ctrl-C above all: some layers may have their K/V and others not
            self._cut_cache()
            raise
        self._mask_BS = mask_BS
        for tokens, row in zip(self.tokens, rows, strict=True):
            tokens += row
        return logits_BTV.float().cpu().numpy()
