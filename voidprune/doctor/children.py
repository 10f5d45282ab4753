"""An examination in a process of its own: what crashes or hangs there is an answer like any other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

_START = "import json, sys; sys.path[:] = json.loads(sys.stdin.read()); from voidprune.doctor.examinations import main; main()"


class Failure(Exception):  # noqa: N818  no error of ours: it is what was found
    """What was examined raised, died or took too long. The message is one line."""


def run_examination(name: str, *arguments: str, timeout: float) -> Any:
    """What the function of this name in `examinations.py` returns, called in a child with the paths of this process.

    Raises Failure.
    """
    # -P and the same sys.path: what is imported there is what would be imported here, wherever the command was started.
    command = [sys.executable, "-P", "-c", _START, name, *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "NO_COLOR": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(sys.path),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"no answer in {timeout:.0f} s") from error
    except OSError as error:
        raise Failure(f"no process could be started: {error.strerror}") from error
    if done.returncode < 0:
        raise Failure(f"it crashes ({_signal_name(-done.returncode)})")
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failure(redact(lines[-1]) if lines else f"it ends with exit code {done.returncode}") from error
    if "failure" in answer:
        raise Failure(redact(answer["failure"]))
    return answer["found"]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {number}"


def redact(text: str) -> str:
    """Without passwords in URLs and without tokens."""
    return re.sub(r"\bhf_\w+", "hf_...", re.sub(r"//[^/@\s]+@", "//", text))
