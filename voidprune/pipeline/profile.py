"""A model and rows become a profile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import voidprune
from voidprune.artifacts import check_output_file
from voidprune.errors import ModelError
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row, encode_rows, fingerprint_samples, require_responses
from voidprune.profiling.profile import LacSettings, Profile, write_profile
from voidprune.profiling.tracing import generate_responses, trace_model


def profile_model(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    responses: str = "generate",
    dataset: str = "",
    num_samples: int | None = None,
    max_new_tokens: int = 64,
    max_length: int | None = None,
    lac: LacSettings = LacSettings(),  # noqa: B008  a frozen value
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> Profile:
    """Trace a model over a calibration set, by default on CUDA in bf16 where there is a device, else in fp32.

    With an `output` the profile is written there, and finished batches lie in a journal beside it until it is: a run that was
    killed, repeated with the same settings, goes on where it stopped and writes the same bytes.

    `dataset` is what the rows are called, for the record. Raises ModelError, DatasetError, RuntimeProviderError, ArtifactError
    where the journal is that of another run, OutputError.
    """
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    ends = end_tokens(checkpoint.folder)
    context = checkpoint.architecture.context_length
    reserved = max_new_tokens if responses == "generate" else 0
    longest = min(max_length or context, context) - reserved
    if longest < 2:
        raise ModelError(
            f"responses of {max_new_tokens} tokens leave no room for prompts in a context of {context}",
            hint="lower --max-new-tokens",
        )
    device = device or default_device()
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    tokenizer = load_tokenizer(checkpoint.folder)
    if responses == "generate":  # the responses of the dataset are not used, so they need not fit
        rows = [replace(row, response=None) for row in rows]
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=longest, num_samples=num_samples)
    if responses == "dataset":
        require_responses(samples)
    settings = {
        "model": checkpoint.identity.fingerprint,
        "samples": fingerprint_samples(samples),
        "groups": hashlib.sha256(json.dumps([sample.group for sample in samples]).encode()).hexdigest(),
        "responses": responses,
        "max_new_tokens": max_new_tokens,
        "end_tokens": list(ends),
        "alpha": lac.alpha,
        "lac_arithmetic": lac.arithmetic,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
    }
    with Journal(output, key={**settings, **_numerics()}, overwrite=overwrite) as journal:
        model = load_model(checkpoint.folder, dtype=dtype, device=device)
        if responses == "generate":
            with track("generating", len(samples), "samples") as advance:
                samples = generate_responses(
                    model,
                    samples,
                    max_new_tokens=max_new_tokens,
                    end_tokens=ends,
                    batch_size=batch_size,
                    journal=journal,
                    on_progress=lambda num_samples, _num_tokens: advance(num_samples),
                )
        num_tokens = sum(len(sample.prompt) + len((sample.response or ())[1:]) for sample in samples)
        with track("tracing", num_tokens, "tokens") as advance:
            profile = trace_model(
                model,
                checkpoint,
                samples,
                responses=responses,
                max_new_tokens=max_new_tokens if responses == "generate" else 0,
                lac=lac,
                batch_size=batch_size,
                journal=journal,
                on_progress=lambda _num_samples, num_tokens: advance(num_tokens),
            )
        asked = {"dataset": dataset, "num_samples": num_samples, "max_length": max_length, "dtype": dtype}
        origin = {name: value for name, value in asked.items() if value}
        profile = replace(profile, calibration=replace(profile.calibration, origin=origin))
        if output is not None:
            write_profile(output, profile, overwrite=overwrite)
            journal.remove()
    return profile


def _numerics() -> dict[str, object]:
    """What else decides about the last bits of a number."""
    import torch
    import transformers

    return {
        "voidprune": voidprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
