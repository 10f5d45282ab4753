"""The slim checkpoint: loads in stock transformers, says the right things, carries what belongs to the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.errors import CheckpointError, ModelError
from voidprune.export.hf_checkpoint import PRECISIONS, parse_shard_size, write_slim_checkpoint
from voidprune.models.checkpoint import WEIGHTS_FILE, open_checkpoint

KEPT = (1, 2, 5)
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def spoilable(llama: TinyModel, tmp_path: Path) -> Path:
    """A copy of the Llama fixture to change."""
    return shutil.copytree(llama.folder, tmp_path / "source")


def read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def slim(source: Path, folder: Path, *, kept: tuple[int, ...] = KEPT, precision: str = "keep") -> Path:
    folder.mkdir()
    write_slim_checkpoint(open_checkpoint(source), kept, folder, precision=precision)
    return folder


def test_stock_transformers_loads_every_tensor(family_model: TinyModel, tmp_path: Path) -> None:
    folder = slim(family_model.folder, tmp_path / "slim")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.get_text_config().num_hidden_layers == len(KEPT)
    source = family_model.model.state_dict()
    layers = family_model.checkpoint.architecture.spec.modules.layers
    for name, tensor in model.state_dict().items():
        if name.startswith(layers):
            number, _, rest = name.removeprefix(f"{layers}.").partition(".")
            name = f"{layers}.{KEPT[int(number)]}.{rest}"
        assert torch.equal(tensor, source[name]), name


def test_config_says_only_what_changed(family_model: TinyModel, tmp_path: Path) -> None:
    spec = family_model.checkpoint.architecture.spec
    before = read_json(family_model.folder / "config.json")
    after = read_json(slim(family_model.folder, tmp_path / "slim") / "config.json")
    if spec.text_config is not None:
        text_before, text_after = before.pop(spec.text_config), after.pop(spec.text_config)
        assert before == after
        before, after = text_before, text_after
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    spelled_twice = {
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        spec.local_rope_theta,
        *sum(spec.aliases, ()),
    }
    assert changed <= spec.per_layer.keys() | spelled_twice
    assert after["num_hidden_layers"] == len(KEPT)


def test_rope_is_spelled_for_transformers_4_too(get_model: Callable[[str], TinyModel], tmp_path: Path) -> None:
    """4.57 does not read `rope_parameters` and would silently run with a base of 10,000."""
    written = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    source = shutil.copytree(get_model("llama").folder, tmp_path / "source")
    before = read_json(source / "config.json")
    before = {name: value for name, value in before.items() if not name.startswith("rope_")}
    (source / "config.json").write_text(json.dumps({**before, "rope_parameters": written}))
    config = read_json(slim(source, tmp_path / "slim") / "config.json")
    assert config["rope_theta"] == written["rope_theta"]
    assert config["rope_scaling"] == {name: value for name, value in written.items() if name != "rope_theta"}


def test_windows_follow_their_layers(get_model: Callable[[str], TinyModel], tmp_path: Path) -> None:
    source = get_model("qwen2-windows")
    model = AutoModelForCausalLM.from_pretrained(slim(source.folder, tmp_path / "slim"))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None, None, 4]


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_precision(spoilable: Path, tmp_path: Path, precision: str) -> None:
    folder = slim(spoilable, tmp_path / "slim", precision=precision)
    wanted = TORCH_DTYPES[precision]
    for name, tensor in safetensors.torch.load_file(folder / WEIGHTS_FILE).items():
        assert tensor.dtype is wanted, name
    assert read_json(folder / "config.json")["dtype"] == str(wanted).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype is wanted


def test_kept_precision_changes_no_dtype_field(spoilable: Path, tmp_path: Path) -> None:
    assert read_json(slim(spoilable, tmp_path / "slim") / "config.json")["dtype"] == "float32"


def test_overflow_ends_with_the_tensor_s_name(spoilable: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(spoilable / WEIGHTS_FILE)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e6
    safetensors.torch.save_file(tensors, spoilable / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has values that are infinite"):
        slim(spoilable, tmp_path / "slim", precision="fp16")


def test_what_belongs_to_the_model_is_carried_over(spoilable: Path, tmp_path: Path) -> None:
    carried = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
               "merges.txt", "chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE"]  # fmt: skip
    left = ["README.md", "pytorch_model.bin", "modeling_custom.py", "optimizer.pt", ".gitattributes"]
    for name in carried + left:
        (spoilable / name).write_text(name)
    (spoilable / "tokenizer_folder").mkdir()
    folder = slim(spoilable, tmp_path / "slim")
    names = {path.name for path in folder.iterdir()}
    assert names == {*carried, "config.json", "generation_config.json", WEIGHTS_FILE}
    for name in carried:
        assert (folder / name).read_text() == name


def test_link_to_nothing_is_named(spoilable: Path, tmp_path: Path) -> None:
    """A tokenizer that was half fetched would be missing without a word."""
    (spoilable / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a link to nothing"):
        slim(spoilable, tmp_path / "slim")


def test_remote_code_is_not_carried_over(spoilable: Path, tmp_path: Path) -> None:
    config = read_json(spoilable / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Model"}
    (spoilable / "config.json").write_text(json.dumps(config))
    assert "auto_map" not in read_json(slim(spoilable, tmp_path / "slim") / "config.json")


@pytest.mark.parametrize("do_sample", [True, False, None])
def test_generation_config_stays_loadable(spoilable: Path, tmp_path: Path, do_sample: bool | None) -> None:
    """transformers refuses to save sampling parameters without sampling; many published models have them."""
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 99}
    if do_sample is not None:
        generation["do_sample"] = do_sample
    (spoilable / "generation_config.json").write_text(json.dumps(generation))
    folder = slim(spoilable, tmp_path / "slim")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    found = read_json(folder / "generation_config.json")
    assert found["eos_token_id"] == [2, 3]
    assert found["max_length"] == 99
    assert ("temperature" in found) == bool(do_sample)


def test_broken_generation_config_is_a_named_error(spoilable: Path, tmp_path: Path) -> None:
    (spoilable / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config"):
        slim(spoilable, tmp_path / "slim")


def test_missing_head_is_named(spoilable: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(spoilable / WEIGHTS_FILE)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, spoilable / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=r"holds no lm_head\.weight, which its config asks for"):
        slim(spoilable, tmp_path / "slim")


def test_unknown_layer_field_is_refused(spoilable: Path, tmp_path: Path) -> None:
    config = read_json(spoilable / "config.json")
    (spoilable / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1] * NUM_LAYERS}))
    with pytest.raises(ModelError, match="no_rope_layers"):
        slim(spoilable, tmp_path / "slim")


def test_slimming_twice_is_slimming_once(family_model: TinyModel, tmp_path: Path) -> None:
    once = slim(family_model.folder, tmp_path / "once", kept=(1, 5))
    first = slim(family_model.folder, tmp_path / "first", kept=(0, 1, 4, 5))
    twice = slim(first, tmp_path / "twice", kept=(1, 3))
    assert {path.name for path in once.iterdir()} == {path.name for path in twice.iterdir()}
    for path in once.iterdir():
        assert path.read_bytes() == (twice / path.name).read_bytes(), path.name


# ---- shards and carried folders


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("700", 700), (" 3 TB ", 3 * 10**12)],
)
def test_sizes_are_spelled_as_transformers_does(text: str, size: int) -> None:
    assert parse_shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "0", "0.1b", "1e9", "5iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|is less than a byte"):
        parse_shard_size(text)


def test_shards_load_in_stock_transformers(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "slim"
    folder.mkdir()
    write_slim_checkpoint(tiny_model.checkpoint, KEPT, folder, max_shard_bytes=60_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert not (folder / WEIGHTS_FILE).exists()
    whole = AutoModelForCausalLM.from_pretrained(slim(tiny_model.folder, tmp_path / "whole")).state_dict()
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    if tiny_model.checkpoint.architecture.tied_embeddings:
        assert "lm_head.weight" not in read_json(folder / "model.safetensors.index.json")["weight_map"]


def test_further_templates_and_licences_are_carried_over(spoilable: Path, tmp_path: Path) -> None:
    carried = ["additional_chat_templates/tools.jinja", "LICENSES/MIT.txt", "License.md", "USE_POLICY.md", "qwen.tiktoken",
               "spiece.model", "vocab.txt", "added_tokens.json"]  # fmt: skip
    left = ["additional_chat_templates/evil.py", ".git/config", ".cache/x.json", "onnx/model.onnx", "tokenizer.py",
            "tf_model.h5", "model.gguf", "vocab.bin"]  # fmt: skip
    for name in carried + left:
        (spoilable / name).parent.mkdir(exist_ok=True)
        (spoilable / name).write_bytes(name.encode() + b"\r\n\xff")
    folder = slim(spoilable, tmp_path / "slim")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*carried, "config.json", "generation_config.json", WEIGHTS_FILE}
    for name in carried:
        assert (folder / name).read_bytes() == (spoilable / name).read_bytes()
