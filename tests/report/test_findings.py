"""What is found in a folder, and how a file is described on the terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.execution.test_manifest import MANIFEST
from tests.profiling.test_profile import make_profile
from tests.test_plots import make_comparison
from voidprune import artifacts
from voidprune.errors import ArtifactError
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.intervals import schedule_cuts
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.profile import read_profile, write_profile
from voidprune.report.caveats import find_caveats
from voidprune.report.findings import collect_findings, describe
from voidprune.schedule import full_schedule, write_schedule
from voidprune.tables import cuts_table


def evaluation() -> artifacts.Document:
    def runner(name: str, share: float) -> artifacts.Document:
        accuracy = {"num_right": 1, "num_items": 2, "share": share, "interval": [0.1, 0.9]}
        value = {"value": 0.25, "interval": [0.125, 0.5]}
        against = {
            "perplexity_ratio": value,
            "accuracy": {
                "sorting": {
                    "difference": -0.25,
                    "interval": [-0.75, 0.375],
                    "num_only_whole": 1,
                    "num_only_this": 0,
                    "num_items": 2,
                    "p_value": 0.625,
                }
            },
            "overall": None,
            "agreement": {"top1": value, "kl": value, "num_tokens": 9},
        }
        return {
            "name": name,
            "perplexity": 2.5,
            "perplexity_interval": [2.0, 3.0],
            "num_scored": 9,
            "accuracy": {"sorting": {**accuracy, "normalized": None}},
            "generation": {"num_items": 2, "mean_length": value, "cut": value, "looping": value},
            "against_whole": None if name == "whole model" else against,
        }

    return {
        "schema": "voidprune.evaluation/2",
        "num_items": 2,
        "schedule_hash": "sha256:0",
        "intervals": {"confidence": 0.95, "num_resamples": 2000, "seed": 0},
        "model": "tiny",
        "model_fingerprint": "sha256:abc",
        "max_new_tokens": 64,
        "written_by": "voidprune",
        "dataset": "<demo>",
        "runners": [runner("whole model", 0.5), runner("onnx", 0.25)],
        "different_responses": 0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    profile = make_profile()
    write_profile(tmp_path / "profile.json", profile)
    budget = Budget(keep_prefill=0.5, keep_decode=1.0)
    write_schedule(tmp_path / "schedule.json", plan_schedule(profile.model, profile, criterion="lac", budget=budget))
    artifacts.write_file(tmp_path / "evaluation.json", artifacts.canonical_bytes(evaluation()))
    (tmp_path / "unrelated.json").write_text("[1, 2]")
    return tmp_path


@pytest.mark.parametrize("name", sorted(name for name in CRITERIA if CRITERIA[name].needs_profile))
def test_profile_and_cuts_fit_the_terminal(folder: Path, name: str) -> None:
    """With intervals where there are two blocks (prefill) and without (decode)."""
    document, shown = describe(folder / "profile.json")
    assert document["schema"] == "voidprune.profile/2"
    profile = read_profile(folder / "profile.json")
    schedule = plan_schedule(profile.model, profile, criterion=name, budget=Budget(keep_prefill=0.5, keep_decode=0.5))
    console = Console(width=80, record=True, file=io.StringIO())
    for table in (*shown, cuts_table(schedule_cuts(profile, schedule))):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"│ 0 │ ██████ 100\.0%± 0\.0 │ 0\.050±\.\d{3} │", text)
    assert re.search(r"│ 0 │ ███ +50\.0% +│ 0\.250 +│", text)
    assert "no intervals: fewer than two blocks of samples" in " ".join(text.split())
    assert "too few samples" in text
    assert re.search(r"\d+%: (a fact|likely|a coin toss)", text)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no results"):
        collect_findings(tmp_path)
    with pytest.raises(ArtifactError, match="not a folder"):
        collect_findings(tmp_path / "absent")


@pytest.mark.parametrize("asked", [True, False])
def test_a_comparison_is_described(tmp_path: Path, asked: bool) -> None:
    artifacts.write_file(tmp_path / "comparison.json", artifacts.canonical_bytes(make_comparison(asked=asked)))
    document, tables = describe(tmp_path / "comparison.json")
    assert document == make_comparison(asked=asked)
    assert len(tables) == 1


def test_a_comparison_of_another_format_or_with_holes_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"schema": "voidprune.comparison/1"}, "format"),
        ({"whole": {}}, "is not a whole comparison"),
    ):
        target = tmp_path / "comparison.json"
        target.write_bytes(artifacts.canonical_bytes({**make_comparison(), **changes}))
        with pytest.raises(ArtifactError, match=message):
            describe(target)


def test_of_several_bundles_the_one_with_graphs_is_shown(tmp_path: Path) -> None:
    """Healing leaves one without, which is exported again; whole models are there to be compared with."""
    whole = full_schedule(MANIFEST.schedule.model)
    bundles = {
        "healed": replace(MANIFEST, graphs={}),
        "pruned": MANIFEST,
        "whole": replace(MANIFEST, schedule=whole, kept_layers=whole.union, slots=whole.kv_layers),
    }
    for name, manifest in bundles.items():
        artifacts.write_file(tmp_path / name / "voidprune.json", artifacts.canonical_bytes(manifest.to_document()))
    findings = collect_findings(tmp_path)
    assert (findings.bundle, findings.manifest, findings.schedule) == ("pruned", MANIFEST, MANIFEST.schedule)
    assert [name for name, _ in findings.files] == ["pruned/voidprune.json"]
    alone = collect_findings(tmp_path / "healed")
    assert (alone.bundle, alone.manifest) == (".", bundles["healed"])
    assert [name for name, _ in alone.files] == ["voidprune.json"]


@pytest.mark.parametrize(
    "kind", ["comparison", "probe", "export", "evaluation", "harness", "benchmark", "adaptive-evaluation"]
)
def test_results_of_two_models_are_not_put_on_one_page(tmp_path: Path, kind: str) -> None:
    from tests.report.documents import fill_folder

    fill_folder(tmp_path)
    collect_findings(tmp_path)
    other = replace(full_schedule(MANIFEST.schedule.model).model, name="another", fingerprint="sha256:another")
    if kind == "export":
        manifest = replace(MANIFEST, schedule=replace(MANIFEST.schedule, model=other))
        artifacts.write_file(tmp_path / "slim" / "voidprune.json", artifacts.canonical_bytes(manifest.to_document()))
    else:
        file = tmp_path / f"{kind.removesuffix('-evaluation')}.json"
        document = json.loads(file.read_bytes())
        if kind in ("comparison", "probe"):
            document["model"] = other.to_document()
        else:
            document |= {"model": other.name, "model_fingerprint": other.fingerprint}
        artifacts.write_file(file, artifacts.canonical_bytes(document), overwrite=True)
    with pytest.raises(ArtifactError, match=f"two models: the schedule is of tiny .*, the {kind} of another"):
        collect_findings(tmp_path)


@pytest.mark.parametrize("kind", ["evaluation", "harness", "benchmark"])
def test_models_are_told_by_fingerprint_not_by_name(tmp_path: Path, kind: str) -> None:
    """A bundle has the name of its folder; and older files say no more than that."""
    from tests.report.documents import fill_folder

    fill_folder(tmp_path)
    file = tmp_path / f"{kind}.json"
    document = {**json.loads(file.read_bytes()), "model": "a folder"}
    artifacts.write_file(file, artifacts.canonical_bytes(document), overwrite=True)
    assert not any("which model" in caveat for caveat in find_caveats(collect_findings(tmp_path)))
    del document["model_fingerprint"]
    artifacts.write_file(file, artifacts.canonical_bytes(document), overwrite=True)
    caveats = [caveat for caveat in find_caveats(collect_findings(tmp_path)) if "which model" in caveat]
    what = "lm_eval run" if kind == "harness" else kind
    assert len(caveats) == 1
    assert caveats[0].startswith(f"The {what} does not say which model it is of")


@pytest.mark.parametrize("kind", ["profile", "schedule", "evaluation", "comparison", "benchmark", "probe", "harness"])
@pytest.mark.parametrize("schema", ["voidprune.{}/0", "voidprune.{}/99"])
def test_a_file_of_another_format_is_left_out_and_named(tmp_path: Path, kind: str, schema: str) -> None:
    from tests.report.documents import fill_folder

    fill_folder(tmp_path)
    whole = collect_findings(tmp_path)
    assert whole.left_out == ()
    file = tmp_path / f"{kind}.json"
    document = {**json.loads(file.read_bytes()), "schema": schema.format(kind)}
    artifacts.write_file(file, artifacts.canonical_bytes(document), overwrite=True)
    findings = collect_findings(tmp_path)
    assert getattr(findings, kind) is None
    assert findings == replace(
        whole,
        **{kind: None},
        files=tuple(one for one in whole.files if one[0] != file.name),
        left_out=findings.left_out,
    )
    assert len(findings.left_out) == 1
    assert findings.left_out[0].startswith(
        f"{kind}.json was left out: it has {kind} format {schema.rpartition('/')[2]};"
    )
    assert str(tmp_path) not in findings.left_out[0]


def test_of_several_files_of_a_kind_the_first_that_can_be_read_is_taken(folder: Path) -> None:
    named = evaluation()
    for name in ("evaluation-2", "b"):
        artifacts.write_file(folder / f"{name}.json", artifacts.canonical_bytes({**named, "dataset": name}))
    artifacts.write_file(folder / "a.json", b'{"schema": "voidprune.evaluation/2"}')
    findings = collect_findings(folder)
    assert findings.evaluation is not None
    assert findings.evaluation["dataset"] == "b"
    assert findings.left_out[0].startswith("a.json was left out: it is not a whole evaluation")
    assert findings.left_out[1:] == (
        "b.json is the evaluation that is shown; left out: evaluation.json, evaluation-2.json.",
    )


def test_a_bundle_of_another_format_is_left_out(folder: Path) -> None:
    document = {**MANIFEST.to_document(), "schema": "voidprune.bundle/99"}
    artifacts.write_file(folder / "old" / "voidprune.json", artifacts.canonical_bytes(document))
    findings = collect_findings(folder)
    assert (findings.manifest, findings.bundle) == (None, "")
    assert findings.left_out[0].startswith("old/voidprune.json was left out: it has bundle format 99")
