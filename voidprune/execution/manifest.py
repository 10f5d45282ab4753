"""`voidprune.json`: what a bundle says of itself. A pure value; the folder around it is described in `export/bundle.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from voidprune import artifacts
from voidprune.errors import ArtifactError, ModelError
from voidprune.execution.kv_cache import KvCache
from voidprune.execution.packing_record import Quantization
from voidprune.models.checkpoint import FLOAT_DTYPES, precision_name
from voidprune.schedule import Phase, Scalar, Schedule

FILE = "voidprune.json"
KIND, VERSION = "bundle", 1
OPERATORS = ("ort", "standard")


@dataclass(frozen=True)
class Graph:
    """One phase's graph: its file, and the cache slots that it reads and writes."""

    file: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Parity:
    """How far the export is from the reference.

    The largest absolute difference of logits found over prefill, decode and a second turn, at batch 1 and 2, and the
    tolerance that it had to stay within. `onnx` is None where no graph was written. With `layer_streamed`, source and
    checkpoint were too large for the memory: decoder layers were loaded one at a time, for one pass over prompts and
    responses without a cache, or, where the phases have matrices of their own, for short ones with it.

    `hf` is None where the folder holds no weights for transformers. The reference of graphs with packed matrices runs with what
    these matrices mean. `rounded` is the difference of graphs that round activations to 8 bits, `rounded_tolerance` what that
    had to stay within: twice the difference that the same rounding makes in the reference; `onnx` is then that of the same
    graphs without rounding. `kv` and `kv_tolerance` are of graphs that hold K/V in 8 bits, beside a reference that does so:
    `kv_tolerance` is what that changes in the reference, and what the graphs may differ by without it; all else is then of graphs
    that hold K/V as they compute them.
    """

    hf: float | None
    onnx: float | None
    tolerance: float
    num_prompts: int
    num_decode_steps: int
    layer_streamed: bool = False
    rounded: float | None = None
    rounded_tolerance: float | None = None
    kv: float | None = None
    kv_tolerance: float | None = None

    def __post_init__(self) -> None:
        if type(self.layer_streamed) is not bool:
            raise ValueError(f"layer_streamed is {self.layer_streamed!r}")
        numbers = (self.tolerance, self.num_prompts, self.num_decode_steps)
        optional = (self.hf, self.onnx, self.rounded, self.rounded_tolerance, self.kv, self.kv_tolerance)
        if not all(type(number) in (int, float) for number in (*numbers, *(number or 0 for number in optional))):
            raise ValueError("a figure of the parity is not a number")

    def to_document(self) -> dict[str, Any]:
        """As it was before K/V could be held in 8 bits, where they are not."""
        document = asdict(self)
        if self.kv is None:
            del document["kv"], document["kv_tolerance"]
        return document


@dataclass(frozen=True)
class HeldOutLoss:
    """Nats a response token on the samples that healing held out: of the whole model, and of the pruned one before and after."""

    num_samples: int
    num_tokens: int
    whole: float
    before: float
    after: float

    def describe(self) -> str:
        """As perplexities."""
        whole, before, after = (f"{math.exp(min(loss, 700.0)):.4g}" for loss in (self.whole, self.before, self.after))
        return f"perplexity {before} before, {after} after, {whole} of the whole model"

    def __post_init__(self) -> None:
        if any(type(value) is not int or value < 1 for value in (self.num_samples, self.num_tokens)):
            raise ValueError("the held-out samples of the healing are not counted")
        if any(type(value) not in (int, float) for value in (self.whole, self.before, self.after)):
            raise ValueError("a loss of the healing is not a number")


@dataclass(frozen=True)
class Healing:
    """How a bundle was healed.

    `methods` in their order; `settings` and `outcomes` of each, by its name, are plain JSON. `samples` is the fingerprint of the
    data (see `calibration.fingerprint_samples`), `prompts` the hashes of all its prompts, fitted or held out: what a model was
    healed with it may not be evaluated on. `origin` is what else `voidprune heal` was asked for, by the names of its options; files
    that older versions wrote have none.
    """

    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    outcomes: Mapping[str, Any]
    samples: str
    prompts: tuple[str, ...]
    held_out: HeldOutLoss
    origin: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.origin, Mapping) or not all(isinstance(one, Scalar) for one in self.origin.values()):
            raise ValueError("the origin of the healing holds more than plain values")
        if not self.methods or not all(type(text) is str for text in (*self.methods, self.samples, *self.prompts)):
            raise ValueError("the methods, samples or prompts of the healing are not texts")
        if not all(
            isinstance(found, Mapping) and set(found) <= set(self.methods) for found in (self.settings, self.outcomes)
        ):
            raise ValueError("the settings and outcomes of the healing are not those of its methods")

    @property
    def has_helped(self) -> bool:
        """Whether any weight is other than the source's: only what is better on held-out samples is kept."""
        return self.held_out.after < self.held_out.before

    @classmethod
    def from_document(cls, document: Any) -> Healing:
        """Raises TypeError, ValueError, KeyError."""
        rest = {name: value for name, value in document.items() if name not in ("methods", "prompts", "held_out")}
        return cls(
            methods=tuple(document["methods"]),
            prompts=tuple(document["prompts"]),
            held_out=HeldOutLoss(**document["held_out"]),
            **rest,
        )


@dataclass(frozen=True)
class Manifest:
    """A bundle. `schedule` speaks of the original model; `kept_layers[i]` is the original number of layer i of the checkpoint.

    `slots[s]` is the original number of the layer in cache slot s. `source_bytes` is the size of the source's
    weights, `source_revision` its commit where it was fetched from the Hub piece by piece; `weights_header` is the SHA-256 of
    the headers of ours (see `checkpoint.weights_hash`); `files` maps each file to its SHA-256, `sizes` to its bytes. `operators`
    is the operator set of the graphs: "ort" or "standard".
    `dtype` is that of the weights for transformers; with a `quantization`, the graphs read packed matrices, and compute in what its
    `activations` say.
    `kv_cache` is None where the graphs hold keys and values in the dtype that they compute in. `healing` is None where the weights
    are the source's.
    """

    schedule: Schedule
    kept_layers: tuple[int, ...]
    slots: tuple[int, ...]
    dtype: str
    context_length: int
    graphs: Mapping[Phase, Graph]
    source: str
    source_bytes: int
    weights_header: str
    files: Mapping[str, str]
    sizes: Mapping[str, int]
    parity: Parity | None
    written_by: str
    source_revision: str | None = None
    operators: str = "ort"
    quantization: Quantization | None = None
    kv_cache: KvCache | None = None
    healing: Healing | None = None

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.sizes if name.endswith(".safetensors")))

    @property
    def weight_bytes(self) -> int:
        return sum(self.sizes[name] for name in self.weight_files)

    @property
    def precision(self) -> str:
        """Of the weights that the graphs read, as the command line names it."""
        return precision_name(self.dtype) if self.quantization is None else self.quantization.precision

    @property
    def fitted_prompts(self) -> frozenset[str]:
        """Hashes (see `healing.training_data.prompt_hash`) of the prompts that weights or K/V were healed with or rounded on."""
        parts = (self.healing, self.quantization, self.kv_cache)
        return frozenset().union(*(part.prompts for part in parts if part is not None))

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Of one layer, where the graphs hold keys and values otherwise than they compute them."""
        return None if self.kv_cache is None else self.kv_cache.bytes_per_token

    @property
    def has_checkpoint(self) -> bool:
        """Whether transformers finds weights in the folder."""
        return self.quantization is None or len(self.weight_files) > 1

    @property
    def is_exact(self) -> bool:
        """Whether the graphs compute in float32 throughout, keep K/V in it, and so must give the responses of the reference."""
        computed = self.dtype == "F32" if self.quantization is None else self.quantization.activations == "fp32"
        return computed and self.kv_cache is None

    @property
    def graph_weight_files(self) -> tuple[str, ...]:
        """Those that the graphs read."""
        return self.weight_files if self.quantization is None else (self.quantization.file,)

    @property
    def graph_weight_bytes(self) -> int:
        return sum(self.sizes[name] for name in self.graph_weight_files)

    def __post_init__(self) -> None:
        """Raises ValueError where the parts do not fit together."""
        if (self.kept_layers, self.slots) != (self.schedule.union, self.schedule.kv_layers):
            raise ValueError("kept_layers and slots are not those of the schedule")
        if set(self.graphs) not in (set(), set(Phase)):
            raise ValueError("there is one graph, not one for each phase")
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}")
        if self.operators not in OPERATORS:
            raise ValueError(f"operators is {self.operators!r}")
        for name in (*self.files, *self.sizes):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name} lies outside of its folder")
        if self.kv_cache is not None and (not self.graphs or self.operators != "ort"):
            raise ValueError("kv_cache is of graphs that cannot hold it")
        if self.parity is not None and self.parity.kv is not None and self.kv_cache is None:
            raise ValueError("parity.kv is of a kv_cache that is not there")
        if self.quantization is not None:
            if self.quantization.file not in self.sizes:
                raise ValueError(f"{self.quantization.file} is not among its files")
            if len(self.quantization.layer_bits) != len(self.kept_layers):
                raise ValueError("layer_bits are of another number of layers")
        for phase, graph in self.graphs.items():
            if not set(graph.slots) <= set(range(len(self.slots))):
                raise ValueError(f"the graph of {phase} uses slots that do not exist")
        for name, value, kind in (
            ("context_length", self.context_length, int),
            ("source", self.source, str),
            ("source_revision", self.source_revision or "", str),
            ("source_bytes", self.source_bytes, int),
            ("weights_header", self.weights_header, str),
            ("written_by", self.written_by, str),
            *((f"files.{name}", value, str) for name, value in self.files.items()),
            *((f"sizes.{name}", value, int) for name, value in self.sizes.items()),
        ):
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise ValueError(f"{name} is {value!r}")

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key(KIND, VERSION),
            "schedule": self.schedule.to_document(),
            "kept_layers": list(self.kept_layers),
            "slots": list(self.slots),
            "dtype": self.dtype,
            "context_length": self.context_length,
            "graphs": {
                str(phase): {"file": graph.file, "slots": list(graph.slots)} for phase, graph in self.graphs.items()
            },
            "source": self.source,
            "source_revision": self.source_revision,
            "source_bytes": self.source_bytes,
            "weights_header": self.weights_header,
            "files": dict(self.files),
            "sizes": dict(self.sizes),
            "parity": None if self.parity is None else self.parity.to_document(),
            "quantization": None if self.quantization is None else self.quantization.to_document(),
            "written_by": self.written_by,
            "operators": self.operators,
            **({} if self.kv_cache is None else {"kv_cache": self.kv_cache.to_document()}),
            **({} if self.healing is None else {"healing": asdict(self.healing)}),
        }

    @classmethod
    def from_document(cls, document: artifacts.Document, *, place: str) -> Manifest:
        optional = {"source_revision", "operators", "quantization", "kv_cache", "healing"}
        required = {"schema", *cls.__dataclass_fields__} - optional
        artifacts.check_keys(document, required=required, optional=optional, place=place)
        try:
            parity, quantization, healing = document["parity"], document.get("quantization"), document.get("healing")
            kv_cache = document.get("kv_cache")
            return cls(
                schedule=Schedule.from_document(document["schedule"], place=f"{place}: schedule"),
                kept_layers=tuple(document["kept_layers"]),
                slots=tuple(document["slots"]),
                dtype=document["dtype"],
                context_length=document["context_length"],
                graphs={
                    Phase(phase): Graph(file=_plain_name(graph["file"], place), slots=tuple(graph["slots"]))
                    for phase, graph in document["graphs"].items()
                },
                source=document["source"],
                source_revision=document.get("source_revision"),
                source_bytes=document["source_bytes"],
                weights_header=document["weights_header"],
                files=dict(document["files"]),
                sizes=dict(document["sizes"]),
                parity=None if parity is None else Parity(**parity),
                written_by=document["written_by"],
                operators=document.get("operators", "ort"),
                quantization=None if quantization is None else Quantization.from_document(quantization),
                kv_cache=None if kv_cache is None else KvCache.from_document(kv_cache),
                healing=None if healing is None else Healing.from_document(healing),
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{place} is broken: {error}", hint="export the model again") from error


def _plain_name(name: Any, place: str) -> str:
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ArtifactError(f"{place} names the file {name!r}, outside of its folder")
    return name


def packs_weights(dtype: str, *, quantized: bool) -> bool:
    """Whether CPU sessions rewrite matrices into the order in which their kernels read them: a copy each.

    Not dense float32: the mapped file is then all the memory that any number of sessions takes, and decode is about a tenth
    slower. Quantized matrices have to be packed, or they are 12 to 50 times slower, and 16-bit ones are widened in any case.
    """
    return quantized or dtype != "F32"


def is_bundle(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Raises ModelError where the folder is no bundle, ArtifactError where its description is broken."""
    if not is_bundle(folder):
        raise ModelError(f"{folder} is not a bundle: it holds no {FILE}", hint="write one with voidprune export")
    document = artifacts.read_document(folder / FILE, kind=KIND, version=VERSION)
    return Manifest.from_document(document, place=str(folder / FILE))
