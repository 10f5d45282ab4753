"""The door to transformers: stock models without remote code, and texts as the token ids that a model was trained on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import TinyModel
from voidprune.errors import ModelError
from voidprune.models.checkpoint import WEIGHTS_FILE
from voidprune.models.pretrained import (
    check_rotary_frequencies,
    encode_chat,
    encode_response,
    encode_text,
    end_tokens,
    load_model,
    load_tokenizer,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "one", "two", "three", "four"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A word-level tokenizer that puts a start token in front of plain text, as Llama's does."""
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def words(ids: list[int]) -> str:
    return " ".join(WORDS[number] for number in ids)


# ---- models


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_model_is_stock_and_in_evaluation_mode(llama: TinyModel, dtype: str, expected: torch.dtype) -> None:
    model = load_model(llama.folder, dtype=dtype)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__.startswith("transformers.")
    assert model.dtype is expected
    assert not model.training


def test_a_model_that_is_loaded_in_inference_mode_can_be_trained(llama: TinyModel) -> None:
    with torch.inference_mode():
        model = load_model(llama.folder)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"transformers cannot load {tmp_path}"):
        load_model(tmp_path)


def test_damaged_weights(llama: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensors_are_not_made_up(llama: TinyModel, tmp_path: Path, name: str) -> None:
    """transformers fills them with random numbers and writes a log line."""
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    del tensors[name]
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load_model(folder)


CODE = """
raise SystemExit("remote code ran")
"""


def test_remote_code_of_a_model_is_not_run(llama: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(CODE)
    assert type(load_model(folder)).__name__ == "LlamaForCausalLM"


def answer_yes(function: str, folder: Path) -> str:
    """Load a folder in a process whose user answers "y" to whatever is asked. Returns what it printed."""
    script = f"""
from pathlib import Path
from voidprune.errors import ModelError
from voidprune.models.pretrained import {function}
try:
    {function}(Path({str(folder)!r}))
except ModelError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], input="y\n" * 9, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_remote_code_of_an_unknown_model_is_neither_run_nor_offered(llama: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(CODE)
    printed = answer_yes("load_model", folder)
    assert printed.startswith(f"transformers cannot load {folder}")


def test_remote_code_of_a_tokenizer_is_neither_run_nor_offered(tokenizer_folder: Path) -> None:
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "CustomTokenizer"
    config["auto_map"] = {"AutoTokenizer": ["custom.CustomTokenizer", "custom.CustomTokenizer"]}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tokenizer_folder / "custom.py").write_text(CODE)
    printed = answer_yes("load_tokenizer", tokenizer_folder)
    assert "y/N" not in printed


# ---- tokenizers


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer that transformers can load") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.hint == "copy tokenizer.json and tokenizer_config.json into the folder"


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_broken_tokenizer(tokenizer_folder: Path, content: str) -> None:
    (tokenizer_folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="has no tokenizer that transformers can load"):
        load_tokenizer(tokenizer_folder)


def test_text_gets_the_tokenizer_s_own_special_tokens(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert words(encode_text(tokenizer, "one two")) == "<s> one two"
    assert words(encode_text(tokenizer, "")) == "<s>"


def test_chat_gets_the_special_tokens_of_its_template_once(tokenizer_folder: Path) -> None:
    (tokenizer_folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tokenizer_folder)
    assert words(encode_chat(tokenizer, MESSAGES)) == (
        "<s> <user> one two </s> <assistant> three </s> <user> four </s> <assistant>"
    )


def test_chat_without_a_template_is_plain_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert words(encode_chat(tokenizer, MESSAGES)) == "<s> one two three four"


@pytest.mark.parametrize(
    ("end", "expected"), [((2,), "three four </s>"), ((2, 0), "three four </s>"), ((), "three four")]
)
def test_response_is_what_the_model_would_have_said(
    tokenizer_folder: Path, end: tuple[int, ...], expected: str
) -> None:
    assert words(encode_response(load_tokenizer(tokenizer_folder), "three four", end=end)) == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 2}, (7,)),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 2}, (7, 8)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [2, 3]}, (2, 3)),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        (None, {}, ()),
        (None, None, ()),
    ],
)
def test_end_tokens(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path) == expected


def test_trained_tokenizer_goes_there_and_back(stories260k: TinyModel) -> None:
    tokenizer = load_tokenizer(stories260k.folder)
    text = "Once upon a time, there was a little girl."
    ids = encode_text(tokenizer, text)
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert end_tokens(stories260k.folder) == (2,)


def test_another_rotary_embedding_than_the_config_s_is_refused(llama: TinyModel, tmp_path: Path) -> None:
    """transformers 4.57 loads a folder of 5.x with a base of 10,000, whatever its config says; here the two are set at odds."""
    folder = shutil.copytree(llama.folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    check_rotary_frequencies(load_model(llama.folder), llama.folder)
    with pytest.raises(ModelError, match="with the rotary embedding of its config"):
        check_rotary_frequencies(load_model(llama.folder), folder)
