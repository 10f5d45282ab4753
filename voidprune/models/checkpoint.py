"""Checkpoints: model folders with safetensors weights. Find them, check them, say what they are. No torch.

A folder holds either `model.safetensors` or an index `model.safetensors.index.json` whose `weight_map` names the shard of each
tensor. What a file says about its tensors is read in `tensors.py`; new files are written in `copying.py`; models on the Hub of
which only a part is fetched are opened in `remote.py`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voidprune.errors import CheckpointError, ModelError
from voidprune.models.architecture import DecoderArchitecture
from voidprune.models.copying import INDEX_FILE, PAGE, WEIGHTS_FILE, copy_tensors
from voidprune.models.downloads import access_hint
from voidprune.models.families import read_architecture
from voidprune.models.packed import PackedRecord, find_packed, read_packed
from voidprune.models.tensors import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    PRECISIONS,
    TensorRecord,
    header_hash,
    numpy_dtype,
    precision_name,
    read_header,
    read_tensor,
    stored_bytes,
)
from voidprune.schedule import ModelIdentity, Phase

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*",
               "README.md")  # fmt: skip
"""What is fetched from the Hub besides weights: configuration, tokenizer, chat templates, licence, model card."""
OTHER_WEIGHTS = ("consolidated*", "original/*", "onnx/*")
"""The same model once more, in other formats."""

# What other rooms need of a checkpoint's files, they find here.
__all__ = [
    "DTYPE_BYTES",
    "FLOAT_DTYPES",
    "INDEX_FILE",
    "PAGE",
    "PRECISIONS",
    "WEIGHTS_FILE",
    "Checkpoint",
    "TensorRecord",
    "check_tensors",
    "copy_tensors",
    "find_model",
    "header_hash",
    "layer_tensor_groups",
    "layer_tensor_order",
    "merge_shards",
    "numpy_dtype",
    "open_checkpoint",
    "open_packed",
    "parse_index",
    "precision_name",
    "read_header",
    "read_json",
    "read_tensor",
    "refuse_packed",
    "refuse_pickles",
    "stored_bytes",
    "weight_files",
    "weights_hash",
]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config, and where each tensor lies. Nothing of the weights is in memory.

    `revision` is the commit of a model that is fetched from the Hub piece by piece, None where all of it is in the folder.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]
    revision: str | None = None

    @functools.cached_property
    def architecture(self) -> DecoderArchitecture:
        return read_architecture(self.config)

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """Fingerprint: SHA-256 over the model type and the sorted names and shapes of all tensors."""
        lines = [f"{record.name} {list(record.shape)}\n" for record in self.tensors.values()]
        text = f"{self.config['model_type']}\n" + "".join(sorted(lines))
        return ModelIdentity(
            name=self.name,
            model_type=self.config["model_type"],
            num_layers=self.architecture.num_layers,
            fingerprint="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.num_bytes for record in self.tensors.values())

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed for ONNX graphs (`models/packed.py`), which transformers does not read."""
        return any(isinstance(record, PackedRecord) for record in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtype of the weight matrices, in safetensors' spelling. Raises CheckpointError when they are mixed.

        Of a quantized checkpoint that of its embedding, in which it computes; with packed matrices, that of all the rest.
        """
        if self.is_packed:
            return next(record.scales.dtype for record in self.tensors.values() if isinstance(record, PackedRecord))
        matrices = [record for record in self.tensors.values() if len(record.shape) == 2]
        if self.config.get("quantization_config"):
            matrices = [self.tensors[f"{self.architecture.spec.tensors.embedding}.weight"]]
        dtypes = {record.dtype for record in matrices}
        if len(dtypes) != 1:
            raise CheckpointError(f"the matrices of {self.folder} are of several dtypes: {', '.join(sorted(dtypes))}")
        (dtype,) = dtypes
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"the matrices of {self.folder} are {dtype}; {', '.join(FLOAT_DTYPES)} are supported")
        return dtype


def find_model(name: str) -> Path:
    """The folder of a model: itself when it is one, else a snapshot from the Hugging Face Hub.

    Only configuration, tokenizer and safetensors files are fetched. Raises ModelError.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{name} is a file, not a model folder")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no model at {name}", hint="give a folder with config.json and model.safetensors, or a Hub id"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                ignore_patterns=list(OTHER_WEIGHTS),
                allow_patterns=["*.safetensors", *SMALL_FILES],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model {name}: not a folder here, and the Hub says: {reason}",
            hint=access_hint(error),
        ) from error


def open_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read config and headers, and check that every tensor lies inside its file.

    A folder whose only weights are packed matrices for ONNX graphs is opened as `open_packed` does. Raises ModelError where this
    is no model folder or of an unknown family, CheckpointError where its weights are broken.
    """
    packed = find_packed(folder)
    if packed is not None and not _has_plain_weights(folder):
        return open_packed(packed, name=name)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json", hint="give a folder with config.json and model.safetensors, or a Hub id"
        )
    config = read_json(folder / "config.json")
    read_architecture(config)
    files = _expected_tensors(folder)
    tensors = merge_shards(
        {file.name: read_header(file) for file in files},
        {file.name: expected for file, expected in files.items()},
        place=str(folder),
    )
    checkpoint = Checkpoint(folder=folder, name=name or folder.resolve().name, config=config, tensors=tensors)
    check_tensors(checkpoint)
    return checkpoint


def open_packed(file: Path, *, phase: Phase = Phase.DECODE, name: str | None = None) -> Checkpoint:
    """The checkpoint of the packed matrices that a phase of a bundle reads, with the config.json beside them.

    Raises as `open_checkpoint` does.
    """
    folder = file.parent
    config = read_json(folder / "config.json")
    read_architecture(config)
    checkpoint = Checkpoint(
        folder=folder, name=name or folder.resolve().name, config=config, tensors=read_packed(file, phase)
    )
    check_tensors(checkpoint)
    return checkpoint


def merge_shards(
    shards: Mapping[str, Mapping[str, TensorRecord]], expected: Mapping[str, set[str] | None], *, place: str
) -> dict[str, TensorRecord]:
    """The tensors of all shards of the model at `place`. Raises CheckpointError where they are not what the index says."""
    tensors: dict[str, TensorRecord] = {}
    for file, records in shards.items():
        if lost := (expected[file] or set()) - records.keys():
            raise CheckpointError(f"{INDEX_FILE} says that {file} holds {sorted(lost)[0]}; it does not")
        if twice := tensors.keys() & records.keys():
            raise CheckpointError(f"{sorted(twice)[0]} is in {file} and in another shard of {place}")
        tensors.update(records)
    return tensors


def check_tensors(checkpoint: Checkpoint) -> None:
    """Embedding and head are there; every layer that the config counts has tensors, and no other has."""
    names = checkpoint.architecture.spec.tensors
    for name in (names.embedding, *(() if checkpoint.architecture.tied_embeddings else (names.head,))):
        if f"{name}.weight" not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.folder} holds no {name}.weight, which its config asks for")
    num_layers = checkpoint.architecture.num_layers
    places = (checkpoint.architecture.spec.tensors.layer_of(name) for name in checkpoint.tensors)
    found = {place[0] for place in places if place is not None}
    if missing := set(range(num_layers)) - found:
        raise CheckpointError(
            f"{checkpoint.folder} holds no tensor of layer {min(missing)}; its config counts {num_layers}"
        )
    if extra := found - set(range(num_layers + checkpoint.architecture.num_extra_layers)):
        raise ModelError(
            f"{checkpoint.folder} has tensors of layer {min(extra)}, beyond the {num_layers} layers of its config",
            hint="layers for multi-token prediction must be counted in the config (num_nextn_predict_layers)",
        )


def _has_plain_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def _expected_tensors(folder: Path) -> dict[Path, set[str] | None]:
    """The files with the weights; for shards, with the tensors that the index expects in each."""
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    if (folder / INDEX_FILE).is_file():
        shards = parse_index(read_json(folder / INDEX_FILE), place=str(folder / INDEX_FILE))
        for shard in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder} lacks the shard {shard} that its index names")
        return {folder / shard: set(names) for shard, names in shards.items()}
    refuse_pickles(str(folder), sorted(path.name for path in folder.iterdir()))
    raise ModelError(f"{folder} holds no {WEIGHTS_FILE}", hint="give a folder with safetensors weights, or a Hub id")


def parse_index(index: Mapping[str, Any], *, place: str) -> dict[str, set[str]]:
    """The shards that an index names, each with the tensors that it is said to hold. Raises CheckpointError."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{place} has no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{INDEX_FILE} names {shard!r} for {tensor}, outside of its folder")
        shards.setdefault(shard, set()).add(tensor)
    return shards


def refuse_packed(folder: Path) -> None:
    """Raise ModelError for a folder that only has matrices packed for its ONNX graphs."""
    if find_packed(folder) is not None and not _has_plain_weights(folder):
        raise ModelError(
            f"{folder} holds packed matrices for its ONNX graphs, and no weights for anything else",
            hint="use the model that it was exported from, or export with --format hf --format onnx",
        )


def refuse_pickles(model: str, files: Sequence[str]) -> None:
    """Raise ModelError where the weights of a model are pickles: reading one runs whatever its author put into it."""
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and "/" not in name]
    if not pickles:
        return
    script = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({model!r}, dtype='auto')"
        f".save_pretrained({(model if Path(model).is_dir() else Path(model).name)!r})"
    )
    raise ModelError(
        f"{model} holds {pickles[0]} but no {WEIGHTS_FILE}; pickle files are not read",
        hint=f"if you trust its author, convert it: python -c {shlex.quote(script)}",
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder that transformers reads, in order. Raises ModelError, CheckpointError."""
    return sorted(_expected_tensors(folder))


def weights_hash(folder: Path) -> str:
    """SHA-256 over the headers of all of a folder's weight files; for a lone model.safetensors, its `header_hash`. Cheap."""
    packed = find_packed(folder)
    files = [] if packed is None else [packed]
    if packed is None or _has_plain_weights(folder):
        files += weight_files(folder)
    if len(files) == 1 and files[0].name == WEIGHTS_FILE:
        return header_hash(files[0])
    lines = "".join(f"{file.name} {header_hash(file)}\n" for file in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of somebody else's model folder. Raises ModelError."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object")
    return document


def layer_tensor_order(checkpoint: Checkpoint, kept: Sequence[int]) -> list[tuple[str, TensorRecord]]:
    """The tensors of the checkpoint that holds only the layers `kept`: (new name, where the bytes are now), in storage order.

    Embedding first, then the layers with q, k, v and gate, up side by side, then the rest. A tied head is not written.
    """
    architecture = checkpoint.architecture
    names = architecture.spec.tensors
    preferred = {suffix: rank for rank, suffix in enumerate(names.storage_order)}
    new_index = {layer: position for position, layer in enumerate(kept)}
    ordered: list[tuple[tuple[int, int, int, str], str, TensorRecord]] = []
    for name, record in checkpoint.tensors.items():
        if architecture.tied_embeddings and name == f"{names.head}.weight":
            continue
        place = names.layer_of(name)
        if place is None:
            ordered.append(((0 if name.startswith(names.embedding) else 2, 0, 0, name), name, record))
        elif place[0] in new_index:
            position, suffix = new_index[place[0]], place[1]
            rank = (1, position, preferred.get(suffix, len(preferred)), suffix)
            ordered.append((rank, names.layer(position, suffix), record))
    return [(name, record) for _, name, record in sorted(ordered, key=lambda row: row[0])]


def layer_tensor_groups(checkpoint: Checkpoint, kept: Sequence[int]) -> list[list[tuple[str, TensorRecord]]]:
    """`layer_tensor_order`, with the tensors together that one initializer of a graph spans: a shard may not part them."""
    names = checkpoint.architecture.spec.tensors
    parts = {part: number for number, group in enumerate(((names.query, names.key, names.value), (names.gate, names.up)))
             for part in group}  # fmt: skip

    def spanned_by(named: tuple[str, TensorRecord]) -> tuple[object, ...]:
        place = names.layer_of(named[0])
        if place is not None:
            part, _, kind = place[1].rpartition(".")
            if part in parts:
                return (place[0], parts[part], kind)
        return (named[0],)

    return [list(group) for _, group in itertools.groupby(layer_tensor_order(checkpoint, kept), key=spanned_by)]
