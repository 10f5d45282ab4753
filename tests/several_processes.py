"""Two processes that train together over the loopback device, as on two GPUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def launcher() -> tuple[str, ...]:
    """What stands between the interpreter and a script. `accelerate launch --cpu` would start one process only, and say nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    return (*module, "--master-addr", "127.0.0.1", "--master-port", str(port))


def environment(**variables: str) -> Mapping[str, str]:
    """Of a child, with one thread, as the tests have."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
