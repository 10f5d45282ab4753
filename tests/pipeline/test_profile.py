"""A profile that was killed at any point resumes to the bytes of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voidprune.errors import ArtifactError, OutputError
from voidprune.pipeline.models import open_model
from voidprune.pipeline.profile import profile_model
from voidprune.profiling.calibration import default_rows

NUM_BATCHES = 4  # of each of the two steps
SETTINGS = {"num_samples": 8, "max_new_tokens": 4, "batch_size": 2, "device": "cpu"}
KILLS = (1, 3, 4, 6, 8)  # in the middle and at the end of generating, of tracing

# Everything is imported once; each kill happens in a child of its own.
SCRIPT = f"""
import contextlib, os, signal, sys
from pathlib import Path
import torch
from voidprune.pipeline.models import open_model
from voidprune.pipeline.profile import profile_model
from voidprune.profiling.calibration import default_rows

torch.set_num_threads(1)
for kill in {KILLS!r}:
    left = kill

    @contextlib.contextmanager
    def track(what, total, unit):
        def advance(amount):
            global left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

    child = os.fork()
    if not child:
        profile_model(open_model("demo"), default_rows(), output=Path(sys.argv[1]) / f"{{kill}}.json", track=track, **{SETTINGS!r})
        os._exit(1)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        sys.exit(f"the run that was to be killed after {{kill}} batches was not")
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the journals of runs that were killed after some batches."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "profile.json"
    profile_model(open_model("demo"), default_rows(), output=output, **SETTINGS)  # type: ignore[arg-type]
    assert [path.name for path in output.parent.iterdir()] == ["profile.json"]
    return output.read_bytes()


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_profile_resumes_to_the_same_bytes(kill: int, killed: Path, uninterrupted: bytes) -> None:
    assert torch.get_num_threads() == 1
    output = killed / f"{kill}.json"
    partial = killed / f"{kill}.json.partial"
    assert not output.exists()
    steps = [json.loads(line)["step"] for line in partial.read_bytes().splitlines()[1:]]
    expected = [f"{what} {number}" for what in ("generate", "trace") for number in range(NUM_BATCHES)]
    assert steps == expected[:kill]
    with partial.open("ab") as file:  # what a kill in the middle of a write leaves behind
        file.write(b'{"step": "generate')
    profile_model(open_model("demo"), default_rows(), output=output, **SETTINGS)  # type: ignore[arg-type]
    assert output.read_bytes() == uninterrupted
    assert not partial.exists()


def test_other_settings_do_not_take_the_journal_up(tmp_path: Path) -> None:
    def stop(_what: str, _total: int | None, _unit: str) -> None:
        raise KeyboardInterrupt

    def profile(**changes: object) -> None:
        settings = {**SETTINGS, "output": tmp_path / "profile.json", **changes}
        profile_model(open_model("demo"), default_rows(), **settings)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        profile(track=stop)
    for change in ({"batch_size": 4}, {"num_samples": 7}, {"max_new_tokens": 3}, {"dtype": "bf16"}):
        with pytest.raises(ArtifactError, match="was begun by another run") as caught:
            profile(**change)
        assert next(iter(change)).replace("num_", "") in caught.value.message
    profile(batch_size=4, overwrite=True)
    with pytest.raises(OutputError, match="exists"):
        profile(batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
