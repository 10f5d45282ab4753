"""A bundle on CUDA: is there one copy of the weights, and how near is a step of decode to what reading them takes?

    python benchmarks/device.py [--model qwen2.5-0.5b --model 7b] [--precision fp16] [--provider cuda]

Random weights of a model's shape are exported without verification, and everything is measured in this process: what loading the
weights and opening each of the two sessions takes of the device's memory, by its own counter, with weights lent and without; then
steps of decode behind 512 tokens, captured and as they are, and prompts of 512 tokens. The floor is the bytes of a step over the
faster of a copy and a sum on the device. `--provider cpu` tries the script itself, in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_models import SPECIAL, model_config, tensor_shapes, write_tokenizer
from safetensors.torch import save_file

from voidprune.execution.device_bindings import STRIDE
from voidprune.execution.device_weights import load_device_weights, weight_ranges
from voidprune.execution.providers import open_session
from voidprune.execution.session import BundleSession
from voidprune.export.bundle import export_bundle
from voidprune.export.quantize import uniform_packing
from voidprune.models.checkpoint import open_checkpoint
from voidprune.quality.bench import time_decode, time_prefill
from voidprune.quality.work import measure_work
from voidprune.schedule import full_schedule

CONTEXT, STEPS, ROUNDS = 512, 32, 8
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_bundle(folder: Path, name: str, precision: str, device: str) -> Path:
    """A whole model of random weights as graphs. `precision`: one of DTYPES, or int4 in blocks of 128, computed in fp16."""
    source, dtype = folder / "source", DTYPES.get(precision, torch.float16)
    config = model_config(name, num_layers=None, vocab_size=None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    source.mkdir()
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if "norm" in name
        else (0.02 * torch.randn(shape, device=device, dtype=dtype)).cpu()
        for name, shape in tensor_shapes(config).items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps(SPECIAL))
    write_tokenizer(source)
    checkpoint = open_checkpoint(source)
    schedule = full_schedule(checkpoint.identity)
    packing = uniform_packing("int4", schedule.num_layers, activations="fp16", block_size=128)
    export_bundle(
        checkpoint,
        schedule,
        folder / "bundle",
        formats=("onnx",),
        packing=packing if precision == "int4" else None,
        verify=lambda _stage: None,
    )
    return folder / "bundle"


def describe_copies(bundle: Path) -> None:
    """Megabytes of the device that loading weights, the first session and the second take, with weights lent and without."""
    graphs = [bundle / "prefill.onnx", bundle / "decode.onnx"]
    for lends in (True, False):
        torch.cuda.empty_cache()
        free = [torch.cuda.mem_get_info()[0]]
        weights = load_device_weights({graph.name: weight_ranges(graph) for graph in graphs if lends}, device="cuda")
        free.append(torch.cuda.mem_get_info()[0])
        sessions = []
        for graph in graphs:
            sessions.append(open_session(graph, bundle, provider="cuda", weights=weights.values.get(graph.name)))
            free.append(torch.cuda.mem_get_info()[0])
        taken = [round((before - after) / 1e6) for before, after in itertools.pairwise(free)]
        print(
            f"  weights {'lent' if lends else 'not lent'}: loading, first and second session take {taken} MB",
            flush=True,
        )
        del sessions, weights


def bytes_per_second(device: str) -> float:
    """The faster of a copy, which reads and writes, and a sum, each the best of 6."""
    source = torch.rand(2**29, device=device)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any], num_bytes: int) -> float:
        return num_bytes / min(seconds(run, device) for _ in range(6))

    return max(best(lambda: target.copy_(source), 2 * source.nbytes), best(source.sum, source.nbytes))


def seconds(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def describe_times(bundle: Path, provider: str) -> None:
    rate = bytes_per_second(provider)
    session = BundleSession(bundle, provider=provider)
    work = measure_work(bundle).decode(CONTEXT + STEPS // 2, num_rows=1)
    floor = work.bytes / rate
    prompt = torch.randint(0, 1000, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    ttft = statistics.median([time_prefill(session, [prompt]) for _ in range(ROUNDS)][2:])
    print(f"  {rate / 1e12:.2f} TB/s; prompt of {CONTEXT} tokens {ttft * 1e3:.2f} ms", flush=True)
    for num_rows in (1, 4, 8):
        pool = session.pool
        ways = [] if pool is None or not pool.captures_left else ["captured"]
        for way in (*ways, *(["as they are"] if num_rows == 1 or not ways else [])):
            # Buffers of another size: those of the captured conversation bring its captured steps.
            left = 0 if pool is None else pool.captures_left
            if way == "as they are" and pool is not None:
                pool.captures_left = 0
            talk = session.start(num_rows, max_positions=CONTEXT + STEPS + STRIDE * (way != "captured"))
            talk.prefill_greedily([prompt] * num_rows)
            times = [time_decode(talk, CONTEXT, num_new_tokens=STEPS) for _ in range(ROUNDS)][2:]
            if pool is not None:
                pool.captures_left = left
            step = statistics.median(times)
            print(f"  steps of {num_rows} rows, {way}: {step * 1e3:.3f} ms, {step / floor:.2f} of the floor of one row")
            del talk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=["qwen2.5-0.5b", "llama-3.2-1b", "7b"])
    parser.add_argument("--precision", action="append", choices=[*DTYPES, "int4"])
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.provider == "cuda":
        print(torch.cuda.get_device_name())
    for name in arguments.model or ["qwen2.5-0.5b"]:
        for precision in arguments.precision or ["fp16"]:
            with tempfile.TemporaryDirectory() as folder:
                bundle = write_bundle(Path(folder), name, precision, arguments.provider)
                print(f"{name}, {precision}", flush=True)
                if arguments.provider == "cuda":
                    describe_copies(bundle)
                describe_times(bundle, arguments.provider)


if __name__ == "__main__":
    main()
