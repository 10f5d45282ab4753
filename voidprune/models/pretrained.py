"""The one door to transformers: a stock model, a stock tokenizer, and texts as token ids.

transformers and torch are imported when a function is called, never when this module is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voidprune.errors import DatasetError, ModelError, RuntimeProviderError
from voidprune.models.checkpoint import read_json, refuse_packed
from voidprune.models.configs import is_spelled_for_transformers_4
from voidprune.models.families import find_family
from voidprune.models.graph_architecture import GraphArchitecture, describe_graph_architecture
from voidprune.models.layer_lists import FULL, SLIDING
from voidprune.models.rope import Rope

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

    Advance = Callable[[Tensor, Tensor, DynamicCache], Tensor]

Message = Mapping[str, str]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def load_model(folder: Path, *, dtype: str = "fp32", device: str = "cpu") -> PreTrainedModel:
    """A stock `AutoModelForCausalLM` in evaluation mode, which can be trained wherever this is called. No remote code.

    Raises ModelError, RuntimeProviderError.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    refuse_packed(folder)
    try:
        with torch.inference_mode(
            False
        ):  # else who calls this in inference mode gets weights that can never be trained
            outcome: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, DTYPES[dtype]),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {folder}: {_first_line(error)}") from error
    model, found = outcome
    if missing := found["missing_keys"]:
        raise ModelError(f"{folder} lacks {min(missing)}; transformers would make it up")
    check_rotary_frequencies(model, folder)
    try:
        with torch.inference_mode(False):
            loaded: PreTrainedModel = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise RuntimeProviderError(
            f"torch cannot use the device {device}: {_first_line(error)}", hint="use --device cpu or --provider cpu"
        ) from error
    return loaded


def check_quantized_runs(config: Mapping[str, Any]) -> None:
    """Raise ModelError where transformers cannot run the quantized model of this `config.json` here, and what it says it lacks."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(dict(config["quantization_config"]), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"transformers cannot run this quantized model: {_first_line(error)}") from error


def check_rotary_frequencies(model: Any, folder: Path) -> None:
    """Refuse a model whose rotary embedding is not the one of its config.

    transformers 4.57 ignores the `rope_parameters` that 5.x writes, and runs with another base without a word.
    """
    import numpy as np
    import transformers

    config = read_json(folder / "config.json")
    spec = find_family(config)
    try:
        architecture = describe_graph_architecture(config, spec)
    except ModelError:  # embeddings that we do not compute ourselves: what 4.x would not read is all that can go wrong
        right = transformers.__version__.split(".")[0] != "4" or is_spelled_for_transformers_4(config, spec)
    else:
        right = all(
            np.allclose(buffer.float().cpu().numpy(), _rope_of_buffer(name, architecture).frequencies, rtol=1e-4)
            for name, buffer in model.named_buffers()
            if ".rotary_emb" in name and name.endswith("inv_freq") and "original" not in name and "vision" not in name
        )
    if not right:
        raise ModelError(
            f"transformers {transformers.__version__} does not run {folder} with the rotary embedding of its config.json",
            hint="install transformers 5, or write rope_theta and rope_scaling into config.json as 4.x reads them",
        )


def _rope_of_buffer(name: str, architecture: GraphArchitecture) -> Rope:
    """5.x names a buffer by its kind of layer where they differ; in 4.57 that of sliding layers is `rotary_emb_local`."""
    return architecture.ropes_by_kind[SLIDING if SLIDING in name or "rotary_emb_local" in name else FULL]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A stock `AutoTokenizer`. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise ModelError(
            f"{folder} has no tokenizer that transformers can load: {_first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json into the folder",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def generate_greedily(
    advance: Advance, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int]
) -> list[list[int]]:
    """Greedy responses, each up to and including its end token. Rows are padded on the left and decoded together.

    Nothing of a generation config is applied. `advance(input_ids_BT, attention_mask_BS, cache)` runs one pass, extends the cache
    and returns the logits of the last token, [B, 1, V].
    """
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompts))
    input_ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BS = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    responses: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    cache = DynamicCache()
    for _ in range(max_new_tokens):
        input_ids_BT = advance(input_ids_BT, mask_BS, cache).argmax(-1).cpu()
        for row in sorted(running):
            responses[row].append(int(input_ids_BT[row, 0]))
        running = {row for row in running if responses[row][-1] not in end_tokens}
        if not running:
            break
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(prompts), 1)], dim=1)
    return responses


def default_device() -> str:
    """ "cuda" where torch sees one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text with the tokenizer's own special tokens (usually a start token)."""
    return list(tokenizer(text, verbose=False)["input_ids"])  # longer than the context is fine here: it is cut later


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Messages up to and including the header of the assistant's turn, by the model's chat template.

    The template writes the special tokens itself, so that none comes twice. A model without a template gets the contents one
    after the other, as plain text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    import jinja2

    try:
        rendered: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except jinja2.TemplateError as error:
        raise DatasetError(
            f"the model's chat template refuses the messages: {_first_line(error)}", hint="use the roles that it knows"
        ) from error
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, *, end: Sequence[int]) -> list[int]:
    """A response as the model would have generated it: no start token, and behind it the token that ends a turn.

    Of several end tokens that is the tokenizer's own (Llama 3: <|eot_id|>, not <|end_of_text|>), else the first.
    """
    last = [tokenizer.eos_token_id] if tokenizer.eos_token_id in end else list(end[:1])
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], *last]


def encode_choice(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], choice: str) -> list[int]:
    """A choice as the continuation of what `encode_chat` makes of the messages, without an end token.

    Under a chat template that is the start of a response. Without one it follows the text behind a space, and both are tokenized
    together where the tokens of the text stay what they are, because some tokenizers begin every text with a space of their own.
    """
    if getattr(tokenizer, "chat_template", None) is not None:
        return encode_response(tokenizer, choice, end=())
    text = "\n".join(message["content"] for message in messages)
    continuation = choice if text[-1:].isspace() or choice[:1].isspace() else " " + choice
    context, whole = encode_text(tokenizer, text), encode_text(tokenizer, text + continuation)
    if whole[: len(context)] == context:
        return whole[len(context) :]
    return encode_response(tokenizer, continuation, end=())


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that end a response: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
    return ()
