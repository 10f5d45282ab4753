"""What is said of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from voidprune.quality.machine import CARD_FIELDS, describe_card, describe_machine


def test_system_and_cores_are_named() -> None:
    described = describe_machine()
    assert platform.machine() in described
    assert f"{os.cpu_count()} cores" in described


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def write_tool(folder: Path, lines: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{lines}\n")
    tool.chmod(0o755)


def test_a_card_is_described_as_its_tool_does(tools: Path) -> None:
    values = [f"value {number}" for number in range(len(CARD_FIELDS))]
    write_tool(tools, f'case "$*" in *{",".join(CARD_FIELDS)}*) echo "{", ".join(values)}";; *) exit 2;; esac')
    assert describe_card() == dict(zip(CARD_FIELDS, values, strict=True))


def test_no_card(tools: Path) -> None:
    assert describe_card() is None
    write_tool(tools, "exit 9")
    assert describe_card() is None
