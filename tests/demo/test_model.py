"""The demo model as it ships: a stock checkpoint, small, and good at its tasks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import voidprune.demo
from voidprune.demo.tasks import TASKS, extract_answer, make_items

FOLDER = Path(voidprune.demo.__file__).parent / "model"


@cache
def load() -> tuple[Any, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


def test_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert set(files) == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert sum(files.values()) < 10_000_000


def test_is_a_stock_llama() -> None:
    model, _ = load()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers >= 12
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.do_sample is False


def test_tokenizer_gives_any_text_back() -> None:
    _, tokenizer = load()
    for text in ("Fact: Ann tea yes. Answer: yes", "10, 20", "  naïve\n\tcafé 日本 🙂", "<not a token>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_tasks_are_one_token_and_digits_stand_alone() -> None:
    _, tokenizer = load()
    assert tokenizer.tokenize("Fact: Ann tea yes. Answer: yes") == [
        *("Fact", ":", "ĠAnn", "Ġtea", "Ġyes", ".", "ĠAnswer", ":", "Ġyes"),
    ]
    assert tokenizer.tokenize(" 123") == ["Ġ", "1", "2", "3"]


def test_chat_template() -> None:
    _, tokenizer = load()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 11
    assert ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc"


def test_chat_template_refuses_a_system_role() -> None:
    _, tokenizer = load()
    with pytest.raises(Exception, match="user and assistant messages only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("task", TASKS)
def test_answers_unseen_items(task: str) -> None:
    model, tokenizer = load()
    items = make_items(task, split="evaluation", num_items=40, seed=1)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}], add_generation_prompt=True, tokenize=False
        )
        for item in items
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=64)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [extract_answer(text) == item.answer for text, item in zip(texts, items, strict=True)]
    assert sum(right) >= 0.9 * len(items), [text for text, ok in zip(texts, right, strict=True) if not ok]
