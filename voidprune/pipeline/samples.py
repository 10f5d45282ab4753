"""Rows become samples with responses: the model's own, or those of the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from voidprune.errors import ModelError
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import end_tokens, load_model, load_tokenizer
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row, Sample, encode_rows, require_responses
from voidprune.profiling.tracing import generate_responses


@dataclass(frozen=True)
class Answering:
    """Where responses come from ("generate" or "dataset"), and how long samples may be, in tokens (None: the context)."""

    responses: str = "generate"
    max_new_tokens: int = 64
    max_length: int | None = None
    batch_size: int = 16


def prepare_samples(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    answering: Answering,
    *,
    dtype: str,
    device: str,
    track: Track = untracked,
) -> list[Sample]:
    """Samples with responses, of the model of `checkpoint`. Raises ModelError, DatasetError, RuntimeProviderError."""
    generates = answering.responses == "generate"
    context = checkpoint.architecture.context_length
    longest = min(answering.max_length or context, context) - (answering.max_new_tokens if generates else 0)
    if longest < 2:
        raise ModelError(
            f"responses of {answering.max_new_tokens} tokens leave no room for prompts in a context of {context}",
            hint="lower --max-new-tokens",
        )
    tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
    if generates:  # the responses of the dataset are not used, so they need not fit
        rows = [replace(row, response=None) for row in rows]
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=longest)
    if not generates:
        require_responses(samples)
        return samples
    model = load_model(checkpoint.folder, dtype=dtype, device=device)
    with track("answering", len(samples), "samples") as advance:
        return generate_responses(
            model,
            samples,
            max_new_tokens=answering.max_new_tokens,
            end_tokens=ends,
            batch_size=answering.batch_size,
            on_progress=lambda num_samples, _num_tokens: advance(num_samples),
        )
