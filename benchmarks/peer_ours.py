"""Ours among the runtimes of `benchmarks/peers.py` (see `peer_runtimes.py`), and what the machine does at best."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Voidprune:
    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        from voidprune.execution.providers import size_thread_pool
        from voidprune.execution.session import BundleSession

        size_thread_pool(threads)
        self.session = BundleSession(folder)
        self.positions = 2 * positions  # as if the conversation went on: buffers have room to spare
        self.prefill([0, 0])  # a head is opened when it is needed first

    def prefill(self, tokens: list[int]) -> int:
        return self.first_token(self.session.start(max_positions=self.positions), tokens)

    def context(self, tokens: list[int]) -> None:
        self.conversation, self.length = self.session.start(max_positions=self.positions), len(tokens)
        self.first = self.first_token(self.conversation, tokens)

    def start(self) -> None:
        self.conversation.rewind(self.length)
        self.token = self.first

    def step(self) -> int:
        self.token = self.next_token(self.conversation, self.token)
        return self.token

    def first_token(self, conversation: Any, tokens: list[int]) -> int:
        return int(conversation.prefill_greedily([tokens])[0])

    def next_token(self, conversation: Any, token: int) -> int:
        import numpy as np

        return int(conversation.decode_greedily(np.array([[token]]))[0, 0])


class VoidpruneLogits(Voidprune):
    """All logits of every step, as sampling needs them."""

    def first_token(self, conversation: Any, tokens: list[int]) -> int:
        return int(conversation.prefill([tokens]).argmax())

    def next_token(self, conversation: Any, token: int) -> int:
        import numpy as np

        return int(conversation.decode(np.array([[token]]))[0, -1].argmax())


class Machine:
    """No runtime: what the machine does at best with the work of a bundle."""

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        from voidprune.execution.providers import size_thread_pool
        from voidprune.quality.floors import RateMeter
        from voidprune.quality.work import measure_work

        size_thread_pool(threads)
        self.work = measure_work(folder)
        step = self.work.decode(positions, num_rows=1).bytes
        self.meter = RateMeter(self.work.manifest, provider="cpu", threads=threads, step_bytes=step)

    def floors(self, prompt: int, context: int) -> dict[str, Any]:
        """The least seconds that a prefill and a step of decode take on this machine, now."""
        rates = self.meter.measure()
        prefill, decode = self.work.prefill(prompt, num_rows=1), self.work.decode(context, num_rows=1)
        greedily = self.work.greedily()
        return {
            "prefill": rates.seconds(prefill),
            "decode": rates.seconds(decode),
            "greedy prefill": rates.seconds(greedily.prefill(prompt, num_rows=1)),
            "greedy decode": rates.seconds(greedily.decode(context, num_rows=1)),
            "decode_bytes": decode.bytes,
            "prefill_flops": prefill.flops,
            "bytes_per_second": max(rates.bytes_per_second.values()),
            "flops_per_second": max(rates.flops_per_second.values()),
        }
