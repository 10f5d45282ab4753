"""What healing gave back, from the record in a bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voidprune import artifacts
from voidprune.execution.manifest import Manifest


@dataclass(frozen=True)
class HealingFacts:
    """Perplexities on held-out samples. `regained` is the share of the lost nats that came back; None where none was lost."""

    methods: tuple[str, ...]
    num_samples: int
    num_tokens: int
    whole: float
    before: float
    after: float
    regained: float | None
    num_prompts: int
    outcomes: tuple[str, ...]
    samples: str

    def to_document(self) -> artifacts.Document:
        return {**vars(self), "methods": list(self.methods), "outcomes": list(self.outcomes)}


def describe_healing(manifest: Manifest | None) -> HealingFacts | None:
    """None where nothing was healed."""
    if manifest is None or manifest.healing is None:
        return None
    healing, held_out = manifest.healing, manifest.healing.held_out
    lost = held_out.before - held_out.whole
    whole, before, after = (math.exp(min(loss, 700.0)) for loss in (held_out.whole, held_out.before, held_out.after))
    return HealingFacts(
        methods=healing.methods,
        num_samples=held_out.num_samples,
        num_tokens=held_out.num_tokens,
        whole=whole,
        before=before,
        after=after,
        regained=(held_out.before - held_out.after) / lost if lost > 0 else None,
        num_prompts=len(healing.prompts),
        outcomes=tuple(_describe(method, healing.outcomes.get(method, {})) for method in healing.methods),
        samples=healing.samples,
    )


def _describe(method: str, outcome: Mapping[str, Any]) -> str:
    """What a method says of itself, as far as it says something we know."""
    told = []
    if isinstance(branches := outcome.get("branches"), list):
        told.append(f"{len(branches)} branches fitted in closed form")
    if isinstance(rounds := outcome.get("rounds"), list):
        told.append(f"{len(rounds)} rounds of pruning and healing")
    if all(isinstance(outcome.get(key), int | float) for key in ("loss_before", "loss_after", "best_step")):
        before, after = outcome["loss_before"], outcome["loss_after"]
        told.append(f"loss on held-out samples {before:.4f} to {after:.4f}, best at step {outcome['best_step']}")
    return f"{method}: {'; '.join(told) or 'no details recorded'}"
