"""What was seen on this machine. Pure values: what they mean is said in `software.py` and `hardware.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Package:
    """A distribution and the module that it brings.

    `installed` is the version by its metadata, None where there is none. `failure` says in one line why the module cannot be
    imported, None where it can or nobody tried.
    """

    name: str
    installed: str | None
    failure: str | None = None


@dataclass(frozen=True)
class Runtime:
    """The files in `onnxruntime/`, as they describe themselves.

    `package` and `version` are what the wheel was built as, None where the files do not say so. `cuda` is the CUDA version that
    it was built with. `failure` says why it cannot be imported.
    """

    package: str | None = None
    version: str | None = None
    cuda: str | None = None
    providers: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class Trial:
    """What became of a session with one node. `got` are the providers that the session said it had."""

    got: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees; memory in bytes."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Torch:
    """`cuda` is the CUDA version of the build, None for a CPU build."""

    version: str | None = None
    cuda: str | None = None
    devices: tuple[Device, ...] = ()
    failure: str | None = None


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver. `cuda` is the newest CUDA that it speaks, as (major, minor).

    `has_device`: there is a device file, whether or not the driver works.
    """

    has_device: bool = False
    version: str | None = None
    cuda: tuple[int, int] | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Hub:
    """`status` is that of the answer to one HEAD request, None where none came or none was asked for."""

    endpoint: str | None = None
    offline: bool = False
    status: int | None = None
    failure: str | None = None
    has_token: bool = False


@dataclass(frozen=True)
class Folder:
    """A place to write to. `free_bytes` is None where the system does not say."""

    path: str
    writable: bool
    free_bytes: int | None


@dataclass(frozen=True)
class Machine:
    """`usable_cores` are those that this process may run on; `core_limit` what its container grants, None for all of them.

    Memory in bytes, within the limit of the container where there is one; None where the system does not say.
    """

    usable_cores: int
    core_limit: float | None
    omp_threads: str | None
    memory_bytes: int | None
    free_memory_bytes: int | None


@dataclass(frozen=True)
class Model:
    """A model, by its headers alone; sizes in bytes.

    `part_bytes` is the largest thing that has to be in memory in float32 at once: a decoder layer, or all that is in none.
    `failure` and `hint` say why it cannot be opened.
    """

    name: str
    model_type: str | None = None
    num_layers: int = 0
    dtype: str | None = None
    stored_bytes: int = 0
    fp32_bytes: int = 0
    part_bytes: int = 0
    is_remote: bool = False
    is_quantized: bool = False
    failure: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that was seen. What is None was not examined.

    `flavours` are the distributions that write into `onnxruntime/`, with their versions. `libraries` are what onnxruntime's CUDA
    provider needs, each with the reason why it cannot be loaded, or None where it can.
    """

    python: tuple[int, int, int]
    system: str
    processor: str
    packages: Mapping[str, Package]
    extras: Mapping[str, Package]
    flavours: Mapping[str, str]
    runtime: Runtime
    torch: Torch
    driver: Driver
    machine: Machine
    hub: Hub
    output: Folder
    temporary: Folder
    cache: Folder | None
    libraries: Mapping[str, str | None] = field(default_factory=dict)
    trials: Mapping[str, Trial] = field(default_factory=dict)
    model: Model | None = None

    def to_document(self) -> dict[str, Any]:
        return asdict(self)
