"""`voidprune doctor`: findings on the terminal and for scripts, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import invoke
from voidprune.doctor import collection

pytestmark = pytest.mark.usefixtures("patient_doctor")


def test_every_finding_is_a_line_and_what_mends_it(tmp_path: Path) -> None:
    result = invoke("doctor", "demo", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    statuses = {line[:12].strip() for line in result.stdout.splitlines()}
    assert statuses <= {"ok", "not checked", "warning", ""}
    assert "demo: llama, 12 layers, 7.40 MB in F32" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_problem_exits_with_1_and_the_document_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "EXTRAS", {})  # seconds to import
    result = invoke("doctor", tmp_path / "absent", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["status"] == "problem"
    (problem,) = [finding for finding in document["findings"] if finding["status"] == "problem"]
    assert problem["area"] == "model"
    assert "no model at" in problem["fact"]
    assert problem["mend"] == "give a folder with config.json and model.safetensors, or a Hub id"


def test_it_runs_where_hardly_anything_is_installed(tmp_path: Path) -> None:
    """click alone is what the command line takes; everything else may be broken, rich and numpy too."""
    import click

    root = Path(__file__).parents[2]
    (tmp_path / "click").symlink_to(Path(click.__file__).parent)
    script = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        f"sys.path += [{str(root)!r}, {str(tmp_path)!r}]; from voidprune.cli import main; main(['doctor', 'demo'])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "rich is not installed" in done.stdout
    assert "onnxruntime is not installed" in done.stdout
