"""Where it comes from, how to make it again, and what would add what is missing."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.report.documents import fill_folder
from voidprune.cli import main
from voidprune.report.commands import benchmark_command, evaluation_command
from voidprune.report.findings import Findings, collect_findings
from voidprune.report.provenance import list_commands, list_missing, list_provenance
from voidprune.report.record import RunRecord
from voidprune.schedule import Schedule, dropped_schedule, read_schedule


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    fill_folder(tmp_path)
    return collect_findings(tmp_path)


def test_model_data_seeds_versions_and_machine_are_listed(findings: Findings) -> None:
    facts = dict(list_provenance(findings))
    assert facts["model"] == "tiny, llama, 2 layers"
    assert facts["model fingerprint"] == "sha256:abc"
    assert facts["calibration data"] == "sha256:default1"
    assert facts["probe, seed"] == "3"
    assert facts["probe, samples"] == "sha256:probed"
    assert facts["evaluation, data"] == "<demo>"
    assert facts["benchmark, machine"].startswith("a machine")
    assert facts["benchmark, runtime"] == "onnxruntime 1"
    assert "benchmark, threads" not in facts


def test_commands_are_those_of_the_command_line(findings: Findings) -> None:
    """Every command and option exists."""
    commands, about = list_commands(findings)
    assert "DATASET" in about
    for command in (*commands, *(command for _, command in list_missing(Findings(*[None] * 6)))):
        program, name, *arguments = shlex.split(command)
        assert program == "voidprune"
        known = CliRunner().invoke(main, [name, "--help"]).stdout
        for argument in arguments:
            if argument.startswith("-"):
                assert argument in known, f"{name} knows no {argument}"
    plan = next(command for command in commands if " plan " in command)
    assert "--criterion lac" in plan
    assert "--keep-prefill 0.5 --keep-decode 1.0" in plan
    probe = next(command for command in commands if " probe " in command)
    assert (
        "--intervention freeze --intervention random --intervention skip-attention --scope prompt --scope pub" in probe
    )
    bench = next(command for command in commands if " bench " in command)
    assert (
        "--prompt-lengths 128 --context-lengths 128 --batch-sizes 1 --new-tokens 32 --rounds 15 --provider cpu --seed 0"
        in bench
    )


def test_what_was_written_down_comes_before_what_is_put_together(findings: Findings) -> None:
    commands, about = list_commands(replace(findings, record=RunRecord("voidprune run r.yaml -o DIR", "model: demo")))
    assert commands == ["voidprune run r.yaml -o DIR", "voidprune report DIR -o report.html"]
    assert "recipe" in about


def test_only_what_is_missing_is_missing(findings: Findings) -> None:
    assert [what for what, _ in list_missing(findings)] == ["an export"]
    without = replace(findings, probe=None, comparison=None)
    assert [command.split()[1] for _, command in list_missing(without)] == ["export", "compare", "probe"]


def planned_again(findings: Findings, schedule: Schedule, tmp_path: Path) -> Schedule:
    """What the command that plans makes, with the folder and the model in their places."""
    command = next(one for one in list_commands(replace(findings, schedule=schedule))[0] if " plan " in one)
    target = tmp_path / "again.json"
    arguments = shlex.split(command.replace("DIR/schedule.json", str(target)).replace("DIR", str(tmp_path)))
    result = CliRunner().invoke(main, arguments[1:])
    assert result.exit_code == 0, result.output
    return read_schedule(target)


@pytest.mark.parametrize("dropped", [(), (0,)])
def test_a_schedule_of_named_layers_is_planned_again(
    findings: Findings, tmp_path: Path, dropped: tuple[int, ...]
) -> None:
    assert findings.schedule is not None
    made = dropped_schedule(findings.schedule.model, dropped)
    assert planned_again(findings, made, tmp_path).union == made.union


def test_a_schedule_that_no_option_makes_has_no_command(findings: Findings) -> None:
    assert findings.schedule is not None
    written = replace(findings.schedule, origin={})
    assert not any(" plan " in one for one in list_commands(replace(findings, schedule=written))[0])


@pytest.mark.parametrize(
    "origin",
    [
        {"criterion": "search-loss", "goal": "fast-prompt", "max_loss": 0.01},
        {"criterion": "search-loss", "keep_decode": 1.0, "keep_prefill": 0.5, "phases": "split"},
    ],
)
def test_a_search_runs_the_model_on_data(findings: Findings, origin: dict[str, str | float]) -> None:
    assert findings.schedule is not None
    commands, _ = list_commands(replace(findings, schedule=replace(findings.schedule, origin=origin)))
    plan = shlex.split(next(command for command in commands if " plan " in command))
    assert plan[2] == "tiny"
    assert "--dataset" in plan
    assert ("--criterion" in plan) is ("goal" not in origin), "a goal takes no criterion"


def test_names_are_quoted_for_a_shell(findings: Findings) -> None:
    assert findings.schedule is not None
    name = "a model; rm x"
    model = replace(findings.schedule.model, name=name)
    hostile = replace(findings, schedule=replace(findings.schedule, model=model), bundle="my slim")
    told = [*list_commands(hostile)[0], benchmark_command(hostile), evaluation_command(hostile)]
    assert any(name in command for command in told)
    for command in told:
        assert not {"a", "model;", "my", "slim"} & set(shlex.split(command))


@pytest.mark.parametrize("kind", ["comparison", "probe"])
def test_a_comparison_or_probe_names_the_model(findings: Findings, kind: str) -> None:
    document = {**(findings.probe or {}), "model": {"name": "small"}}
    if kind == "comparison":
        document = {**(findings.comparison or {}), "model": {"name": "small"}}
    alone = replace(Findings(*[None] * 6), **{kind: document})
    assert list_missing(alone)[0][1] == "voidprune profile small -o DIR/profile.json"
