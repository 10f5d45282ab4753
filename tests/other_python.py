"""Runtimes that do not share our environment: tests of them run a script in an interpreter of theirs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class OtherPython:
    """An interpreter that has the package. Scripts read JSON from their standard input and print JSON."""

    executable: str

    def run(self, script: str, document: Any) -> Any:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [self.executable, "-W", "ignore", "-c", script],
            input=json.dumps(document),
            capture_output=True,
            text=True,
            env={**environment, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def find_python(variable: str, module: str, *, target: str) -> OtherPython:
    """The interpreter that an environment variable names, else this one where it has the module; else the test is skipped."""
    if variable in os.environ:
        return OtherPython(os.environ[variable])
    parts = module.split(".")
    if all(importlib.util.find_spec(".".join(parts[:length])) for length in range(1, len(parts) + 1)):
        return OtherPython(sys.executable)
    pytest.skip(f"{module} is not installed here; `{target}` makes an environment that has it, and runs this test")
