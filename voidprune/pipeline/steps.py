"""Steps of one job in one folder: each is done once, and again only when what it depends on has changed.

A step depends on its settings and on the contents of what earlier steps wrote. Beside the results lies `steps.json`, which says
of every step what it was made from and what it made; a result that was edited or removed is made anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import voidprune
from voidprune import artifacts
from voidprune.errors import ArtifactError, OutputError, RecipeError
from voidprune.execution import manifest as manifests

FILE = "steps.json"
KIND, VERSION = "steps", 1


@dataclass(frozen=True)
class Step:
    """`run` writes `output`, a file or the folder of a bundle, in the job's folder.

    `settings` is all that it depends on but `inputs`, the outputs of earlier steps that it reads.
    """

    name: str
    output: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    run: Callable[[], None]


@dataclass(frozen=True)
class StepState:
    """Whether a step has to run, and why; `seconds` it took, None where it did not run."""

    name: str
    output: str
    must_run: bool
    reason: str
    seconds: float | None = None


def preview_steps(steps: Sequence[Step], folder: Path, *, rerun: Collection[str] = ()) -> list[StepState]:
    """What `run_steps` would do. A step that reads what another one will write anew is taken to run."""
    record, states = _read_record(folder), []
    changing: set[str] = set()
    for step in steps:
        stale = sorted(changing & set(step.inputs))
        reason = f"{stale[0]} will be new" if stale else _reason(step, folder, record, rerun)
        if reason:
            changing.add(step.output)
        states.append(StepState(step.name, step.output, bool(reason), reason or "nothing has changed"))
    return states


def run_steps(steps: Sequence[Step], folder: Path, *, rerun: Collection[str] = ()) -> Iterator[StepState]:
    """Do what has to be done, in order, and say so after each step. `rerun` names steps to do in any case.

    Raises RecipeError for a name in `rerun` that is no step, OutputError where the folder holds something else, and whatever a
    step raises: steps before it are kept.
    """
    if unknown := set(rerun) - {step.name for step in steps}:
        raise RecipeError(
            f"there is no step {min(unknown)!r}", hint=f"steps here: {', '.join(step.name for step in steps)}"
        )
    if folder.exists() and not (folder / FILE).is_file() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds something else", hint="choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    record = _read_record(folder)
    _write_record(folder, record)
    for step in steps:
        reason = _reason(step, folder, record, rerun)
        if not reason:
            yield StepState(step.name, step.output, False, "nothing has changed")
            continue
        record.pop(step.name, None)
        _write_record(folder, record)
        started = time.perf_counter()
        step.run()
        seconds = time.perf_counter() - started
        record[step.name] = {"from": _key(step, folder), "output": content_hash(folder / step.output)}
        _write_record(folder, record)
        yield StepState(step.name, step.output, True, reason, seconds)


def content_hash(path: Path) -> str | None:
    """Of a file, or of a bundle by its manifest, which holds the hashes of all other files; None where there is nothing."""
    file = path / manifests.FILE if path.is_dir() else path
    return artifacts.file_hash(file) if file.is_file() else None


def _reason(step: Step, folder: Path, record: Mapping[str, Mapping[str, Any]], rerun: Collection[str]) -> str:
    """Why a step has to run; empty where it has not."""
    done = record.get(step.name)
    if done is None:
        return "not done yet"
    if step.name in rerun:
        return "asked for"
    if content_hash(folder / step.output) != done["output"]:
        return f"{step.output} was changed or removed"
    if _key(step, folder) != done["from"]:
        return "what it depends on has changed"
    return ""


def _key(step: Step, folder: Path) -> str:
    """A hash of all that a step depends on."""
    document = {
        "version": voidprune.__version__,
        "settings": dict(step.settings),
        "inputs": {name: content_hash(folder / name) for name in step.inputs},
    }
    return "sha256:" + hashlib.sha256(artifacts.canonical_bytes(document)).hexdigest()


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / FILE).is_file():
        return {}
    place = folder / FILE
    document = artifacts.read_document(place, kind=KIND, version=VERSION)
    artifacts.check_keys(document, required={"schema", "steps"}, place=str(place))
    steps = document["steps"]
    if not isinstance(steps, dict) or not all(
        isinstance(done, dict) and done.keys() == {"from", "output"} for done in steps.values()
    ):
        raise ArtifactError(f"{place} is broken", hint="remove it: all steps are then done anew")
    return steps


def _write_record(folder: Path, record: Mapping[str, Mapping[str, Any]]) -> None:
    document = {"schema": artifacts.schema_key(KIND, VERSION), "steps": dict(record)}
    artifacts.write_file(folder / FILE, artifacts.canonical_bytes(document), overwrite=True)
