"""The recipe of an experiment is run: what it asks for, in order, without doing again what is there already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voidprune import artifacts
from voidprune.errors import ArtifactError, OutputError
from voidprune.pipeline.adaptive import KIND, AdaptiveSettings, Mode, Subject, evaluate_adaptively, open_subject
from voidprune.pipeline.probe import KIND as PROBE_KIND
from voidprune.pipeline.probe import ProbeSettings, probe_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.tasks import find_rows
from voidprune.profiling.calibration import Row, fingerprint_samples, read_rows
from voidprune.profiling.layouts import (
    LAYOUTS,
    Question,
    fetch_questions,
    find_label,
    find_text_rows,
    option_labels,
    question_rows,
    read_questions,
)
from voidprune.profiling.probing import Intervention, Scope
from voidprune.recipe import AdaptiveRecipe, DataSource, ExperimentRecipe, ProbeRecipe, ProbeSource, Setup

MARKER = "recipe.json"


@dataclass(frozen=True)
class Finished:
    """A document of a recipe, where it is, and whether it was there before."""

    file: Path
    document: artifacts.Document
    was_there: bool


def run_recipe(
    recipe: ExperimentRecipe, folder: Path, *, overwrite: bool = False, track: Track = untracked
) -> Iterator[Finished]:
    """Run every data set under every set-up; each result is written to `folder` as soon as it is there.

    Beside them lies the recipe as it was run. The same recipe in the same folder goes on where it was stopped: a document of the
    same items of the same model is kept. Raises OutputError where the folder holds anything else and `overwrite` is not given.
    """
    prepare_folder(recipe, folder, overwrite=overwrite)
    if isinstance(recipe, ProbeRecipe):
        yield from _run_probes(recipe, folder, track)
        return
    questions = {name: find_questions(source, limit=recipe.limit) for name, source in recipe.datasets.items()}
    subject = open_subject(recipe.model, dtype=recipe.dtype)
    for name, source in recipe.datasets.items():
        for setup_name, setup in recipe.setups.items():
            file = folder / f"{name}-{setup_name}.json"
            yield _run_one(
                recipe, subject, source, setup, questions[name], file, name=f"{name}, {setup_name}", track=track
            )


def _run_probes(recipe: ProbeRecipe, folder: Path, track: Track) -> Iterator[Finished]:
    rows = {name: find_probe_rows(source, limit=recipe.limit) for name, source in recipe.datasets.items()}
    subject = open_subject(recipe.model, dtype=recipe.dtype)
    for name, source in recipe.datasets.items():
        file = folder / f"{name}.json"
        if file.is_file():
            document = artifacts.read_document(file, kind=PROBE_KIND, version=1)
            samples = fingerprint_samples(subject.encode(rows[name], max_new_tokens=source.max_new_tokens))
            same = (subject.checkpoint.identity.to_document(), samples)
            if same == (document.get("model"), document.get("samples")):
                yield Finished(file, document, was_there=True)
                continue
        settings = ProbeSettings(
            interventions=tuple(map(Intervention, recipe.interventions)),
            scopes=tuple(map(Scope, recipe.scopes)),
            margin=recipe.margin,
            max_new_tokens=source.max_new_tokens,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        document = probe_model(
            subject, rows[name], dataset=name, settings=settings, output=file, overwrite=file.exists(), track=track
        )
        yield Finished(file, document, was_there=False)


def find_probe_rows(data: ProbeSource, *, limit: int | None) -> list[Row]:
    """Raises DatasetError."""
    if data.task is not None:
        return find_rows(data.task, num_items=limit)
    assert data.source is not None
    if data.layout == "rows":
        assert isinstance(data.source, Path)
        return read_rows(data.source)[:limit]
    return find_text_rows(data.source, data.layout, limit=limit)


def prepare_folder(recipe: ExperimentRecipe, folder: Path, *, overwrite: bool) -> None:
    """Claim a folder for a recipe, or find that it is claimed by the same. With `overwrite` the results of another one go."""
    marker, content = folder / MARKER, artifacts.canonical_bytes(recipe.to_document())
    if marker.is_file() and marker.read_bytes() == content:
        return
    if marker.is_file() and not overwrite:
        raise OutputError(
            f"{folder} holds the results of another recipe", hint="choose another --output, or add --overwrite"
        )
    artifacts.check_output_folder(folder, overwrite=overwrite, marker=MARKER)
    for file in folder.glob("*.json"):
        for kind in (KIND, PROBE_KIND):
            with contextlib.suppress(ArtifactError, FileNotFoundError):  # not ours to remove, or removed
                artifacts.read_document(file, kind=kind, version=1)
                file.unlink()
    artifacts.write_file(marker, content, overwrite=overwrite)


def find_questions(data: DataSource, *, limit: int | None) -> list[Question]:
    """Raises DatasetError."""
    layout = LAYOUTS[data.layout]
    if isinstance(data.source, Path):
        return read_questions(data.source, layout, limit=limit)
    return fetch_questions(data.source, layout, limit=limit)


def _run_one(
    recipe: AdaptiveRecipe,
    subject: Subject,
    source: DataSource,
    setup: Setup,
    questions: list[Question],
    file: Path,
    *,
    name: str,
    track: Track,
) -> Finished:
    layout = LAYOUTS[source.layout]
    rows = question_rows(
        questions,
        layout,
        group=name.partition(",")[0],
        scored=setup.scoring == "log-likelihood",
        shuffle_seed=recipe.seed if setup.options == "shuffled" else None,
    )
    if (document := _finished_document(file, subject, rows, recipe)) is not None:
        return Finished(file, document, was_there=True)
    labels = option_labels(layout, max(len(question.options) for question in questions))
    document = evaluate_adaptively(
        subject,
        rows,
        dataset=name,
        settings=AdaptiveSettings(
            modes=tuple(map(Mode, recipe.modes)),
            alphas=recipe.alphas,
            arithmetic=setup.arithmetic,
            static=setup.static,
            sampling=setup.sampling,
            max_new_tokens=recipe.max_new_tokens,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        ),
        find_answer=lambda response: find_label(response, labels),
        track=track,
    )
    artifacts.write_file(file, artifacts.canonical_bytes(document), overwrite=True)
    return Finished(file, document, was_there=False)


def _finished_document(
    file: Path, subject: Subject, rows: list[Row], recipe: AdaptiveRecipe
) -> artifacts.Document | None:
    """The document of these items and this model, where it lies there; the folder's recipe is the same already."""
    if not file.is_file():
        return None
    document = artifacts.read_document(file, kind=KIND, version=1)
    samples = subject.encode(rows, max_new_tokens=recipe.max_new_tokens)
    same = (fingerprint_samples(samples), subject.checkpoint.identity.fingerprint)
    return document if same == (document.get("samples"), document.get("model_fingerprint")) else None
