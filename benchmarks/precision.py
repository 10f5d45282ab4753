"""Bytes and quality of the precisions of graphs: `python benchmarks/precision.py [MODEL ...]`, the demo model unless told.

Each is exported of the whole model and put beside it: weight error, KL and perplexity on responses, and on the demo model the
share of right answers; first float32 with keys and values in 8 bits. Bits of "mixed" are chosen, GPTQ rounds, and steps of keys and
values are measured on the calibration split (of other models: on every second
answered prompt); the rest is measured on what was not chosen by. Nothing is verified here; `voidprune export` does that.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from voidprune.execution.manifest import Manifest
from voidprune.execution.packing_record import Fidelity
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import RoundedKv, RoundedOn, export_bundle
from voidprune.export.quantize import Packing, layer_weights, uniform_packing
from voidprune.healing.kv_steps import measure_kv_steps
from voidprune.healing.rounding import round_layers
from voidprune.healing.training_data import prompt_hash
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.packed import BlockFormat
from voidprune.models.pretrained import end_tokens, load_model, load_tokenizer
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import Calibrated
from voidprune.pipeline.precision import allocate_bits, measure_fidelity, measure_harm, prepare_samples
from voidprune.pipeline.progress import untracked
from voidprune.pipeline.tasks import find_rows
from voidprune.profiling.calibration import Sample, encode_rows
from voidprune.quality.evaluation import evaluate
from voidprune.schedule import Schedule, full_schedule

NUM_ITEMS = 50
CALIBRATED = (
    "int4",
    "int4, zero points",
    "int4, blocks of 128",
    "int4, blocks of 128, zero points",
    "int4, head in 8",
    "w8a8-int4",
    "w8a8-int4, blocks of 128",
    "mixed, 5 bits",
)
"""What is measured with GPTQ as well."""


def samples_of(checkpoint: Checkpoint) -> tuple[list[Sample], list[Sample]]:
    """To choose bits by, and to measure by."""
    if checkpoint.name == "voidprune-demo":
        tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
        choosing, judging = (
            encode_rows(find_rows("demo", num_items=count, split=split), tokenizer, end_tokens=ends, max_length=512)
            for count, split in ((25, "calibration"), (NUM_ITEMS, "evaluation"))
        )
        return choosing, judging
    model = load_model(checkpoint.folder)
    found = prepare_samples(checkpoint, model, Calibrated(), untracked)
    return found[0::2], found[1::2]


Harm = list[tuple[float, float]]


def packings(checkpoint: Checkpoint, schedule: Schedule, harm: Harm) -> dict[str, Packing]:
    num_layers, weights = len(schedule.union), layer_weights(checkpoint, schedule.union)
    random = np.random.default_rng(0)
    chances = [[(random.random(), random.random()) for _ in harm] for _ in range(3)]
    found = {
        "int4": uniform_packing("int4", num_layers),
        "int4, zero points": uniform_packing("int4", num_layers, zero_points=True),
        "int4, blocks of 128": uniform_packing("int4", num_layers, block_size=128),
        "int4, blocks of 128, zero points": uniform_packing("int4", num_layers, block_size=128, zero_points=True),
        "int4, head in 8": replace(uniform_packing("int4", num_layers), precision="mixed", head=8),
        "int8": uniform_packing("int8", num_layers),
        "int8, blocks of 128": uniform_packing("int8", num_layers, block_size=128),
        "w8a8": uniform_packing("w8a8", num_layers),
        "w8a8-int4": uniform_packing("w8a8-int4", num_layers),
        "w8a8-int4, blocks of 128": uniform_packing("w8a8-int4", num_layers, block_size=128),
    }
    for bits in (5.0, 6.0):
        found[f"mixed, {bits:g} bits"] = Packing("mixed", allocate_bits(harm, weights, average=bits), 8)
        for number, chance in enumerate(chances):
            found[f"at random, {bits:g} bits ({number})"] = Packing(
                "mixed", allocate_bits(chance, weights, average=bits), 8
            )
    return found


def accuracy(checkpoint: Checkpoint, stage: Path) -> str:
    if checkpoint.name != "voidprune-demo":
        return ""
    tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
    rows = [replace(row, response=None) for row in find_rows("demo", num_items=NUM_ITEMS)]
    samples = encode_rows(rows, tokenizer, end_tokens=ends, max_length=512, max_new_tokens=64)
    result = evaluate(
        BundleSession(stage),
        samples,
        decode_text=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        end_tokens=ends,
        max_new_tokens=64,
    )
    return " ".join(f"{task.num_right}" for task in result.accuracy.values())


def main(models: list[str]) -> None:
    for name in models:
        checkpoint = open_model(name)
        schedule = full_schedule(checkpoint.identity)
        choosing, judging = samples_of(checkpoint)
        print(f"\n{checkpoint.name}: {checkpoint.num_bytes:,} bytes in {checkpoint.dtype}, {len(judging)} samples")
        blocks = BlockFormat(4, 32, zero_points=False)
        harm = measure_harm(checkpoint, load_model(checkpoint.folder), schedule, choosing, blocks=blocks)
        print("KL of attention, MLP in 4 bits: " + "; ".join(f"{one:.2g}, {two:.2g}" for one, two in harm))
        print("| precision | bytes | error | perplexity x | KL | same token | right |\n|---|---|---|---|---|---|---|")
        print(measure_held(checkpoint, schedule, judging, calibration=choosing), flush=True)
        for label, packing in packings(checkpoint, schedule, harm).items():
            measure = functools.partial(measure_packing, checkpoint, schedule, packing, judging)
            print(measure(label=label), flush=True)
            if label in CALIBRATED:
                print(measure(label=f"{label}, GPTQ", calibration=choosing), flush=True)


def measure_held(
    checkpoint: Checkpoint, schedule: Schedule, judging: list[Sample], *, calibration: Sequence[Sample]
) -> str:
    """The line of keys and values in 8 bits, weights as they are."""
    steps = measure_kv_steps(load_model(checkpoint.folder), checkpoint, schedule, calibration)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "held"
        manifest = export_bundle(
            checkpoint,
            schedule,
            folder,
            verify=lambda _stage: None,
            kv=RoundedKv(steps, tuple(prompt_hash(sample.prompt) for sample in calibration)),
            measure=lambda stage: measure_fidelity(checkpoint, schedule, stage, judging, provider="cpu"),
        )
        right = accuracy(checkpoint, folder)
    assert manifest.kv_cache is not None
    return describe("K/V int8", manifest, 0.0, manifest.kv_cache.fidelity, right)


def measure_packing(
    checkpoint: Checkpoint,
    schedule: Schedule,
    packing: Packing,
    judging: list[Sample],
    *,
    label: str,
    calibration: Sequence[Sample] = (),
) -> str:
    """A line of the table. With `calibration`, matrices in 4 bits are rounded on it."""
    rounded = None
    if calibration:
        model = load_model(checkpoint.folder)
        prompts = tuple(prompt_hash(sample.prompt) for sample in calibration)
        rounded = RoundedOn(round_layers(model, checkpoint, schedule, calibration, packing), prompts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "packed"
        manifest = export_bundle(
            checkpoint,
            schedule,
            folder,
            verify=lambda _stage: None,
            formats=("onnx",),
            packing=packing,
            rounded=rounded,
            measure=lambda stage: measure_fidelity(checkpoint, schedule, stage, judging, provider="cpu"),
        )
        right = accuracy(checkpoint, folder)
    assert manifest.quantization is not None
    return describe(label, manifest, manifest.quantization.weight_error, manifest.quantization.fidelity, right)


def describe(label: str, manifest: Manifest, error: float, found: Fidelity | None, right: str) -> str:
    assert found is not None
    return (
        f"| {label} | {manifest.graph_weight_bytes:,} | {error:.2%} | "
        f"{found.perplexity_ratio:.4f} | {found.kl:.2g} | {found.top1:.2%} | {right} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["demo"])
