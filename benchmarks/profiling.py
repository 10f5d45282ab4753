"""What tracing costs: the same forward passes with and without it, in turns, in one run.

    python benchmarks/profiling.py [--rounds N] [--threads 1] [--model demo --model qwen2.5-0.5b] [--device cuda --dtype bf16]

Prints tokens per second of both, the median over rounds, and the cost: the median over rounds of the ratio of the two times that
follow each other, less one, by the clock and in processor time (which a busy machine disturbs less). The traced passes include
everything that `voidprune profile` does with a batch, the journal on disk among it. "qwen2.5-0.5b" has that model's shape with
random weights; no head runs in either.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from voidprune.journal import Journal
from voidprune.models.pretrained import DTYPES, load_model
from voidprune.pipeline.models import demo_folder
from voidprune.profiling.calibration import Sample
from voidprune.profiling.profile import LacSettings
from voidprune.profiling.tracing import batch_by_length, pad_sequences, run_layers, trace_layers

# name: batches a round, tokens of a prompt, tokens of a response, rounds. Rounds are short, so that both kinds of pass meet
# the same machine.
SHAPES = {"demo": (4, 64, 65, 41), "qwen2.5-0.5b": (1, 32, 33, 15)}


def make_model(name: str) -> PreTrainedModel:
    if name == "demo":
        return load_model(demo_folder())
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def make_samples(name: str, batch_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 500, (length,), generator=generator).tolist())

    return [
        Sample(draw(SHAPES[name][1]), draw(SHAPES[name][2]), None, "default", str(number))
        for number in range(SHAPES[name][0] * batch_size)
    ]


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def describe_cost(times: list[tuple[float, float]]) -> str:
    ratios = sorted(with_it / without - 1 for without, with_it in times)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):+.1%} (middle half {low:+.1%} to {high:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: 41 of demo, 15 of qwen2.5-0.5b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model", action="append", choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.model or SHAPES:
        model = make_model(name).to(arguments.device, getattr(torch, DTYPES[arguments.dtype]))
        samples = make_samples(name, arguments.batch_size)
        lengths = [len(sample.prompt) + len((sample.response or ())[1:]) for sample in samples]

        def plain(
            model: PreTrainedModel = model, samples: list[Sample] = samples, lengths: list[int] = lengths
        ) -> None:
            for indices in batch_by_length(lengths, arguments.batch_size):
                with torch.inference_mode():
                    run_layers(model, pad_sequences([samples[index] for index in indices]))

        def traced(model: PreTrainedModel = model, samples: list[Sample] = samples) -> None:
            with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "profile.json", key={}) as journal:
                trace_layers(model, samples, lac=LacSettings(), batch_size=arguments.batch_size, journal=journal)

        rounds = arguments.rounds or SHAPES[name][3]
        plain(), traced()  # warm
        times: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for number in range(rounds):
            if number % 2:
                with_it = seconds(traced)
                times.append((seconds(plain), with_it))
            else:
                times.append((seconds(plain), seconds(traced)))
        clock, processor = ([(one[kind], other[kind]) for one, other in times] for kind in range(2))
        rates = [sum(lengths) / statistics.median(column) for column in zip(*clock, strict=True)]
        print(
            f"{name}: {sum(lengths)} tokens, batch {arguments.batch_size}, {arguments.threads} threads, "
            f"{arguments.dtype} on {arguments.device}, "
            f"{rounds} rounds: {rates[0]:,.0f} tokens/s without, {rates[1]:,.0f} with tracing\n"
            f"  cost by the clock {describe_cost(clock)}, in processor time {describe_cost(processor)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
