"""The one door to transformers: a stock model, a stock tokenizer, and texts as token ids.

transformers and torch are imported when a function is called, never when this module is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voidprune.errors import ModelError
from voidprune.models.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def load_model(folder: Path, *, dtype: str = "fp32", device: str = "cpu") -> PreTrainedModel:
    """A stock `AutoModelForCausalLM` in evaluation mode. No remote code. Raises ModelError."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        outcome: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, DTYPES[dtype]),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {folder}: {_first_line(error)}") from error
    model, found = outcome
    if missing := found["missing_keys"]:
        raise ModelError(f"{folder} lacks {min(missing)}; transformers would make it up")
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A stock `AutoTokenizer`. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} has no tokenizer that transformers can load: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json into the folder",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def default_device() -> str:
    """ "cuda" where torch sees one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text with the tokenizer's own special tokens (usually a start token)."""
    return list(tokenizer(text)["input_ids"])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Messages up to and including the header of the assistant's turn, by the model's chat template.

    The template writes the special tokens itself, so that none comes twice. A model without a template gets the contents one
    after the other, as plain text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    rendered: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, *, end: Sequence[int]) -> list[int]:
    """A response as the model would have generated it: no start token, the first end token behind it."""
    return list(tokenizer(response, add_special_tokens=False)["input_ids"]) + list(end[:1])


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that end a response: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
    return ()
