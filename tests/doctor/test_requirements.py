"""What the doctor asks for is what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from voidprune.doctor.requirements import EXTRAS, MINIMAL_PYTHON, REQUIRED, RUNTIME_MINIMAL, Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def specifiers(lines: list[str]) -> set[str]:
    return {re.split(r"\s*;", line)[0] for line in lines}


def test_required_packages() -> None:
    flavours = {f"onnxruntime>={RUNTIME_MINIMAL}", f"onnxruntime-gpu>={RUNTIME_MINIMAL}"}
    found = {requirement.specifier for requirement in REQUIRED.values()}
    assert specifiers(PROJECT["dependencies"]) == found | flavours
    assert PROJECT["requires-python"] == f">={MINIMAL_PYTHON[0]}.{MINIMAL_PYTHON[1]}"


def test_extras() -> None:
    declared = {
        (extra, specifier)
        for extra, lines in PROJECT["optional-dependencies"].items()
        for specifier in specifiers(lines)
        if extra not in ("dev", "cuda")
    }
    assert {(extra.extra, extra.requirement.specifier) for extra in EXTRAS.values()} == declared


@pytest.mark.parametrize(
    ("version", "admitted"),
    [("4.57", True), ("4.57.0", True), ("5.23.0+cpu", True), ("5.0.0rc1", True), ("4.56.9", False), ("6.0", False), ("6", False)],
)  # fmt: skip
def test_versions(version: str, admitted: bool) -> None:
    assert Requirement("transformers", "transformers", "4.57", "6").admits(version) is admitted
