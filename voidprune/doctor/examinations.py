"""What runs in a child process: each function imports what may be broken, and returns plain JSON.

Only `children.py` runs this, as a program: nobody imports it into a process that has to live.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

ONE_NODE = (
    b"\x08\x08:9\n\x0e\n\x01x\n\x01x\x12\x01y\x22\x03Add\x12\x05probeZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX model that adds a vector of one number to itself. Bytes, so that it needs no onnx, which may be what is broken."""


def main() -> None:
    """Print {"found": ...} or {"failure": a line}. What libraries print goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    name, *arguments = sys.argv[1:]
    try:
        answer = {"found": EXAMINATIONS[name](*arguments)}
    except (Exception, SystemExit) as error:  # whatever a broken package raises
        answer = {"failure": _describe(error)}
    with os.fdopen(out, "w") as stream:
        json.dump(answer, stream)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that crash when they are unloaded have said what they had to say


def _describe(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def import_module(name: str) -> dict[str, Any]:
    importlib.import_module(name)
    return {}


def import_transformers() -> dict[str, Any]:
    """transformers imports its parts when they are asked for: these are ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    return {"classes": [kind.__name__ for kind in (AutoModelForCausalLM, AutoTokenizer, DynamicCache)]}


def look_at_torch() -> dict[str, Any]:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            devices.append(
                {"name": torch.cuda.get_device_name(index), "total_bytes": int(total), "free_bytes": int(free)}
            )
    torch.ones(2, 2) @ torch.ones(2, 2)
    return {"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def look_at_runtime() -> dict[str, Any]:
    """Of which wheel the files in `onnxruntime/` are. Where another wheel was unpacked over them, they say so."""
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError("the package onnxruntime is empty")
    try:
        built = importlib.import_module("onnxruntime.capi.build_and_package_info")
    except ImportError:
        built = None
    return {
        "package": getattr(built, "package_name", None),
        "version": getattr(built, "__version__", None) or onnxruntime.__version__,
        "cuda": getattr(built, "cuda_version", None) or None,
        "providers": list(onnxruntime.get_available_providers()),
    }


def try_provider(provider: str) -> dict[str, Any]:
    """Open a session as `execution/providers.py` does, and run it."""
    import numpy as np
    import onnxruntime

    if provider.startswith("CUDA") and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ONE_NODE, options, providers=[provider], enable_fallback=False)
    (doubled,) = session.run(None, {"x": np.ones(1, np.float32)})
    if doubled.tolist() != [2.0]:
        raise ArithmeticError(f"1 + 1 is {doubled.tolist()} there")
    return {"got": list(session.get_providers())}


def load_libraries(*names: str) -> dict[str, str | None]:
    """Each library, with the reason why it cannot be loaded. onnxruntime first loads what NVIDIA's wheels brought."""
    try:
        import onnxruntime

        onnxruntime.preload_dlls()
    except Exception:  # examined for itself; libraries of the system can be found without it
        pass
    found: dict[str, str | None] = {}
    for name in names:
        try:
            ctypes.CDLL(name)
            found[name] = None
        except OSError as error:
            found[name] = str(error)
    return found


def ask_driver() -> dict[str, Any]:
    """The newest CUDA that the driver speaks, by the driver itself."""
    driver = ctypes.CDLL("libcuda.so.1")
    if status := driver.cuInit(0):
        raise OSError(f"cuInit says {status}")
    version = ctypes.c_int()
    if status := driver.cuDriverGetVersion(ctypes.byref(version)):
        raise OSError(f"cuDriverGetVersion says {status}")
    return {"cuda": [version.value // 1000, version.value % 1000 // 10]}


def ask_hub(seconds: str) -> dict[str, Any]:
    """One HEAD request, by huggingface_hub's own client and settings. Never the token itself."""
    import huggingface_hub
    from huggingface_hub import constants

    asked: dict[str, Any] = {
        "endpoint": constants.ENDPOINT,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "has_token": huggingface_hub.get_token() is not None,
        "cache": str(constants.HF_HOME),
        "status": None,
        "failure": None,
    }
    if not asked["offline"]:
        try:
            answer = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=float(seconds))
            asked["status"] = int(answer.status_code)
        except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface_hub
            asked["failure"] = _describe(error)
    return asked


def open_model(name: str) -> dict[str, Any]:
    """The sizes of a model by its headers. Of one on the Hub, nothing else of the weights is fetched."""
    from voidprune.errors import VoidpruneError
    from voidprune.models.sizes import measure_sizes
    from voidprune.pipeline.models import open_kept_layers

    try:
        checkpoint = open_kept_layers(name)
        if checkpoint.is_packed:
            return {
                "model_type": checkpoint.config["model_type"],
                "num_layers": checkpoint.architecture.num_layers,
                "dtype": "packed matrices",
                "stored_bytes": sum(file.stat().st_size for file in {one.file for one in checkpoint.tensors.values()}),
                "is_quantized": True,
            }
        sizes = measure_sizes(checkpoint, dtype="F32")
        return {
            "model_type": checkpoint.config["model_type"],
            "num_layers": checkpoint.architecture.num_layers,
            "dtype": checkpoint.dtype,
            "stored_bytes": checkpoint.num_bytes,
            "fp32_bytes": sizes.total_bytes,
            "part_bytes": max(sizes.other_bytes, *(layer.total_bytes for layer in sizes.layers)),
            "is_remote": checkpoint.revision is not None,
            "is_quantized": bool(checkpoint.config.get("quantization_config")),
        }
    except VoidpruneError as error:
        return {"failure": error.message, "hint": error.hint}


EXAMINATIONS: dict[str, Callable[..., Any]] = {
    "import": import_module,
    "transformers": import_transformers,
    "torch": look_at_torch,
    "runtime": look_at_runtime,
    "provider": try_provider,
    "libraries": load_libraries,
    "driver": ask_driver,
    "hub": ask_hub,
    "model": open_model,
}
