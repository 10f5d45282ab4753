"""What a file or folder of ours holds, read back: as documents, values and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from voidprune import artifacts, tables
from voidprune.errors import ArtifactError
from voidprune.execution import manifest as manifests
from voidprune.execution.manifest import Manifest
from voidprune.profiling import profile as profiles
from voidprune.profiling.profile import Profile
from voidprune.report.record import KIND as RECORD_KIND
from voidprune.report.record import RunRecord, read_record
from voidprune.schedule import KIND as SCHEDULE_KIND
from voidprune.schedule import ModelIdentity, Schedule, read_schedule

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What a folder holds. Evaluations, comparisons, benchmarks and the like are documents of their JSON form.

    `manifest` is that of the pruned bundle, one with graphs before one without, and `bundle` its folder within this one, "." for
    the folder itself. `files` are the names of the files that are read, with their hashes. `record` is the command that made the
    folder, where that was written down. `left_out` are sentences about files of ours that are not in here.
    """

    profile: Profile | None
    schedule: Schedule | None
    manifest: Manifest | None
    evaluation: artifacts.Document | None
    comparison: artifacts.Document | None
    benchmark: artifacts.Document | None
    probe: artifacts.Document | None = None
    harness: artifacts.Document | None = None
    adaptive: artifacts.Document | None = None
    bundle: str = ""
    files: tuple[tuple[str, str], ...] = ()
    record: RunRecord | None = None
    left_out: tuple[str, ...] = ()


def schema_kind(path: Path) -> str | None:
    """The kind that a JSON file says it is, or None where it is none of ours."""
    try:
        schema = json.loads(path.read_bytes()).get("schema", "")
    except (OSError, ValueError, AttributeError):
        return None
    kind = str(schema).removeprefix("voidprune.").partition("/")[0]
    return kind if str(schema).startswith("voidprune.") else None


def describe(path: Path) -> tuple[artifacts.Document, list[Any]]:
    """A file or bundle as its JSON document and as tables. Raises ArtifactError where it is none of ours."""
    file = path / manifests.FILE if path.is_dir() else path
    if not file.exists():
        raise ArtifactError(f"there is no {file}", hint="give a file or folder that voidprune wrote")
    kind = schema_kind(file)
    if kind == profiles.KIND:
        profile = profiles.read_profile(file)
        return profile.to_document(), [tables.profile_table(profile)]
    if kind == SCHEDULE_KIND:
        schedule = read_schedule(file)
        return schedule.to_document(), [tables.schedule_table(schedule)]
    if kind == manifests.KIND:
        manifest = manifests.read_manifest(file.parent)
        return manifest.to_document(), [tables.manifest_table(manifest), tables.schedule_table(manifest.schedule)]
    if kind in _RESULTS:
        document = _read_result(file, kind)
        shown = _RESULTS[kind](document)
        return document, shown if isinstance(shown, list) else [shown]
    raise ArtifactError(f"{file} is not a file of voidprune")


_RESULTS: dict[str, Callable[[artifacts.Document], Any]] = {
    "evaluation": tables.evaluation_table,
    "harness": tables.harness_table,
    "benchmark": tables.benchmark_table,
    "comparison": tables.comparison_table,
    "adaptive-evaluation": tables.adaptive_tables,
    "probe": tables.probe_tables,
}
_VERSIONS = {"benchmark": 2, "comparison": 2, "evaluation": 2}


def _read_result(file: Path, kind: str) -> artifacts.Document:
    """A result file. It is whole when its table can be made. Raises ArtifactError."""
    document = artifacts.read_document(file, kind=kind, version=_VERSIONS.get(kind, 1))
    try:
        _RESULTS[kind](document)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{file} is not a whole {kind}: {error!r}", hint="measure again") from error
    return document


def collect_findings(folder: Path) -> Findings:
    """Everything of ours in a folder and, for bundles, one level below.

    Of several files of a kind the first by name is taken. What cannot be read is left out. Raises ArtifactError where nothing is
    left, or where it is of two models.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", hint="give the folder that holds the results")
    reader = _FolderReader(folder)
    bundles = reader.bundles()
    pruned = {name: bundle for name, bundle in bundles.items() if not bundle.schedule.is_full} or bundles
    name = min(pruned, key=lambda one: not pruned[one].graphs, default="")
    manifest = pruned[name] if pruned else None
    schedule = reader.first(SCHEDULE_KIND, read_schedule)
    profile = reader.first(profiles.KIND, profiles.read_profile)
    results = {kind: found for kind in _RESULTS if (found := reader.first(kind, _result_reader(kind))) is not None}
    record = reader.first(RECORD_KIND, read_record)
    if not reader.taken.keys() & _READABLE and not bundles:
        if reader.left_out:
            raise ArtifactError(f"{folder} holds nothing that can be read: {reader.left_out[0]}")
        raise ArtifactError(f"{folder} holds no results", hint="voidprune eval, bench and export write some")
    schedule = schedule or (manifest.schedule if manifest is not None else None)
    parts = {"schedule": schedule, "profile": profile, "export": None if manifest is None else manifest.schedule}
    models = {what: _Subject.of(part.model) for what, part in parts.items() if part is not None}
    for kind, result in results.items():
        if (subject := _subject(result, place=kind)) is not None:
            models[kind] = subject
    _check_one_model(folder, models)
    read = [reader.taken[kind] for kind in sorted(reader.taken.keys() & _READABLE)]
    if manifest is not None:
        read.append(folder / name / manifests.FILE)
    return Findings(
        profile=profile,
        schedule=schedule,
        manifest=manifest,
        evaluation=results.get("evaluation"),
        comparison=results.get("comparison"),
        benchmark=results.get("benchmark"),
        probe=results.get("probe"),
        harness=results.get("harness"),
        adaptive=results.get("adaptive-evaluation"),
        bundle=name,
        files=tuple((file.relative_to(folder).as_posix(), artifacts.file_hash(file)) for file in read),
        record=record,
        left_out=tuple(reader.left_out),
    )


def _result_reader(kind: str) -> Callable[[Path], artifacts.Document]:
    def read(file: Path) -> artifacts.Document:
        document = _read_result(file, kind)
        _subject(document, place=str(file))
        return document

    return read


class _FolderReader:
    """The files of ours in a folder. `taken` are those that were read, by kind; `left_out` says what was not, in sentences."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: dict[str, Path] = {}
        self.left_out: list[str] = []
        self._files: dict[str, list[Path]] = {}
        for file in sorted(folder.glob("*.json"), key=lambda file: file.stem):
            if (kind := schema_kind(file)) is not None:
                self._files.setdefault(kind, []).append(file)

    def first(self, kind: str, read: Callable[[Path], T]) -> T | None:
        """The first by name that can be read; None where there is none."""
        files = self._files.get(kind, [])
        for position, file in enumerate(files):
            if (value := self._try(file, read)) is None:
                continue
            self.taken[kind] = file
            if others := [other.name for other in files[position + 1 :]]:
                self.left_out.append(f"{file.name} is the {kind} that is shown; left out: {', '.join(others)}.")
            return value
        return None

    def bundles(self) -> dict[str, Manifest]:
        """By the name of their folder, "." for this one."""
        found = {}
        for file in (*self.folder.glob(manifests.FILE), *sorted(self.folder.glob(f"*/{manifests.FILE}"))):
            manifest = self._try(file, lambda file: manifests.read_manifest(file.parent))
            if manifest is not None:
                found["." if file.parent == self.folder else file.parent.name] = manifest
        return found

    def _try(self, file: Path, read: Callable[[Path], T]) -> T | None:
        try:
            return read(file)
        except ArtifactError as error:
            name = file.relative_to(self.folder).as_posix()
            self.left_out.append(f"{name} was left out: {error.message.replace(str(file), 'it')}.")
            return None


@dataclass(frozen=True)
class _Subject:
    """The model that a file is of, as far as the file says: `told` is for people."""

    told: str
    fingerprint: str

    @classmethod
    def of(cls, model: ModelIdentity) -> _Subject:
        return cls(f"{model.name} ({model.num_layers} layers)", model.fingerprint)


def _subject(result: artifacts.Document, *, place: str) -> _Subject | None:
    """None of results that older versions wrote: they hold no more than the name of a folder. Raises ArtifactError."""
    model = result.get("model")
    if isinstance(model, dict):
        return _Subject.of(ModelIdentity.from_document(model, place=place))
    fingerprint = result.get("model_fingerprint")
    return None if fingerprint is None else _Subject(str(model), str(fingerprint))


def _check_one_model(folder: Path, models: dict[str, _Subject]) -> None:
    """One page is of one model. Raises ArtifactError."""
    first = next(iter(models), "")
    for what, other in models.items():
        if other.fingerprint != models[first].fingerprint:
            raise ArtifactError(
                f"{folder} holds results of two models: the {first} is of {models[first].told}, the {what} of {other.told}",
                hint="give each model a folder of its own",
            )


_READABLE = {profiles.KIND, SCHEDULE_KIND, *_RESULTS}
