"""The slim Hugging Face checkpoint: kept layers renumbered, config remapped, everything else carried over.

The output loads in stock `AutoModelForCausalLM` without remote code. Weights are byte ranges; see `models/checkpoint.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voidprune.errors import ModelError
from voidprune.models.checkpoint import (
    PRECISIONS,
    WEIGHTS_FILE,
    Checkpoint,
    TensorRecord,
    copy_tensors,
    layer_tensor_order,
    read_json,
    read_tensor,
)
from voidprune.models.configs import loadable_generation_config, remap_config

_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.tiktoken",
            "chat_template*", "LICENSE*", "NOTICE*")  # fmt: skip


def write_slim_checkpoint(source: Checkpoint, kept: Sequence[int], folder: Path, *, precision: str = "keep") -> None:
    """Write the checkpoint that holds only the layers `kept` (ascending, original numbers) into an existing folder.

    `precision` is "keep" or a key of PRECISIONS. Raises ModelError, CheckpointError.
    """
    names = source.architecture.spec.tensors
    head, embedding = source.tensors.get(f"{names.head}.weight"), source.tensors[f"{names.embedding}.weight"]
    if source.architecture.tied_embeddings and head is not None and not _same_values(head, embedding):
        raise ModelError(
            f"{source.folder} ties its embeddings by config.json, but holds another {head.name}",
            hint="set tie_word_embeddings to what is meant",
        )
    dtype = None if precision == "keep" else PRECISIONS[precision]
    config = remap_config(source.config, source.architecture.spec, kept)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = _TORCH_DTYPES[dtype]
    config.pop("auto_map", None)
    copy_tensors(layer_tensor_order(source, kept), folder / WEIGHTS_FILE, dtype=dtype)
    _write_json(folder / "config.json", config)
    _write_generation_config(source.folder, folder)
    for pattern in _CARRIED:
        for file in sorted(source.folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _same_values(one: TensorRecord, other: TensorRecord) -> bool:
    import numpy as np

    return one.shape == other.shape and np.array_equal(read_tensor(one), read_tensor(other))


def _write_generation_config(source: Path, folder: Path) -> None:
    """Carry it over, without what transformers refuses."""
    path = source / "generation_config.json"
    if not path.is_file():
        return
    _write_json(folder / "generation_config.json", loadable_generation_config(read_json(path)))


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
