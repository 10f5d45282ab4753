"""The slim Hugging Face checkpoint: kept layers renumbered, config remapped, everything else carried over.

The output loads in stock `AutoModelForCausalLM` without remote code. Weights are byte ranges; see `models/copying.py`.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voidprune.errors import ModelError
from voidprune.models.checkpoint import PRECISIONS, Checkpoint, TensorRecord, layer_tensor_groups, read_json
from voidprune.models.configs import loadable_generation_config, remap_config
from voidprune.models.copying import write_weights
from voidprune.models.tensors import Advance, same_bytes, stored_bytes

_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What belongs to the model besides its weights: tokenizer, chat template, licence. Byte for byte, whatever the case of the name.
_CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken", "*.model",
            "sentencepiece*", "spiece*", "tekken*.json", "chat_template*", "license*", "licence*", "copying*", "notice*",
            "use_policy*")  # fmt: skip
_CARRIED_FOLDERS = ("additional_chat_templates", "licenses", "license")
_NEVER_CARRIED = (".py", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

DEFAULT_SHARD_BYTES = 5_000_000_000
"""As `save_pretrained` cut shards for years; its units are decimal."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_shard_size(text: str) -> int:
    """Bytes of a size as transformers spells it: "5GB", "500MB", "2GiB" or a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size such as 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ValueError(f"{text!r} is less than a byte")
    return size


def slim_tensors(source: Checkpoint, kept: Sequence[int]) -> list[TensorRecord]:
    """The tensors of the source that the slim checkpoint is made of."""
    return [record for group in layer_tensor_groups(source, kept) for _, record in group]


def slim_bytes(source: Checkpoint, kept: Sequence[int], *, precision: str = "keep") -> int:
    """Bytes of the tensors that `write_slim_checkpoint` writes."""
    return sum(stored_bytes(record, PRECISIONS.get(precision)) for record in slim_tensors(source, kept))


def write_slim_checkpoint(
    source: Checkpoint,
    kept: Sequence[int],
    folder: Path,
    *,
    precision: str = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    advance: Advance = lambda _amount: None,
) -> dict[str, str]:
    """Write the checkpoint that holds only the layers `kept` (ascending, original numbers) into an existing folder.

    `precision` is "keep" or a key of PRECISIONS. Returns `sha256:<hex>` of each weight file. `advance` is told the bytes of
    tensors written. Raises ModelError, CheckpointError.
    """
    groups = layer_tensor_groups(source, kept)
    write_slim_files(source, kept, folder, precision=precision)
    # Last, so that nothing is found wrong with the small files after an hour of copying.
    return write_weights(
        groups, folder, max_shard_bytes=max_shard_bytes, dtype=PRECISIONS.get(precision), advance=advance
    )


def write_slim_files(source: Checkpoint, kept: Sequence[int], folder: Path, *, precision: str = "keep") -> None:
    """All of the slim checkpoint but its weights: configuration, tokenizer, licence. Raises ModelError."""
    config = slim_config(source, kept, precision=precision)
    _write_json(folder / "config.json", config)
    _write_generation_config(source.folder, folder)
    _carry_files(source.folder, folder)


def slim_config(source: Checkpoint, kept: Sequence[int], *, precision: str = "keep") -> dict[str, Any]:
    """The config.json of the slim checkpoint. Raises ModelError where config and weights contradict each other."""
    names = source.architecture.spec.tensors
    head, embedding = source.tensors.get(f"{names.head}.weight"), source.tensors[f"{names.embedding}.weight"]
    if source.architecture.tied_embeddings and head is not None and not same_bytes(head, embedding):
        raise ModelError(
            f"{source.folder} ties its embeddings by config.json, but holds another {head.name}",
            hint="set tie_word_embeddings to what is meant",
        )
    config = remap_config(source.config, source.architecture.spec, kept)
    for key in ("dtype", "torch_dtype"):
        if key in config and precision in PRECISIONS:
            config[key] = _TORCH_DTYPES[PRECISIONS[precision]]
    config.pop("auto_map", None)
    return config


def _carry_files(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name.lower() in _CARRIED_FOLDERS:
            for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
                target = folder / inner.relative_to(source)
                if target.suffix.lower() not in _NEVER_CARRIED:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(inner, target)
        elif path.is_symlink() and not path.exists() and _is_carried(path):
            raise ModelError(f"{path} is a link to nothing", hint="fetch the model again, or remove the link")
        elif path.is_file() and _is_carried(path):
            shutil.copyfile(path, folder / path.name)


def _is_carried(path: Path) -> bool:
    wanted = any(fnmatch.fnmatchcase(path.name.lower(), pattern) for pattern in _CARRIED)
    return wanted and path.suffix.lower() not in _NEVER_CARRIED


def _write_generation_config(source: Path, folder: Path) -> None:
    """Carry it over, without what transformers refuses."""
    path = source / "generation_config.json"
    if not path.is_file():
        return
    _write_json(folder / "generation_config.json", loadable_generation_config(read_json(path)))


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
