"""A machine on which everything is as it should be: tests break one thing of it."""

from __future__ import annotations

from voidprune.doctor.facts import Device, Driver, Facts, Folder, Hub, Machine, Model, Package, Runtime, Torch, Trial
from voidprune.doctor.requirements import EXTRAS, REQUIRED

GB = 10**9
CUDA_LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcudnn.so.9")

MODEL = Model(
    "model", model_type="llama", num_layers=32, dtype="BF16", stored_bytes=16 * GB, fp32_bytes=32 * GB, part_bytes=GB
)

CPU_MACHINE = Facts(
    python=(3, 12, 1),
    system="linux",
    processor="x86_64",
    packages={name: Package(name, requirement.minimal) for name, requirement in REQUIRED.items()},
    extras={
        name: Package(name, None if name.startswith("onnxruntime-genai") else extra.requirement.minimal)
        for name, extra in EXTRAS.items()
    },
    flavours={"onnxruntime-gpu": "1.31.1"},
    runtime=Runtime("onnxruntime-gpu", "1.31.1", "13.0", ("CUDAExecutionProvider", "CPUExecutionProvider")),
    torch=Torch("2.13.0+cpu"),
    driver=Driver(failure="OSError: libcuda.so.1: cannot open shared object file"),
    machine=Machine(8, None, None, 64 * GB, 60 * GB),
    hub=Hub("https://huggingface.co", status=200, has_token=True),
    output=Folder("/work", True, 100 * GB),
    temporary=Folder("/tmp", True, 100 * GB),
    cache=Folder("/cache", True, 100 * GB),
    libraries=dict.fromkeys(CUDA_LIBRARIES, "cannot open shared object file"),
    trials={
        "CUDAExecutionProvider": Trial(("CPUExecutionProvider",)),
        "CPUExecutionProvider": Trial(("CPUExecutionProvider",)),
    },
    model=MODEL,
)

GPU_MACHINE = Facts(
    **{
        **vars(CPU_MACHINE),
        "torch": Torch("2.13.0", "13.0", (Device("RTX", 24 * GB, 23 * GB),)),
        "driver": Driver(True, "580.65.06", (13, 0)),
        "libraries": dict.fromkeys(CUDA_LIBRARIES),
        "trials": {
            "CUDAExecutionProvider": Trial(("CUDAExecutionProvider", "CPUExecutionProvider")),
            "CPUExecutionProvider": Trial(("CPUExecutionProvider",)),
        },
    }
)
