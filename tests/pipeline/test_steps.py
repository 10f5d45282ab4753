"""Steps are done once, again when what they depend on has changed, and a job that stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from voidprune.errors import ArtifactError, OutputError, RecipeError
from voidprune.pipeline.steps import FILE, Step, preview_steps, run_steps


class Job:
    """Three steps that write what they read, one line longer: a -> b -> c, and d of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, list[str]()

    def writing(self, name: str, text: str, *inputs: str) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            read = "".join((self.folder / one).read_text() for one in inputs)
            (self.folder / name).write_text(read + text)

        return run

    def steps(self, *, a: Any = 1, c: Any = 1) -> list[Step]:
        return [
            Step("first", "a", {"value": a}, (), self.writing("a", f"a{a}\n")),
            Step("second", "b", {}, ("a",), self.writing("b", "b\n", "a")),
            Step("third", "c", {"value": c}, ("b",), self.writing("c", f"c{c}\n", "b")),
            Step("apart", "d", {}, (), self.writing("d", "d\n")),
        ]

    def do(self, *, rerun: tuple[str, ...] = (), **settings: Any) -> list[str]:
        """The outputs that were written, which the preview has to have said."""
        self.ran.clear()
        steps = self.steps(**settings)
        previewed = [state.output for state in preview_steps(steps, self.folder, rerun=rerun) if state.must_run]
        states = list(run_steps(steps, self.folder, rerun=rerun))
        assert [state.output for state in states if state.must_run] == self.ran
        assert set(self.ran) <= set(previewed), "what the preview leaves out is not run"
        assert [state.seconds is None for state in states] == [not state.must_run for state in states]
        return list(self.ran)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


def test_each_step_is_done_once(job: Job) -> None:
    assert job.do() == ["a", "b", "c", "d"]
    assert (job.folder / "c").read_text() == "a1\nb\nc1\n"
    assert job.do() == []


def test_a_new_setting_runs_its_step_and_what_reads_it(job: Job) -> None:
    job.do()
    assert job.do(c=2) == ["c"]
    assert job.do(a=2, c=2) == ["a", "b", "c"]
    assert (job.folder / "c").read_text() == "a2\nb\nc2\n"
    assert job.do(a=2, c=2) == []


def test_a_step_that_writes_the_same_again_changes_nothing_behind_it(job: Job) -> None:
    job.do()
    assert job.do(rerun=("first",)) == ["a"]
    previewed = preview_steps(job.steps(), job.folder, rerun=("first",))
    assert [state.reason for state in previewed] == [
        "asked for",
        "a will be new",
        "b will be new",
        "nothing has changed",
    ]


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_text("edited")])
def test_a_result_that_was_changed_or_removed_is_made_anew(job: Job, spoil: Callable[[Path], None]) -> None:
    job.do()
    spoil(job.folder / "b")
    assert job.do() == ["b"]
    assert (job.folder / "b").read_text() == "a1\nb\n"


def test_a_job_that_stopped_goes_on_where_it_was(job: Job) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    steps = job.steps()
    broken = [*steps[:2], replace(steps[2], run=fail), steps[3]]
    with pytest.raises(KeyboardInterrupt):
        list(run_steps(broken, job.folder))
    assert job.do() == ["c", "d"]


def test_a_step_that_failed_is_not_taken_for_done(job: Job) -> None:
    """Not even where its old result still lies there."""
    job.do()

    def fail() -> None:
        raise ArtifactError("no")

    steps = job.steps(c=2)
    with pytest.raises(ArtifactError):
        list(run_steps([*steps[:2], replace(steps[2], run=fail)], job.folder))
    assert job.do() == ["c"]


def test_a_folder_of_something_else_is_left_alone(job: Job) -> None:
    job.folder.mkdir()
    (job.folder / "diary").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        job.do()
    assert [path.name for path in job.folder.iterdir()] == ["diary"]


def test_a_step_that_does_not_exist_is_named(job: Job) -> None:
    with pytest.raises(RecipeError, match="there is no step 'fourth'") as caught:
        list(run_steps(job.steps(), job.folder, rerun=("fourth",)))
    assert caught.value.hint == "steps here: first, second, third, apart"
    assert not job.folder.exists()


@pytest.mark.parametrize("steps", [[], {"first": 1}, {"first": {"from": "x"}}])
def test_a_broken_record_is_named(job: Job, steps: Any) -> None:
    job.do()
    document = json.loads((job.folder / FILE).read_text())
    (job.folder / FILE).write_text(json.dumps({**document, "steps": steps}))
    with pytest.raises(ArtifactError, match="is broken"):
        job.do()
