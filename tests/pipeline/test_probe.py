"""Probes of the demo model: curves and verdicts, resuming, items of every kind, and the schedule that they lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune import artifacts
from voidprune.errors import ArtifactError, BudgetError, DatasetError, ModelError
from voidprune.journal import Journal
from voidprune.pipeline.adaptive import Subject, open_subject
from voidprune.pipeline.probe import ProbeSettings, _Items, is_answered, probe_model, read_harmless_depths
from voidprune.pipeline.progress import untracked
from voidprune.pipeline.tasks import find_rows, task_rows
from voidprune.planning.planner import probed_schedule
from voidprune.profiling.calibration import Row
from voidprune.profiling.probing import Intervention, Scope
from voidprune.schedule import LayerAction, ModelIdentity, full_schedule

SMALL = ProbeSettings(
    interventions=(Intervention.FREEZE, Intervention.SKIP_ATTENTION), depths=(2, 8, 11), margin=0.5, max_new_tokens=32
)


@pytest.fixture(scope="module")
def demo() -> Subject:
    return open_subject("demo", device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return task_rows("yes-no", num_items=6)


@pytest.fixture(scope="module")
def document(demo: Subject, rows: list[Row]) -> artifacts.Document:
    return probe_model(demo, rows, dataset="yes-no", settings=SMALL)


def test_what_is_found_on_the_demo(document: artifacts.Document) -> None:
    """Low down the model needs its attention; at the last layer a frozen prompt is the prompt."""
    freeze, skip = document["results"]
    assert document["whole"]["yes-no"]["accuracy"] == 1
    assert [point["depth"] for point in freeze["points"]] == [2, 8, 11]
    low, _, top = (point["tasks"]["yes-no"] for point in skip["points"])
    assert low["accuracy"]["value"] < 0.5
    assert not low["holds"]
    assert not low["unharmed"]
    assert top["loss"] == 0
    assert freeze["points"][-1]["tasks"]["yes-no"]["accuracy"]["value"] == 1
    assert freeze["harmless_from"] is not None
    assert skip["harmless_from"] == 8


def test_too_few_items_show_nothing(demo: Subject, rows: list[Row]) -> None:
    settings = ProbeSettings(interventions=(Intervention.FREEZE,), depths=(11,), max_new_tokens=32)
    found = probe_model(demo, rows, dataset="yes-no", settings=settings)
    assert found["whole"]["yes-no"]["num_items_needed"] == 163
    assert found["results"][0]["harmless_from"] is None
    assert found["results"][0]["unharmed_from"] == 11


def test_reproduction_decides_as_generation_does(demo: Subject, rows: list[Row]) -> None:
    """The quick way, against answering every item."""
    items = _Items(demo, demo.encode(rows, max_new_tokens=32), SMALL, Journal(), untracked)
    quick = items.measure(Intervention.FREEZE, Scope.PROMPT, 4)
    items.samples = [type(one)(one.prompt, (1,), one.answer, one.group, one.place) for one in items.samples]
    assert items.measure(Intervention.FREEZE, Scope.PROMPT, 4).right == quick.right
    assert sum(quick.right) > 0


def test_a_killed_run_goes_on_and_writes_the_same(
    demo: Subject, rows: list[Row], document: artifacts.Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measured = tmp_path / "probe.json", []
    measure = _Items.measure

    def stop_at_the_fourth(self: Any, *arguments: Any) -> Any:
        measured.append(arguments)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(_Items, "measure", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        probe_model(demo, rows, dataset="yes-no", settings=SMALL, output=output)
    assert (tmp_path / "probe.json.partial").exists()
    assert not output.exists()
    assert probe_model(demo, rows, dataset="yes-no", settings=SMALL, output=output) == document
    assert len(measured) == 1 + 6 + 1  # the whole model, two curves of three, and the one that was stopped
    assert output.read_bytes() == artifacts.canonical_bytes(document)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]


def test_curves_are_added_to_a_run_that_was_killed_and_scopes_are_not_doubled() -> None:
    settings = ProbeSettings(scopes=tuple(Scope))
    assert len(settings.curves) == 3 * 2 + 2
    assert (Intervention.SWITCH, Scope.PUBLISHED) not in settings.curves


def test_every_kind_of_item(demo: Subject) -> None:
    prompt = ({"role": "user", "content": "Sort from smallest to largest: 91, 97, 73"},)
    other = ({"role": "user", "content": "Sort from smallest to largest: 15, 12, 33"},)
    rows = [
        Row("one", prompt, choices=("73, 91, 97", "1, 2, 3"), answer="73, 91, 97", group="choice"),
        Row("two", other, choices=("9, 8, 7", "12, 15, 33"), answer="12, 15, 33", group="choice"),
        Row("three", prompt, response="73, 91, 97", group="given"),
        Row("four", prompt, group="own"),
        Row("five", text="Ann likes tea. Ben likes rice. Carl likes soup.", group="text"),
    ]
    settings = ProbeSettings(
        interventions=(Intervention.RANDOM, Intervention.SWITCH), depths=(0, 11), max_new_tokens=16
    )
    found = probe_model(demo, rows, dataset="mixed", settings=settings)
    assert {task: whole["perplexity"] is None for task, whole in found["whole"].items()} == {
        "choice": True,
        "given": False,
        "own": False,
        "text": False,
    }
    low = found["results"][0]["points"][0]["tasks"]
    assert low["own"]["perplexity_ratio"]["value"] > 1.5
    assert not low["own"]["holds"]
    switched = found["results"][1]["points"][0]["tasks"]["choice"]
    assert 0 <= switched["switched"] <= 1


def test_a_task_of_two_kinds_is_refused(demo: Subject) -> None:
    prompt = ({"role": "user", "content": "Sort from smallest to largest: 91, 97, 73"},)
    rows = [Row("one", prompt, response="73"), Row("two", prompt, answer="73, 91, 97")]
    with pytest.raises(DatasetError, match="of two kinds"):
        probe_model(demo, rows, dataset="mixed", settings=SMALL)


def test_a_model_that_knows_nothing_has_nothing_to_lose(demo: Subject) -> None:
    with pytest.raises(DatasetError, match="the whole model gets no item of capitals right"):
        probe_model(demo, find_rows("capitals", num_items=3), dataset="capitals", settings=SMALL)


def test_depths_are_layers(demo: Subject, rows: list[Row]) -> None:
    with pytest.raises(ModelError, match="has no layer 12"):
        probe_model(demo, rows, dataset="yes-no", settings=ProbeSettings(depths=(12,)))


def test_capitals_are_named_in_the_first_line() -> None:
    assert is_answered(" Paris. It lies on the Seine.", "Paris", group="capitals")
    assert is_answered("the city of Reykjavík", "Reykjavik", group="capitals")
    assert not is_answered("Lyon.\nParis", "Paris", group="capitals")
    assert not is_answered("Limassol", "Lima", group="capitals")
    assert not is_answered("", "Lima", group="capitals")
    assert is_answered("so\nAnswer: yes", "yes", group="other")
    assert not is_answered("yes, I think", "yes", group="other")


def test_the_capitals_are_a_list_of_one_prompt_each() -> None:
    rows = find_rows("capitals")
    assert len(rows) >= 60
    assert len({row.messages[0]["content"] for row in rows}) == len({row.answer for row in rows}) == len(rows)
    assert all(row.messages[0]["content"].startswith("The capital of ") for row in rows)
    answers = {row.messages[0]["content"]: row.answer for row in rows}
    assert answers["The capital of Australia is"] == "Canberra"
    assert answers["The capital of Turkey is"] == "Ankara"
    assert len(find_rows("capitals", num_items=5)) == 5


def test_harmless_depths_are_read_back(document: artifacts.Document, tmp_path: Path) -> None:
    path = tmp_path / "probe.json"
    artifacts.write_file(path, artifacts.canonical_bytes(document))
    found = read_harmless_depths(path)
    assert (found.freeze, found.skip_attention) == (document["results"][0]["harmless_from"], 8)
    for broken in ({**document, "results": [{}]}, {**document, "settings": {}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ArtifactError, match="not a whole probe"):
            read_harmless_depths(path)
    document = json.loads(json.dumps(document))
    document["results"][0]["harmless_from"] = 12
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="12 is no layer"):
        read_harmless_depths(path)


@given(freeze=st.none() | st.integers(0, 7), skip_attention=st.none() | st.integers(0, 7), num_layers=st.integers(8, 9))
def test_a_probe_becomes_a_schedule(freeze: int | None, skip_attention: int | None, num_layers: int) -> None:
    full = full_schedule(ModelIdentity("tiny", "llama", num_layers, "sha256:abc"))
    if freeze is None and skip_attention is None:
        with pytest.raises(BudgetError, match="neither intervention"):
            probed_schedule(full, freeze=None, skip_attention=None)
        return
    schedule = probed_schedule(full, freeze=freeze, skip_attention=skip_attention)
    for layer, (prefill, decode) in enumerate(zip(schedule.prefill, schedule.decode, strict=True)):
        is_frozen = freeze is not None and layer >= max(1, freeze)
        is_silent = skip_attention is not None and layer >= skip_attention
        assert decode is (LayerAction.SKIP_ATTENTION if is_silent else LayerAction.FULL)
        assert prefill.executes != is_frozen
        assert prefill.writes_kv != is_silent
