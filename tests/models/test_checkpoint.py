"""safetensors as bytes: hostile files each have their error, copies equal what the library reads, memory does not grow."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import NUM_LAYERS, TinyModel
from voidprune.errors import CheckpointError, ModelError
from voidprune.models.checkpoint import (
    INDEX_FILE,
    PAGE,
    WEIGHTS_FILE,
    Checkpoint,
    TensorRecord,
    copy_tensors,
    find_model,
    layer_tensor_order,
    open_checkpoint,
    read_header,
    read_tensor,
)
from voidprune.models.families import FAMILIES


def write_raw(path: Path, header: Any, data: bytes) -> Path:
    """A safetensors file that says what it is told to say."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def copy_folder(source: Path, target: Path, **fields: Any) -> Path:
    """A model folder with a few fields of its config changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}))
    return target


# ---- hostile files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long: no safetensors header"),
        (b"\x10\0\0", "is 3 bytes long: no safetensors header"),
        (struct.pack("<Q", 100) + b"{}", "says that its header has 100 bytes; the file has 10"),
        (struct.pack("<Q", 2**63) + b"{}", "says that its header has 9223372036854775808 bytes"),
        (struct.pack("<Q", 2) + b"{]", "has a broken header"),
        (struct.pack("<Q", 2) + b"\xff\xff", "has a broken header"),
        (struct.pack("<Q", 2) + b"[]", "has a broken header: not an object"),
        (struct.pack("<Q", 0), "has a broken header"),
    ],
)
def test_file_without_a_header(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {message}")):
        read_header(path)


def test_header_longer_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole: takes no room on the disk
    with pytest.raises(CheckpointError, match="says that its header has 200000000 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry([2], 0, 8)}, 4, "truncated or damaged"),
        ({"a": entry([2], 0, 8)}, 12, "truncated or damaged"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "the data of b does not follow the tensor before it"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "does not follow the tensor before it"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "the data of b does not follow the tensor before it"),
        ({"a": entry([2], 4, 12)}, 12, "the data of a does not follow the tensor before it"),
        ({"a": entry([3], 0, 8)}, 8, r"a is F32 \[3\], 12 bytes, but spans 8"),
        ({"a": entry([2], 8, 0)}, 8, "but spans -8"),
        ({"a": entry([2], -8, 0)}, 8, "the header entry of a is broken"),
        ({"a": entry([2], 0, 8, "F7")}, 8, "the header entry of a is broken"),
        ({"a": entry([2], 0, 8, None)}, 8, "the header entry of a is broken"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "the header entry of a is broken"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "the header entry of a is broken"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8, "the header entry of a is broken"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, 8, "the header entry of a is broken"),
        ({"a": 7}, 8, "the header entry of a is broken"),
        ({"a": entry([2**40, 2**40], 0, 8)}, 8, "but spans 8"),
    ],
)
def test_header_that_does_not_fit_its_file(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = write_raw(tmp_path / WEIGHTS_FILE, header, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2], "0", "8")},
        {"a": entry([2], None, 8)},
        {"a": entry([2], 0.0, 8.0)},
        {"a": entry([-1, -2], 0, 8)},
        {"a": entry([2.0], 0, 8)},
        {"a": entry([True, 2], 0, 8)},
        {"a": entry(["x"], 0, 8)},
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=["text", "null", "fraction", "negative shape", "fractional shape", "boolean shape", "text shape", "depth"],
)
def test_header_of_wrong_types(tmp_path: Path, header: Any) -> None:
    path = write_raw(tmp_path / WEIGHTS_FILE, header, bytes(8))
    with pytest.raises(CheckpointError):
        read_header(path)


@given(st.data())
def test_no_damage_ends_in_a_traceback(llama: TinyModel, data: st.DataObject) -> None:
    """Bytes of the header changed at random: a named error, or a header that describes the file."""
    content = bytearray((llama.folder / WEIGHTS_FILE).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS_FILE
        path.write_bytes(content)
        try:
            records = read_header(path)
        except CheckpointError:
            return
        assert sum(record.num_bytes for record in records.values()) <= len(content)


def test_empty_and_scalar_tensors_are_fine(tmp_path: Path) -> None:
    header = {
        "none": entry([0, 4], 0, 0),
        "one": entry([], 0, 4),
        "after": entry([0], 4, 4),
        "__metadata__": {"a": "b"},
    }
    records = read_header(write_raw(tmp_path / "file", header, bytes(4)))
    assert {name: record.num_bytes for name, record in records.items()} == {"none": 0, "one": 4, "after": 0}


# ---- hostile folders


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path} holds no config.json")) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "give a folder with config.json and model.safetensors, or a Hub id"


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not JSON"), (b"[]", "is not a JSON object")])
def test_broken_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


@pytest.fixture
def weightless(llama: TinyModel, tmp_path: Path) -> Path:
    """A folder with a good config and nothing else."""
    folder = copy_folder(llama.folder, tmp_path / "weightless")
    (folder / WEIGHTS_FILE).unlink()
    return folder


def test_folder_without_weights(weightless: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{weightless} holds no {WEIGHTS_FILE}")):
        open_checkpoint(weightless)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_read(weightless: Path, name: str) -> None:
    (weightless / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ModelError, match="pickle files are not read") as caught:
        open_checkpoint(weightless)
    assert name in caught.value.message
    assert caught.value.hint is not None
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": []}, {"model_type": "gpt_none"}])
def test_config_of_no_known_family(llama: TinyModel, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = copy_folder(llama.folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is not supported") as caught:
        _ = open_checkpoint(folder).identity
    assert caught.value.hint == f"supported: {', '.join(sorted(FAMILIES))} (voidprune families)"


def shard(source: TinyModel, folder: Path, *, num_shards: int = 3) -> Path:
    """The same model in several files."""
    folder.mkdir()
    tensors = safetensors.torch.load_file(source.folder / WEIGHTS_FILE)
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = names[number::num_shards]
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return folder


@pytest.fixture
def sharded(llama: TinyModel, tmp_path: Path) -> Path:
    return shard(llama, tmp_path / "sharded")


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_shards_are_one_checkpoint(sharded: Path, llama: TinyModel) -> None:
    checkpoint = open_checkpoint(sharded, name="llama")
    assert checkpoint.identity == llama.identity
    assert checkpoint.num_bytes == llama.checkpoint.num_bytes
    assert len({record.file for record in checkpoint.tensors.values()}) == 3


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", 7, None, ".."])
def test_index_that_points_outside_the_folder(sharded: Path, outside: Any) -> None:
    (sharded.parent / "model.safetensors").write_bytes(b"")
    change_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": outside}))
    with pytest.raises(CheckpointError, match=r"outside of its folder|lacks the shard"):
        open_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-00002-of-00003\.safetensors"):
        open_checkpoint(sharded)


def test_index_that_promises_too_much(sharded: Path) -> None:
    shard_file = "model-00001-of-00003.safetensors"
    change_index(sharded, lambda index: index["weight_map"].update({"model.extra.weight": shard_file}))
    with pytest.raises(CheckpointError, match=rf"says that {shard_file} holds model\.extra\.weight; it does not"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first = sharded / "model-00001-of-00003.safetensors"
    both = safetensors.torch.load_file(first)
    both |= safetensors.torch.load_file(sharded / "model-00002-of-00003.safetensors")
    safetensors.torch.save_file(both, first)
    with pytest.raises(CheckpointError, match="and in another shard"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, [], "x"])
def test_index_without_a_weight_map(sharded: Path, weight_map: Any) -> None:
    change_index(sharded, lambda index: index.update({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(sharded)


# ---- finding


def test_find_model_takes_folders(llama: TinyModel) -> None:
    assert find_model(str(llama.folder)) == llama.folder


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/model"])
def test_path_without_a_model(name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"no model at {name}")):
        find_model(name)


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        find_model(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["nobody/nothing", "not an id!"])
def test_hub_id_that_is_not_at_hand(name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"no model {name}: not a folder here, and the Hub says")):
        find_model(name)


# ---- what it says


def test_identity_covers_names_and_shapes_not_values(llama: TinyModel, tmp_path: Path) -> None:
    folder = copy_folder(llama.folder, tmp_path / "tuned")
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    assert open_checkpoint(folder).identity.fingerprint == llama.identity.fingerprint
    tensors["model.norm.weight"] = torch.zeros(63)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    assert open_checkpoint(folder).identity.fingerprint != llama.identity.fingerprint
    assert llama.identity.num_layers == NUM_LAYERS
    assert llama.identity.model_type == "llama"


def test_name_is_the_folder_s(llama: TinyModel) -> None:
    assert open_checkpoint(llama.folder).name == llama.folder.name


def test_number_of_bytes(tiny_model: TinyModel) -> None:
    tensors = safetensors.torch.load_file(tiny_model.folder / WEIGHTS_FILE)
    assert tiny_model.checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_dtype(llama: TinyModel, tmp_path: Path) -> None:
    assert llama.checkpoint.dtype == "F32"
    folder = copy_folder(llama.folder, tmp_path / "mixed")
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="are of several dtypes: F16, F32"):
        _ = open_checkpoint(folder).dtype


# ---- reading and copying


def as_torch(record: TensorRecord) -> torch.Tensor:
    array = np.array(read_tensor(record))
    if record.dtype == "BF16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def assert_same_tensors(records: Mapping[str, TensorRecord], expected: Mapping[str, torch.Tensor]) -> None:
    assert records.keys() == expected.keys()
    for name, record in records.items():
        assert torch.equal(as_torch(record), expected[name]), name


def test_read_tensor_is_what_the_library_reads(tiny_model: TinyModel) -> None:
    assert_same_tensors(tiny_model.checkpoint.tensors, safetensors.torch.load_file(tiny_model.folder / WEIGHTS_FILE))


@pytest.mark.parametrize("kept", [range(NUM_LAYERS), (0, 2, 5), (4,)])
def test_copy_is_what_the_library_would_write(tiny_model: TinyModel, tmp_path: Path, kept: Any) -> None:
    kept = tuple(kept)
    records = copy_tensors(layer_tensor_order(tiny_model.checkpoint, kept), tmp_path / "out")
    expected = {}
    for name, tensor in safetensors.torch.load_file(tiny_model.folder / WEIGHTS_FILE).items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
            if int(match[1]) not in kept:
                continue
            name = f"model.layers.{kept.index(int(match[1]))}.{match[2]}"
        expected[name] = tensor
    written = safetensors.torch.load_file(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert_same_tensors(records, expected)
    assert records == read_header(tmp_path / "out")


def test_copy_of_shards_is_the_copy_of_one_file(sharded: Path, llama: TinyModel, tmp_path: Path) -> None:
    kept = (0, 1, 4)
    copy_tensors(layer_tensor_order(llama.checkpoint, kept), tmp_path / "one")
    copy_tensors(layer_tensor_order(open_checkpoint(sharded), kept), tmp_path / "many")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_copy_is_deterministic_and_starts_on_a_page(llama: TinyModel, tmp_path: Path) -> None:
    order = layer_tensor_order(llama.checkpoint, (1, 2))
    for name in ("first", "second"):
        copy_tensors(order, tmp_path / name)
    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert (8 + struct.unpack("<Q", content[:8])[0]) % PAGE == 0


def test_copy_keeps_dtypes_that_it_does_not_know_how_to_decode(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "long": torch.arange(3),
        "double": torch.rand(3, dtype=torch.float64),
        "half": torch.rand(5).half(),
        "brain": torch.rand(5).bfloat16(),
        "single": torch.rand(5),
        "none": torch.zeros(0, 4),
    }
    safetensors.torch.save_file(tensors, tmp_path / "in")
    copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "converted", dtype="F16")
    converted = safetensors.torch.load_file(tmp_path / "converted")
    for name, tensor in tensors.items():
        wanted = tensor.half() if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) else tensor
        assert converted[name].dtype == wanted.dtype
        assert torch.equal(converted[name], wanted)


def test_storage_order_puts_what_one_product_reads_side_by_side(get_model: Callable[[str], TinyModel]) -> None:
    names = [name for name, _ in layer_tensor_order(get_model("llama-biased").checkpoint, (3,))]
    assert names == [
        "model.embed_tokens.weight",
        *(
            f"model.layers.0.{suffix}"
            for suffix in (
                "input_layernorm.weight",
                *(f"self_attn.{part}_proj.weight" for part in "qkv"),
                *(f"self_attn.{part}_proj.bias" for part in "qkv"),
                "self_attn.o_proj.weight",
                "self_attn.o_proj.bias",
                "post_attention_layernorm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.gate_proj.bias",
                "mlp.up_proj.bias",
                "mlp.down_proj.weight",
                "mlp.down_proj.bias",
            )
        ),
        "lm_head.weight",
        "model.norm.weight",
    ]


def test_tied_head_is_not_written_twice(get_model: Callable[[str], TinyModel], tmp_path: Path) -> None:
    source = get_model("llama-tied-small-heads")
    folder = copy_folder(source.folder, tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    names = [name for name, _ in layer_tensor_order(open_checkpoint(folder), range(NUM_LAYERS))]
    assert "lm_head.weight" not in names
    assert len(names) == len(source.checkpoint.tensors)


# ---- conversion


@pytest.mark.parametrize("before", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("after", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_conversion_rounds_as_torch_does(tmp_path: Path, before: torch.dtype, after: torch.dtype, name: str) -> None:
    tensors = {
        "wide": torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(before),
        "special": torch.tensor([0.0, -0.0, 1e-7, 2.0**-24, 65504.0, torch.inf, -torch.inf]).to(before),
    }
    if before is torch.bfloat16 and after is torch.float16:
        tensors["special"] = tensors["special"].clamp(max=60000.0)  # 65504 is 65536 there: too much for float16
    safetensors.torch.save_file(tensors, tmp_path / "in")
    copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "out", dtype=name)
    for key, tensor in safetensors.torch.load_file(tmp_path / "out").items():
        assert tensor.dtype is after
        assert torch.equal(tensor, tensors[key].to(after))


@pytest.mark.parametrize("value", [65520.0, -1e5, 3e38])
def test_overflow_names_the_tensor(tmp_path: Path, value: float) -> None:
    tensors = {"fine": torch.ones(3), "model.layers.1.mlp.up_proj.weight": torch.tensor([1.0, value])}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    with pytest.raises(CheckpointError) as caught:
        copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "out", dtype="F16")
    assert caught.value.message == "model.layers.1.mlp.up_proj.weight has values that are infinite in F16"
    assert caught.value.hint == "export with --precision bf16 or fp32"


def test_conversion_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voidprune.models.tensors._CHUNK", 64)
    tensors = {"a": torch.randn(37, 5), "b": torch.randn(16), "c": torch.arange(9)}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    copy_tensors(read_header(tmp_path / "in").items(), tmp_path / "out", dtype="BF16")
    written = safetensors.torch.load_file(tmp_path / "out")
    assert torch.equal(written["a"], tensors["a"].bfloat16())
    assert torch.equal(written["b"], tensors["b"].bfloat16())
    assert torch.equal(written["c"], tensors["c"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A quarter of a gigabyte, copied and converted by a process that may not have that much."""
    size = 1 << 28
    write_raw(tmp_path / "in", {"big": entry([size // 4], 0, size)}, b"")
    with (tmp_path / "in").open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)  # zeros that take no room on the disk
    script = f"""
import numpy, ml_dtypes, re
from pathlib import Path
from voidprune.models.checkpoint import copy_tensors, read_header

def largest():  # getrusage would say what the process of the tests has
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path({str(tmp_path)!r})
before = largest()
records = read_header(folder / "in")
copy_tensors(records.items(), folder / "copy")
copy_tensors(records.items(), folder / "half", dtype="F16")
print(largest() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120_000_000
    assert (tmp_path / "copy").stat().st_size > size
    for name in ("in", "copy", "half"):
        (tmp_path / name).unlink()


def test_checkpoint_holds_no_weights(llama: TinyModel) -> None:
    checkpoint: Checkpoint = open_checkpoint(llama.folder)
    assert all(type(record) is TensorRecord for record in checkpoint.tensors.values())
