"""safetensors checkpoints as bytes: find them, check them, read tensors lazily, write new ones by copying ranges. No torch.

The format (https://huggingface.co/docs/safetensors): eight bytes N, little endian; N bytes of JSON, name -> dtype, shape,
[begin, end) offsets behind the header; the tensors, without holes. A folder holds either `model.safetensors` or an index
`model.safetensors.index.json` whose `weight_map` names the shard of each tensor.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from voidprune.errors import CheckpointError, ModelError
from voidprune.models.architecture import DecoderArchitecture
from voidprune.models.families import read_architecture
from voidprune.schedule import ModelIdentity

if TYPE_CHECKING:
    import numpy as np

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PAGE = 4096  # headers are padded so that the data starts on a page and can be mapped by others
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 24

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F32", "F16", "BF16")
PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Names on the command line, and those of safetensors."""


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: `num_bytes` bytes at `offset` (from the start of the file) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config, and where each tensor lies. Nothing of the weights is in memory."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]

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
    def dtype(self) -> str:
        """The dtype of the weight matrices, in safetensors' spelling. Raises CheckpointError when they are mixed.

        Of a quantized checkpoint that of its embedding, in which it computes.
        """
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
                ignore_patterns=["consolidated*", "original/*"],  # the same weights once more
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no model {name}: not a folder here, and the Hub says: {reason}",
            hint="check the spelling; offline, give the path of a local folder",
        ) from error


def open_checkpoint(folder: Path, *, name: str | None = None) -> Checkpoint:
    """Read config and headers, and check that every tensor lies inside its file.

    Raises ModelError where this is no model folder or of an unknown family, CheckpointError where its weights are broken.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json", hint="give a folder with config.json and model.safetensors, or a Hub id"
        )
    config = read_json(folder / "config.json")
    read_architecture(config)
    files = _weight_files(folder)
    tensors: dict[str, TensorRecord] = {}
    for file, expected in files.items():
        records = read_header(file)
        if expected is not None and (lost := expected - records.keys()):
            raise CheckpointError(f"{INDEX_FILE} says that {file.name} holds {sorted(lost)[0]}; it does not")
        if twice := tensors.keys() & records.keys():
            raise CheckpointError(f"{sorted(twice)[0]} is in {file.name} and in another shard of {folder}")
        tensors.update(records)
    checkpoint = Checkpoint(folder=folder, name=name or folder.resolve().name, config=config, tensors=tensors)
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: Checkpoint) -> None:
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


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with the weights; for shards, with the tensors that the index expects in each."""
    if (folder / WEIGHTS_FILE).is_file():
        return {folder / WEIGHTS_FILE: None}
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map")
        shards: dict[Path, set[str] | None] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{INDEX_FILE} names {shard!r} for {tensor}, outside of its folder")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder} lacks the shard {shard} that its index names")
            names = shards.setdefault(folder / shard, set())
            assert names is not None
            names.add(tensor)
        return shards
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds {pickles[0]} but no {WEIGHTS_FILE}; pickle files are not read",
            hint="convert it: load it in an environment that you trust, then save_pretrained(..., safe_serialization=True)",
        )
    raise ModelError(f"{folder} holds no {WEIGHTS_FILE}", hint="give a folder with safetensors weights, or a Hub id")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of somebody else's model folder. Raises ModelError."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object")
    return document


def read_header(file: Path) -> dict[str, TensorRecord]:
    """The tensors of one safetensors file. Raises CheckpointError where header and file do not fit together."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file} is {size} bytes long: no safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{file} says that its header has {length} bytes; the file has {size}")
        try:
            header = json.loads(opened.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} has a broken header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken header: not an object")
    header.pop("__metadata__", None)
    records = {name: _parse_record(name, entry, file, base=8 + length) for name, entry in header.items()}
    position = 8 + length
    for record in sorted(records.values(), key=lambda record: (record.offset, record.num_bytes)):
        if record.offset != position:
            raise CheckpointError(f"{file}: the data of {record.name} does not follow the tensor before it")
        position += record.num_bytes
    if position != size:
        raise CheckpointError(f"{file} is {size} bytes long; its header describes {position}: truncated or damaged")
    return records


def header_hash(file: Path) -> str:
    """SHA-256 of a file's header: names, dtypes, shapes and places of all tensors. Cheap, whatever the size of the file."""
    with file.open("rb") as opened:
        prefix = opened.read(8)
        return "sha256:" + hashlib.sha256(prefix + opened.read(*struct.unpack("<Q", prefix))).hexdigest()


def _parse_record(name: str, entry: Any, file: Path, *, base: int) -> TensorRecord:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError("sizes and offsets are whole numbers")
        expected = math.prod(shape) * DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header entry of {name} is broken ({error!r})") from error
    if end - begin != expected:
        raise CheckpointError(f"{file}: {name} is {dtype} {list(shape)}, {expected} bytes, but spans {end - begin}")
    return TensorRecord(name=name, dtype=dtype, shape=shape, file=file, offset=base + begin, num_bytes=expected)


def precision_name(dtype: str) -> str:
    """The command line's name of a float dtype in safetensors' spelling."""
    return next(name for name, stored in PRECISIONS.items() if stored == dtype)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a float tensor, in safetensors' spelling; bfloat16 through ml_dtypes."""
    import ml_dtypes
    import numpy as np

    types: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    found: np.dtype[Any] = np.dtype(types[dtype])
    return found


def stored_bytes(record: TensorRecord, dtype: str | None) -> int:
    """Bytes of a tensor when float tensors are stored in `dtype`; as it is when that is None."""
    target = dtype if dtype is not None and record.dtype in FLOAT_DTYPES else record.dtype
    return math.prod(record.shape) * DTYPE_BYTES[target]


def copy_tensors(
    tensors: Iterable[tuple[str, TensorRecord]], target: Path, *, dtype: str | None = None
) -> dict[str, TensorRecord]:
    """Write a safetensors file with these tensors, in this order, under these names.

    Without `dtype`, byte ranges are copied by the kernel and no tensor is decoded; neighbours in the source go in one range.
    With it, float tensors are converted piece by piece. Memory does not grow with the model. Returns the new records.
    Raises CheckpointError where a finite value becomes infinite in `dtype`, naming the tensor.
    """
    tensors = list(tensors)
    position, entries = 0, {}
    for name, record in tensors:
        new_dtype = dtype if dtype is not None and record.dtype in FLOAT_DTYPES else record.dtype
        length = stored_bytes(record, dtype)
        entries[name] = {
            "dtype": new_dtype,
            "shape": list(record.shape),
            "data_offsets": [position, position + length],
        }
        position += length
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for file, group in itertools.groupby((record for _, record in tensors), key=lambda record: record.file):
            with file.open("rb") as source:
                if dtype is None:
                    for offset, length in _merge_ranges(group):
                        _copy_range(source, out, offset, length)
                else:
                    for record in group:
                        _convert(source, out, record, dtype)
    return read_header(target)


def _merge_ranges(records: Iterable[TensorRecord]) -> Iterator[tuple[int, int]]:
    start = length = 0
    for record in records:
        if record.offset != start + length:
            if length:
                yield start, length
            start, length = record.offset, 0
        length += record.num_bytes
    if length:
        yield start, length


def _copy_range(source: BinaryIO, out: BinaryIO, offset: int, length: int) -> None:
    out.flush()
    while length:
        try:
            copied = os.copy_file_range(source.fileno(), out.fileno(), length, offset)
        except OSError:  # another file system, or a kernel that cannot
            copied = os.sendfile(out.fileno(), source.fileno(), offset, length)
        if copied == 0:
            raise CheckpointError(f"{source.name} ended while it was being copied")
        offset, length = offset + copied, length - copied
    out.seek(0, os.SEEK_END)


def _convert(source: BinaryIO, out: BinaryIO, record: TensorRecord, dtype: str) -> None:
    import numpy as np

    if record.dtype not in FLOAT_DTYPES or record.dtype == dtype:
        _copy_range(source, out, record.offset, record.num_bytes)
        return
    source.seek(record.offset)
    left = record.num_bytes
    while left:
        piece = np.frombuffer(source.read(min(_CHUNK, left)), dtype=numpy_dtype(record.dtype))
        with np.errstate(over="ignore"):
            converted = piece.astype(np.float32).astype(numpy_dtype(dtype))
        if not np.array_equal(np.isfinite(piece.astype(np.float32)), np.isfinite(converted.astype(np.float32))):
            raise CheckpointError(
                f"{record.name} has values that are infinite in {dtype}", hint="export with --precision bf16 or fp32"
            )
        out.write(converted.tobytes())
        left -= piece.nbytes


def read_tensor(record: TensorRecord) -> np.ndarray[Any, Any]:
    """One float tensor, mapped from its file. Nothing is read before it is used."""
    import numpy as np

    return np.memmap(record.file, dtype=numpy_dtype(record.dtype), mode="r", offset=record.offset, shape=record.shape)


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
