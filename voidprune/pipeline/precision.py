"""How many bits each layer's matrices get, how they and keys and values are rounded, and what that changes: measured on prompts,
with the model at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from voidprune.errors import BudgetError, DatasetError, ModelError
from voidprune.execution.packing_record import Fidelity
from voidprune.execution.reference import ScheduledModel, decoder_layers, scheduled
from voidprune.execution.session import BundleSession
from voidprune.export.block_rounding import restore_rows
from voidprune.export.bundle import RoundedKv, RoundedOn
from voidprune.export.quantize import (
    LayerBits,
    Packing,
    average_bits,
    layer_weights,
    packed_record_bytes,
    uniform_packing,
)
from voidprune.healing.kv_steps import measure_kv_steps
from voidprune.healing.rounding import round_layers, rounding_bytes
from voidprune.healing.training_data import hold_out, prompt_hash
from voidprune.models.checkpoint import Checkpoint, stored_bytes
from voidprune.models.packed import BITS, FOUR_BIT_PRECISIONS, BlockFormat, activation_dtype, multiplies_rows
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.models.sizes import ModelSizes, measure_sizes
from voidprune.models.tensors import TensorRecord
from voidprune.pipeline.models import default_provider
from voidprune.pipeline.plan import Calibrated
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Sample, encode_rows, require_responses
from voidprune.profiling.tracing import generate_responses
from voidprune.quality.agreement import OpenRunner, measure_agreement
from voidprune.quality.parity import HEADROOM, free_memory
from voidprune.schedule import Phase, Schedule

FEW, MANY = BITS
_HELD_OUT = 0.25
"""Share of the samples that no matrix is rounded on, to measure what rounding changed."""


@dataclass(frozen=True)
class PackingRequest:
    """What is asked of packed matrices. `average_bits` is of the layers' matrices, for the precision "mixed"; `rounding` is one of
    ROUNDINGS, and "gptq" is for matrices in 4 bits."""

    precision: str
    block_size: int = 32
    zero_points: bool = False
    activations: str = "int8"
    average_bits: float = 5.0
    rounding: str = "nearest"
    calibrated: Calibrated = field(default_factory=Calibrated)

    def __post_init__(self) -> None:
        """Raises BudgetError, ModelError."""
        if self.rounding == "gptq" and self.precision not in FOUR_BIT_PRECISIONS:
            raise ModelError(
                f"{self.precision} has no matrices in 4 bits, and in 8 there is nothing for GPTQ to win back",
                hint="leave --rounding out",
            )
        if not FEW <= self.average_bits <= MANY:
            raise BudgetError(f"an average of {self.average_bits:g} bits is not between {FEW} and {MANY}")

    @property
    def takes_model(self) -> bool:
        """Whether nothing can be chosen without running it."""
        return self.precision == "mixed" or self.rounding == "gptq"

    def uniform(self, num_layers: int, precision: str | None = None) -> Packing:
        """All matrices in the same bits, those of another precision if it is given."""
        return uniform_packing(
            precision or self.precision,
            num_layers,
            block_size=self.block_size,
            zero_points=self.zero_points,
            activations=self.activations,
        )


def default_activations(precision: str, provider: str | None = None) -> str:
    """What graphs of a precision compute with on `provider`, by default the one of this machine.

    onnxruntime 1.31 has attention for CUDA in 16 bits alone (GroupQueryAttention), and products of rows for the CPU alone (QGemm).
    """
    on_device = (provider or default_provider()) == "cuda" and not multiplies_rows(precision, Phase.PREFILL)
    return "fp16" if on_device else "int8"


def measure_packed_sizes(checkpoint: Checkpoint, request: PackingRequest) -> ModelSizes:
    """Sizes of a model as its graphs will read it; in "mixed", as if every matrix of the layers had the average bits."""
    mixed = request.precision == "mixed"
    share = (request.average_bits - FEW) / (MANY - FEW) if mixed else 0.0
    few, many = (
        request.uniform(checkpoint.architecture.num_layers, precision)
        for precision in (("int4", "int8") if mixed else (request.precision,) * 2)
    )

    def size_of(record: TensorRecord, phases: Collection[Phase] = tuple(Phase)) -> int:
        if checkpoint.architecture.spec.tensors.layer_of(record.name) is None:
            return packed_record_bytes(checkpoint, record, many, phases)
        sizes = [packed_record_bytes(checkpoint, record, packing, phases) for packing in (few, many)]
        return round(sizes[0] + share * (sizes[1] - sizes[0]))

    return measure_sizes(
        checkpoint,
        dtype=activation_dtype(request.activations),
        size_of=size_of,
        read_by_decode=lambda record: size_of(record, (Phase.DECODE,)),
    )


@dataclass(frozen=True, eq=False)
class ChosenRounding:
    """`packing` of a model's kept layers, the matrices that were rounded on samples, and the steps of keys and values, as far as
    each was asked for.

    `samples` are to measure by, none where the model cannot run here; nothing was rounded on their prompts.
    """

    packing: Packing | None = None
    samples: Sequence[Sample] = ()
    rounded: RoundedOn | None = None
    kv: RoundedKv | None = None


def choose_rounding(
    request: PackingRequest | Packing | None,
    checkpoint: Checkpoint,
    schedule: Schedule,
    *,
    kv: Calibrated | RoundedKv | None = None,
    track: Track = untracked,
) -> ChosenRounding:
    """Bits of every layer that is kept, and how matrices, and keys and values, are rounded where that takes calibration.

    For "mixed", sublayers whose packing into 4 bits changes predictions most, for their size, get 8. `kv` is what steps of K/V are
    measured on, or these steps; None leaves K/V alone. Raises ModelError where bits, GPTQ or steps cannot be measured;
    DatasetError, HealingError.
    """
    asked = request if isinstance(request, PackingRequest) else None
    packing = request if isinstance(request, Packing) else None
    mixed, rounds = asked is not None and asked.precision == "mixed", asked is not None and asked.rounding == "gptq"
    if asked is not None and not mixed:
        packing = asked.uniform(len(schedule.union))
    kv_on, kv_steps = (kv, None) if isinstance(kv, Calibrated) else (None, kv)
    calibrated = kv_on if asked is None else asked.calibrated
    if calibrated is None:
        return ChosenRounding(packing, kv=kv_steps)
    beside = rounding_bytes(checkpoint) if rounds else 0
    if kv_on is not None and request is None:  # a session with weights as large as the model's measures what changed
        beside += sum(stored_bytes(record, "F32") for record in checkpoint.tensors.values())
    if problem := _cannot_run(checkpoint, beside=beside):
        if not (mixed or rounds or kv_on):
            return ChosenRounding(packing, kv=kv_steps)
        unknown = (
            "which layers need 8 bits" if mixed else "how to round its matrices" if rounds else "how to round its K/V"
        )
        hints = ["choose --precision int8 or int4"] * mixed + ["leave --rounding out"] * rounds
        hints += ["leave --kv-cache out"] * (kv_on is not None)
        raise ModelError(
            f"{checkpoint.name} cannot run here, so nothing says {unknown}: {problem}", hint=", and ".join(hints)
        )
    model = load_model(checkpoint.folder, device=default_device())
    choosing = judging = prepare_samples(checkpoint, model, calibrated, track)
    if rounds or kv_on is not None:
        choosing, judging = hold_out(choosing, share=_HELD_OUT)
    batch_size, rounded = calibrated.batch_size, None
    if asked is not None and packing is None:
        packing = _choose_bits(asked, checkpoint, model, schedule, choosing, track)
    prompts = tuple(sorted({prompt_hash(sample.prompt) for sample in choosing}))
    if rounds and packing is not None:
        with track("rounding", len(schedule.union), "layers") as advance:
            matrices = round_layers(
                model, checkpoint, schedule, choosing, packing, batch_size=batch_size, advance=advance
            )
        if matrices:  # all of a mixed precision's may have 8 bits
            rounded = RoundedOn(matrices, prompts)
    if kv_on is not None:  # of the rounded matrices, where there are such
        with track("measuring keys and values", len(choosing), "samples") as advance:
            steps = measure_kv_steps(model, checkpoint, schedule, choosing, batch_size=batch_size, advance=advance)
        kv_steps = RoundedKv(steps, prompts)
    return ChosenRounding(packing, judging, rounded, kv_steps)


def _choose_bits(
    request: PackingRequest,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    schedule: Schedule,
    samples: Sequence[Sample],
    track: Track,
) -> Packing:
    """4 or 8 for every sublayer of "mixed"."""
    blocks = BlockFormat(bits=FEW, block_size=request.block_size, zero_points=request.zero_points)
    harm = measure_harm(checkpoint, model, schedule, samples, blocks=blocks, track=track)
    return Packing(
        "mixed",
        allocate_bits(harm, layer_weights(checkpoint, schedule.union), average=request.average_bits),
        MANY,
        block_size=request.block_size,
        zero_points=request.zero_points,
        activations=request.activations,
    )


def _cannot_run(checkpoint: Checkpoint, *, beside: int = 0) -> str | None:
    """Why the whole model cannot answer prompts here, with so many bytes `beside` it; None where it can."""
    if checkpoint.revision is not None:
        return "only the layers that are kept are fetched"
    needed = beside + int(HEADROOM * sum(stored_bytes(record, "F32") for record in checkpoint.tensors.values()))
    if needed > (free := free_memory(default_device())):
        return f"it takes {needed:,} bytes in float32; {free:,} are free"
    try:
        load_tokenizer(checkpoint.folder)
    except ModelError as error:
        return error.message
    return None


def prepare_samples(
    checkpoint: Checkpoint, model: PreTrainedModel, calibrated: Calibrated, track: Track
) -> list[Sample]:
    """Samples with responses: of the dataset, or the whole model's own. Raises DatasetError."""
    context = checkpoint.architecture.context_length
    max_new_tokens = min(calibrated.max_new_tokens, context // 2)
    generates = calibrated.responses == "generate"
    rows = [replace(row, response=None) if generates else row for row in calibrated.rows()]
    tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
    longest = context - (max_new_tokens if generates else 0)
    samples = []
    for row in rows:
        try:
            samples += encode_rows([row], tokenizer, end_tokens=ends, max_length=longest)
        except DatasetError:
            if calibrated.dataset is not None:
                raise
            # A prompt that ships with the package is not worth failing for.
    if not generates:
        require_responses(samples)
        return samples
    with track("answering", len(samples), "samples") as advance:
        return generate_responses(
            model,
            samples,
            max_new_tokens=max_new_tokens,
            end_tokens=ends,
            batch_size=calibrated.batch_size,
            on_progress=lambda num_samples, _num_tokens: advance(num_samples),
        )


# ---- which layers need more bits


def measure_harm(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    schedule: Schedule,
    samples: Sequence[Sample],
    *,
    blocks: BlockFormat,
    track: Track = untracked,
) -> list[tuple[float, float]]:
    """KL, in nats a token, between the model under the schedule and the same with one sublayer packed: (attention, MLP) a layer.

    Of the layers in the union, in order. The model's weights are as they were afterwards. Raises ModelError where no sample has
    a response.
    """

    def opened(parts: Sequence[nn.Linear]) -> OpenRunner:
        @contextmanager
        def run() -> Iterator[ScheduledModel]:
            with _as_packed(parts, blocks), scheduled(model, schedule) as runner:
                yield runner

        return run

    layers = decoder_layers(model, checkpoint.architecture.spec.modules)
    names = checkpoint.architecture.spec.tensors
    others: dict[str, OpenRunner] = {}
    for layer in schedule.union:
        linear = {path: module for path, module in layers[layer].named_modules() if isinstance(module, nn.Linear)}
        attention = [module for path, module in linear.items() if path in names.attention_matrices]
        mlp = [module for path, module in linear.items() if path in names.mlp_matrices]
        others |= {f"{layer} attention": opened(attention), f"{layer} mlp": opened(mlp)}
    with track("trying 4 bits, sublayer by sublayer", len(samples), "items") as advance:
        found = measure_agreement(opened([]), others, samples, on_progress=advance)
    if not found:
        raise ModelError("no sample has a response, so nothing says which layers need 8 bits")
    return [(found[f"{layer} attention"].kl.value, found[f"{layer} mlp"].kl.value) for layer in schedule.union]


@contextmanager
def _as_packed(modules: Sequence[nn.Linear], blocks: BlockFormat) -> Iterator[None]:
    """The linear layers with the weights that packing leaves of theirs, while the block runs."""
    before = [module.weight for module in modules]
    try:
        for module in modules:
            weights = module.weight.detach()
            restored = torch.from_numpy(restore_rows(weights.float().cpu().numpy(), blocks))
            module.weight = nn.Parameter(restored.to(weights), requires_grad=False)
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight = weight


def allocate_bits(
    harm: Sequence[tuple[float, float]], weights: Sequence[LayerBits], *, average: float
) -> tuple[LayerBits, ...]:
    """8 bits for the sublayers with the most harm a weight, as many as the average allows; 4 for the others.

    `harm` and `weights` are of attention and MLP of each layer. Greedy: one that does not fit any more is passed over.
    """
    sizes = [(count.attention, count.mlp) for count in weights]
    room = (average - FEW) / (MANY - FEW) * sum(map(sum, sizes)) * (1 + 1e-12)
    bits = [[FEW, FEW] for _ in sizes]
    units = [(layer, part) for layer in range(len(sizes)) for part in (0, 1) if sizes[layer][part]]
    for layer, part in sorted(units, key=lambda unit: -harm[unit[0]][unit[1]] / sizes[unit[0]][unit[1]]):
        if sizes[layer][part] <= room:
            room -= sizes[layer][part]
            bits[layer][part] = MANY
    layers = tuple(LayerBits(*pair) for pair in bits)
    assert average_bits(layers, weights) <= average * (1 + 1e-9)
    return layers


# ---- what packing changed


def measure_fidelity(
    checkpoint: Checkpoint,
    schedule: Schedule,
    stage: Path,
    samples: Sequence[Sample],
    *,
    provider: str,
    batch_size: int = 16,
    track: Track = untracked,
) -> Fidelity | None:
    """A bundle that was rounded beside its source under the same schedule, in float32; None without samples."""
    scored = [sample for sample in samples if sample.response]
    if not scored:
        return None
    model, session = load_model(checkpoint.folder, device=default_device()), BundleSession(stage, provider=provider)
    prompts, responses = [sample.prompt for sample in scored], [sample.response or () for sample in scored]
    with track("comparing with what was not rounded", len(scored), "items") as advance:
        agreement = measure_agreement(
            lambda: scheduled(model, schedule),
            {"packed": lambda: nullcontext(session)},
            scored,
            batch_size=batch_size,
            on_progress=advance,
        )["packed"]
        packed = np.concatenate(session.score(prompts, responses)).mean()
        with scheduled(model, schedule) as reference:
            plain = np.concatenate(
                [
                    scores
                    for start in range(0, len(scored), batch_size)
                    for scores in reference.score(
                        prompts[start : start + batch_size], responses[start : start + batch_size]
                    )
                ]
            ).mean()
    return Fidelity(
        top1=agreement.top1.value,
        kl=agreement.kl.value,
        perplexity_ratio=float(np.exp(min(plain - packed, 700.0))),
        num_tokens=int(agreement.num_tokens.sum()),
    )
