"""Which packages voidprune needs, in which versions, and which extra brings which. A test compares with pyproject.toml."""

from __future__ import annotations

import re
from dataclasses import dataclass

MINIMAL_PYTHON = (3, 11)


@dataclass(frozen=True)
class Requirement:
    """At least `minimal` and, where it is given, below `limit`. `module` is what it is imported as."""

    name: str
    module: str
    minimal: str
    limit: str | None = None

    @property
    def specifier(self) -> str:
        """As pip takes it."""
        return f"{self.name}>={self.minimal}" + (f",<{self.limit}" if self.limit else "")

    def admits(self, version: str) -> bool:
        found = _numbers(version)
        return found >= _numbers(self.minimal) and (self.limit is None or found < _numbers(self.limit))


@dataclass(frozen=True)
class Extra:
    """A package that is needed for some things only. `purpose` is what takes it."""

    extra: str
    requirement: Requirement
    purpose: str


REQUIRED = {
    requirement.name: requirement
    for requirement in (
        Requirement("torch", "torch", "2.6"),
        Requirement("transformers", "transformers", "4.57", "6"),
        Requirement("safetensors", "safetensors", "0.6"),
        Requirement("huggingface_hub", "huggingface_hub", "0.36"),
        Requirement("numpy", "numpy", "2.0"),
        Requirement("scipy", "scipy", "1.14"),
        Requirement("ml_dtypes", "ml_dtypes", "0.5"),
        Requirement("onnx", "onnx", "1.20"),
        Requirement("onnx-ir", "onnx_ir", "1.0"),
        Requirement("click", "click", "8.1"),
        Requirement("rich", "rich", "13.9"),
        Requirement("jinja2", "jinja2", "3.1"),
        Requirement("pyyaml", "yaml", "6.0"),
    )
}
RUNTIME_MINIMAL = "1.31"
GENAI_MINIMAL = "0.18"
CUDNN = "9"

EXTRAS = {
    extra.requirement.name: extra
    for extra in (
        Extra("report", Requirement("matplotlib", "matplotlib", "3.10"), "plots"),
        Extra("heal", Requirement("accelerate", "accelerate", "1.15"), "voidprune heal --method distill"),
        Extra("heal", Requirement("peft", "peft", "0.21"), "voidprune heal --method distill, unless --parameters full"),
        Extra("eval", Requirement("lm_eval", "lm_eval", "0.4.13"), "voidprune eval --harness"),
        Extra(
            "genai",
            Requirement("onnxruntime-genai-cuda", "onnxruntime_genai", GENAI_MINIMAL),
            "running exports in onnxruntime-genai",
        ),
        Extra(
            "genai",
            Requirement("onnxruntime-genai", "onnxruntime_genai", GENAI_MINIMAL),
            "running exports in onnxruntime-genai",
        ),
        Extra("optimum", Requirement("optimum-onnx", "optimum.onnxruntime", "0.1", "0.2"), "exports through Optimum"),
    )
}


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without zeros at its end: "2.6.0+cpu" and "2.6" are the same."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
