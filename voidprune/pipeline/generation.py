"""A model or a bundle answers a text."""

from __future__ import annotations

from collections.abc import Iterator

from voidprune.errors import ContextLengthError, ScheduleError
from voidprune.execution.manifest import is_bundle
from voidprune.execution.reference import scheduled
from voidprune.execution.session import BundleSession
from voidprune.models.pretrained import (
    default_device,
    encode_chat,
    encode_text,
    end_tokens,
    load_model,
    load_tokenizer,
)
from voidprune.pipeline.models import default_provider, open_model
from voidprune.schedule import Schedule, full_schedule


def generate_text(
    name: str,
    text: str,
    *,
    schedule: Schedule | None = None,
    raw: bool = False,
    max_new_tokens: int = 128,
    provider: str | None = None,
) -> Iterator[str]:
    """Answer a text greedily, piece by piece: a bundle in onnxruntime, a model in torch (whole, or under a schedule)."""
    checkpoint = open_model(name)
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_tokens(checkpoint.folder)
    prompt = encode_text(tokenizer, text) if raw else encode_chat(tokenizer, [{"role": "user", "content": text}])
    room = checkpoint.architecture.context_length - len(prompt)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; the model's context is {checkpoint.architecture.context_length}",
            hint="shorten the prompt",
        )
    max_new_tokens = min(max_new_tokens, room)
    if is_bundle(checkpoint.folder):
        if schedule is not None:
            raise ScheduleError(f"{name} is a bundle and has its schedule already", hint="give the whole model")
        session = BundleSession(checkpoint.folder, provider=provider or default_provider())
        tokens = session.stream(prompt, max_new_tokens=max_new_tokens, end_tokens=ends)
    else:
        schedule = schedule or full_schedule(checkpoint.identity)
        schedule.check_model(checkpoint.identity, place="the schedule")
        with scheduled(load_model(checkpoint.folder, device=default_device()), schedule) as runner:
            tokens = iter(runner.generate([prompt], max_new_tokens=max_new_tokens, end_tokens=ends)[0])
    told, so_far = "", list[int]()
    for token in tokens:
        so_far.append(token)
        whole = str(tokenizer.decode(so_far, skip_special_tokens=True))
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may need several tokens
            yield whole[len(told) :]
            told = whole
