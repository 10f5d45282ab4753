"""The environments of `benchmarks/peers.py`: each runtime has one of its own, made once, with pinned versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """`packages` are installed after `first`, so that pip does not look for another torch. `built`: from its source, beside it."""

    constraints: tuple[str, ...]
    packages: tuple[str, ...]
    first: tuple[str, ...] = ("torch",)
    built: str | None = None


ENVIRONMENTS = {
    "genai": Environment(
        ("constraints.txt", "constraints-peers.txt"),
        ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers"),
    ),
    "exporters": Environment(
        ("constraints.txt", "constraints-peers.txt"), ("transformers", "onnx", "onnxruntime", "onnxscript")
    ),
    # Without accelerate a tied head is exported twice.
    "optimum": Environment(
        ("constraints-optimum.txt", "constraints-peers.txt"), ("optimum-onnx[onnxruntime]", "accelerate")
    ),
    "llama-cpp": Environment(
        ("constraints.txt", "constraints-peers.txt"),
        ("transformers", "gguf", "sentencepiece"),
        built="llama-cpp-python",
    ),
}
SOURCE = "source"


def prepare_environment(name: str, folder: Path) -> Path:
    """The interpreter of an environment, which is made unless it is there already as it should be."""
    environment, home = ENVIRONMENTS[name], folder / name
    python = home / "bin" / "python"
    stamp = home / "installed"
    wanted = repr(environment) + "".join((ROOT / file).read_text() for file in environment.constraints)
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    shutil.rmtree(home, ignore_errors=True)
    say(f"making the environment {name} in {home}")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pins = [argument for file in environment.constraints for argument in ("--constraint", str(ROOT / file))]
    install = [str(python), "-m", "pip", "install", "--quiet", *pins]
    subprocess.run([*install, *environment.first], check=True, stdout=sys.stderr)
    subprocess.run([*install, *environment.packages], check=True, stdout=sys.stderr)
    if environment.built is not None:
        source = fetch_source(environment.built, python, pins, home)
        say(f"building {environment.built}: ten minutes on two cores")
        # Without its tools for pictures.
        settings = {**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
        subprocess.run([*install, str(source)], check=True, stdout=sys.stderr, env=settings)
    stamp.write_text(digest)
    return python


def fetch_source(package: str, python: Path, pins: list[str], home: Path) -> Path:
    """The unpacked source distribution of a package: its converter is in there, and in no wheel."""
    archives, target = home / "archive", home / SOURCE
    download = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
    subprocess.run([*download, *pins, "--dest", str(archives), package], check=True, stdout=sys.stderr)
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    (source,) = target.iterdir()
    return source


def worker_variables(name: str | None, python: Path) -> dict[str, str]:
    """What a worker finds in its environment: nothing of ours but for our own."""
    kept = {key: value for key, value in os.environ.items() if name is None or key != "PYTHONPATH"}
    found = {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "llama-cpp":
        tools = [folder / "vendor" / "llama.cpp" for folder in (python.parent.parent / SOURCE).glob("*")]
        found["LLAMA_CPP_SOURCE"] = str(tools[0]) if tools else os.environ.get("LLAMA_CPP_SOURCE", "")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
