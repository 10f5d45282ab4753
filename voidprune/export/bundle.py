"""The one folder: slim Hugging Face checkpoint, two graphs that read its weights, and what the folder says of itself.

    config.json  generation_config.json  tokenizer files ...
    model.safetensors                 the only weights; shards and an index where they are too large for one file
    model.int4.safetensors            with packed matrices, what the graphs read instead; the one above only with "hf"
    prefill.onnx  decode.onnx         kilobytes; every weight is external data into the weight files
    model.onnx                        in place of the two: one graph for both phases, with the layout "single"
    genai_config.json                 for onnxruntime-genai
    voidprune.json  README.md         schedule, layer numbers, hashes, sizes, parity; the model card

Built in a temporary sibling folder and verified there; a folder under its final name is complete and right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import voidprune
from voidprune import artifacts
from voidprune.errors import CheckpointError, ModelError, OutputError, ScheduleError
from voidprune.execution import manifest as manifests
from voidprune.execution.kv_cache import KvCache, KvSteps
from voidprune.execution.manifest import Graph, Healing, Manifest, Parity
from voidprune.execution.packing_record import Fidelity, Quantization
from voidprune.export.block_rounding import Rounded
from voidprune.export.genai import FILE as GENAI_FILE
from voidprune.export.genai import describe_genai
from voidprune.export.hf_checkpoint import DEFAULT_SHARD_BYTES, write_slim_checkpoint, write_slim_files
from voidprune.export.model_card import read_card, write_model_card
from voidprune.export.quantize import Packing, average_bits, layer_weights, write_packed
from voidprune.models.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    open_checkpoint,
    open_packed,
    refuse_packed,
    weights_hash,
)
from voidprune.models.copying import overwrite_tensors
from voidprune.models.graph_architecture import describe_graph_architecture
from voidprune.models.packed import differs_by_phase, multiplies_rows, packed_file
from voidprune.models.pretrained import end_tokens
from voidprune.models.tensors import Advance
from voidprune.schedule import Phase, Schedule

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("hf", "onnx")
LAYOUTS = ("pair", "single")
"""A graph a phase; or one for both, which is what single-model runtimes load (Optimum's `ORTModelForCausalLM`)."""
SINGLE_FILE = "model.onnx"

Verify = Callable[[Path], Parity | None]


@dataclass(frozen=True, eq=False)
class Healed:
    """What healing changed: new values by the name of a tensor in the slim checkpoint, and the record of it."""

    tensors: Mapping[str, np.ndarray[Any, Any]]
    record: Healing


@dataclass(frozen=True, eq=False)
class RoundedOn:
    """Matrices that were rounded on calibration samples (see `write_packed`), and the hashes of the prompts of these."""

    matrices: Mapping[str, Rounded]
    prompts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RoundedKv:
    """What 1 stands for in the keys and values of every slot, and the hashes of the prompts that this was measured on."""

    steps: Sequence[KvSteps]
    prompts: tuple[str, ...]


def export_bundle(
    source: Checkpoint,
    schedule: Schedule,
    folder: Path,
    *,
    verify: Verify,
    formats: Collection[str] = FORMATS,
    layout: str = "pair",
    precision: str = "keep",
    operators: str = "ort",
    packing: Packing | None = None,
    rounded: RoundedOn | None = None,
    kv: RoundedKv | None = None,
    measure: Callable[[Path], Fidelity | None] = lambda _stage: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    advance: Advance = lambda _amount: None,
    healed: Healed | None = None,
    made_of: Manifest | None = None,
) -> Manifest:
    """Write the bundle of a model under a schedule.

    With `healed`, some of its weights are other than the source's. `made_of` is the manifest of a source that is itself a bundle,
    and `schedule` is its schedule renumbered: what it says of the original model is carried on.

    `verify` gets the staged folder, which `read_manifest` and all loaders accept, and returns how far it is from the
    reference, None where that was not measured; what it raises (ParityError) ends the export with nothing published. The
    checkpoint is written in any case, because the graphs read it; `operators` is what they are written in (see
    `graph_author.OPERATOR_SETS`); `advance` is told the bytes of tensors written.

    With `packing`, the graphs read a file of packed matrices that both share, and the checkpoint is written only where `formats`
    ask for it; operators of the standard do not round to 8 bits, whatever `packing.activations` says. Matrices in `rounded`
    (see `write_packed`) are packed as they are given there. With `kv`, the graphs hold keys and values in 8 bits. `measure` gets
    the staged folder once it is verified, and says what both changed.
    Raises ScheduleError, ModelError, CheckpointError, OutputError.
    """
    schedule.check_model(source.identity, place="the schedule")
    _check_dtypes(source, precision, packing)
    if layout == "single":
        check_single_graph(schedule)
    card = read_card(source.folder / "README.md")
    if packing is not None:
        check_packing(packing, formats=formats, operators=operators, layout=layout)
    if kv is not None:
        check_kv_cache(formats=formats, operators=operators)
    if "onnx" in formats:
        describe_graph_architecture(source.config, source.architecture.spec)  # refused before anything is written
    if source.folder.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder} holds the model itself", hint="choose another --output")
    with artifacts.staged_folder(folder, overwrite=overwrite, marker=manifests.FILE) as stage:
        hashes: dict[str, str] = {}
        quantization = None
        if packing is None or "hf" in formats:
            hashes = write_slim_checkpoint(
                source, schedule.union, stage, precision=precision, max_shard_bytes=max_shard_bytes, advance=advance
            )
        else:
            write_slim_files(source, schedule.union, stage, precision=precision)
        if packing is not None:
            if operators == "standard" and packing.activations == "int8":  # has no product that rounds
                packing = replace(packing, activations="fp32")
            quantization = _pack(source, schedule.union, stage, packing, rounded, advance=advance)
        slim = open_checkpoint(stage, name=folder.name)
        if healed is not None:
            values = ((slim.tensors[name], tensor) for name, tensor in healed.tensors.items())
            for file in overwrite_tensors(values):
                del hashes[file.name]
        original = schedule if made_of is None else made_of.schedule
        read_by = dict.fromkeys(Phase, slim)
        if quantization is not None:
            packed = stage / quantization.file
            read_by = {phase: open_packed(packed, phase=phase, name=folder.name) for phase in Phase}
        graphs = {}
        if "onnx" in formats:
            rounds = quantization is not None and quantization.activations == "int8"
            graphs = _write_graphs(
                read_by,
                original,
                stage,
                layout=layout,
                operators=operators,
                rounds_activations=rounds,
                kv_steps=None if kv is None else kv.steps,
            )
        files = {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}
        manifest = Manifest(
            schedule=original,
            kept_layers=original.union,
            slots=original.kv_layers,
            dtype="F32" if slim.is_packed else slim.dtype,  # for transformers, which reads nothing that is packed
            context_length=slim.architecture.context_length,
            graphs=graphs,
            source=source.name,
            source_revision=source.revision,
            source_bytes=sum(file.stat().st_size for file in {record.file for record in source.tensors.values()}),
            healing=None if healed is None else healed.record,
            weights_header=weights_hash(stage),
            files={name: hashes.get(name) or artifacts.file_hash(path) for name, path in files.items()},
            sizes={name: path.stat().st_size for name, path in files.items()},
            parity=None,
            written_by=f"voidprune {voidprune.__version__}",
            operators=operators,
            quantization=quantization,
            kv_cache=None if kv is None else KvCache("int8", slim.architecture.kv_width, kv.prompts),
        )
        if made_of is not None:
            manifest = replace(
                manifest,
                source=made_of.source,
                source_revision=made_of.source_revision,
                source_bytes=made_of.source_bytes,
                healing=made_of.healing,
            )
        _write_manifest(stage, manifest)
        manifest = replace(manifest, parity=verify(stage))
        if quantization is not None:
            manifest = replace(manifest, quantization=replace(quantization, fidelity=measure(stage)))
        elif manifest.kv_cache is not None:
            manifest = replace(manifest, kv_cache=replace(manifest.kv_cache, fidelity=measure(stage)))
        _write_manifest(stage, manifest)
        write_model_card(stage, manifest, source_card=card)
    return manifest


def _pack(
    source: Checkpoint,
    kept: Sequence[int],
    stage: Path,
    packing: Packing,
    rounded: RoundedOn | None,
    *,
    advance: Advance,
) -> Quantization:
    errors = write_packed(
        source,
        kept,
        stage / packed_file(packing.precision),
        packing,
        rounded={} if rounded is None else rounded.matrices,
        advance=advance,
    )
    return Quantization(
        precision=packing.precision,
        block_size=packing.block_size,
        zero_points=packing.zero_points,
        layer_bits=tuple((bits.attention, bits.mlp) for bits in packing.layers),
        head_bits=packing.head,
        activations=packing.activations,
        average_bits=average_bits(packing.layers, layer_weights(source, kept)),
        weight_error=errors.relative,
        rounding="nearest" if rounded is None else "gptq",
        prompts=() if rounded is None else rounded.prompts,
    )


def _check_dtypes(source: Checkpoint, precision: str, packing: Packing | None) -> None:
    """Refuse before anything is copied what would be no bundle. Raises CheckpointError, ModelError."""
    refuse_packed(source.folder)
    if source.config.get("quantization_config"):
        if precision != "keep" or packing is not None:
            raise CheckpointError(
                f"{source.name} is quantized: its scales belong to the dtypes that they have",
                hint="leave --precision out",
            )
        return
    matrices = {record.dtype for record in source.tensors.values() if len(record.shape) == 2}
    if unknown := matrices - set(FLOAT_DTYPES):
        raise CheckpointError(
            f"{source.name} has matrices of {', '.join(sorted(unknown))}; {', '.join(FLOAT_DTYPES)} are supported"
        )
    if precision == "keep" and len(matrices) > 1:
        raise CheckpointError(
            f"the matrices of {source.name} are of several dtypes: {', '.join(sorted(matrices))}",
            hint="choose one with --precision",
        )


class AskedPacking(Protocol):
    """What is asked of packed matrices, as far as it may not go together."""

    @property
    def precision(self) -> str: ...
    @property
    def zero_points(self) -> bool: ...
    @property
    def activations(self) -> str: ...


def check_packing(packing: AskedPacking, *, formats: Collection[str], operators: str, layout: str) -> None:
    """Raise ModelError where nothing that is written could read packed matrices, or could not as it is asked to."""
    if "onnx" not in formats:
        raise ModelError(
            f"{packing.precision} is a precision of ONNX graphs; transformers does not read it",
            hint="add --format onnx, or choose --precision keep, fp32, fp16 or bf16",
        )
    in_rows = multiplies_rows(packing.precision, Phase.PREFILL)
    if in_rows and packing.activations not in (("int8",) if operators == "ort" else ("int8", "fp32")):
        raise ModelError(
            f"{packing.precision} multiplies by activations in 8 bits",
            hint="choose --precision int8 or int4, whose products can be exact",
        )
    if layout == "single" and differs_by_phase(packing.precision):
        raise ModelError(
            f"{packing.precision} has matrices of its own for each phase, and a single graph is for both",
            hint="leave --layout out, or choose --precision int4",
        )
    if operators == "standard" and not packing.zero_points:
        raise ModelError(
            "the standard's operators take the zero points of packed matrices from the file, and it has none",
            hint="export with --zero-points, or with --ops ort",
        )


def check_kv_cache(*, formats: Collection[str], operators: str) -> None:
    """Raise ModelError where nothing that is written could hold keys and values in 8 bits."""
    if "onnx" not in formats:
        raise ModelError(
            "only ONNX graphs say how keys and values are held; transformers decides when it runs",
            hint="add --format onnx, or leave --kv-cache out",
        )
    if operators == "standard":
        raise ModelError(
            "the standard's attention takes keys and values in the dtype of its queries only",
            hint="export with --ops ort, or leave --kv-cache out",
        )


def check_single_graph(schedule: Schedule) -> None:
    """Raise ScheduleError where one graph cannot run all tokens of the schedule, or would write K/V that nothing reads."""
    if schedule.prefill != schedule.decode:
        raise ScheduleError(
            "the phases differ, and a single graph runs the same layers for every token",
            hint="plan with --phases shared, or leave --layout out",
        )
    idle = [layer for layer, action in enumerate(schedule.decode) if action.writes_kv and not action.attends]
    if idle:
        raise ScheduleError(
            f"layer {idle[0]} writes K/V in both phases and attends in neither", hint=f"make layer {idle[0]} skip those"
        )


def _write_graphs(
    read_by: Mapping[Phase, Checkpoint],
    schedule: Schedule,
    stage: Path,
    *,
    layout: str,
    operators: str,
    rounds_activations: bool,
    kv_steps: Sequence[KvSteps] | None,
) -> dict[Phase, Graph]:
    """`read_by`: the checkpoint that each phase's graph reads."""
    from voidprune.export.onnx_graph import author_decode, author_prefill, graph_slots, round_activations, save_graph

    slim = read_by[Phase.DECODE]
    renumbered = schedule.on_slim_model(slim.identity)
    authors = {Phase.PREFILL: author_prefill, Phase.DECODE: author_decode}
    graphs = {phase: Graph(file=f"{phase}.onnx", slots=graph_slots(renumbered, phase)) for phase in authors}
    if layout == "single":
        authors = {Phase.DECODE: author_decode}
        graphs = {phase: replace(graph, file=SINGLE_FILE) for phase, graph in graphs.items()}
    for phase, author in authors.items():
        model = author(read_by[phase], renumbered, operators=operators, kv_steps=kv_steps)
        model.metadata_props.update(
            {
                "voidprune.phase": str(phase) if layout == "pair" else "any",
                "voidprune.slots": " ".join(str(schedule.kv_layers[slot]) for slot in graphs[phase].slots),
            }
        )
        if rounds_activations:
            round_activations(model)
        save_graph(model, stage / graphs[phase].file)
    genai = describe_genai(slim, graphs, num_slots=len(schedule.kv_layers), end_tokens=end_tokens(stage))
    artifacts.write_file(stage / GENAI_FILE, artifacts.canonical_bytes(genai))
    return graphs


def _write_manifest(stage: Path, manifest: Manifest) -> None:
    artifacts.write_file(stage / manifests.FILE, artifacts.canonical_bytes(manifest.to_document()), overwrite=True)
