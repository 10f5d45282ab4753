"""Where it comes from, how to make it again, and what would add what is missing."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.command_lines import parse_command
from tests.execution.test_manifest import HEALING, MANIFEST
from tests.report.documents import fill_folder
from voidprune.cli import main
from voidprune.healing.losses import DistillLoss
from voidprune.healing.settings import DistillSettings, Parameters
from voidprune.report.commands import benchmark_command, evaluation_command, heal_command, probe_command
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
        "--tasks capitals --num-samples 20 --intervention freeze --intervention random --intervention skip-attention "
        "--scope prompt --scope published --margin 0.01 --max-new-tokens 12 --batch-size 64 --dtype fp32 --seed 3"
        in probe
    )
    profile = next(command for command in commands if " profile " in command)
    assert profile.endswith("--dataset DATASET --responses dataset --alpha 0.8 --lac-arithmetic float32")
    bench = next(command for command in commands if " bench " in command)
    assert (
        "--prompt-lengths 128 --context-lengths 128 --batch-sizes 1 --new-tokens 32 --rounds 15 --provider cpu --seed 0"
        in bench
    )


def parsed(command: str) -> dict[str, Any]:
    """The values that the command line sees."""
    _, name, *arguments = shlex.split(command)
    return parse_command(name, arguments, resilient_parsing=True).params


def test_a_profile_says_what_it_was_asked_for(tmp_path: Path) -> None:
    options = ["--num-samples", "3", "--max-length", "90", "--lac-arithmetic", "model", "--alpha", "0.5"]
    options += ["--max-new-tokens", "4", "--dtype", "fp32"]
    made = CliRunner().invoke(main, ["profile", "demo", "-o", str(tmp_path / "profile.json"), *options])
    assert made.exit_code == 0, made.output
    command = list_commands(collect_findings(tmp_path))[0][0]
    assert "DATASET" not in command, "the prompts that ship with it need no name"
    again = CliRunner().invoke(main, shlex.split(command.replace("DIR/", f"{tmp_path}/again-"))[1:])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again-profile.json").read_bytes() == (tmp_path / "profile.json").read_bytes()


def test_a_probe_of_some_depths_of_the_demo_is_told_as_such(findings: Findings) -> None:
    assert findings.probe is not None
    results = [{**result, "points": result["points"][1:]} for result in findings.probe["results"]]
    whole = dict.fromkeys(("yes-no", "sorting"), findings.probe["whole"]["capitals"])
    told = parsed(probe_command({**findings.probe, "dataset": "demo", "whole": whole, "results": results}, "demo"))
    assert (told["tasks"], told["num_samples"], told["depths"]) == ("demo", 20, frozenset({1}))
    file = parsed(probe_command({**findings.probe, "dataset": "mine.jsonl", "whole": whole}, "demo"))
    assert (file["tasks"], file["num_samples"], file["depths"]) == ("TASKS", 40, None)


def test_a_healing_is_told_with_its_data_and_its_training(findings: Findings) -> None:
    assert findings.schedule is not None
    origin = {"dataset": "demo", "num_samples": 12, "responses": "dataset", "max_new_tokens": 9, "dtype": "fp32"}
    training = DistillSettings(
        parameters=Parameters.FULL, embeddings=True, steps=7, max_minutes=0.5, evaluate_every=3, batch_size=5,
        learning_rate=1e-4, loss=DistillLoss(temperature=2.0, top_k=8), precision="bf16", checkpointing=True, seed=11,
    )  # fmt: skip
    healing = replace(
        HEALING,
        methods=("linear", "distill"),
        settings={"linear": {}, "distill": json.loads(json.dumps(training.to_document()))},
        origin={**origin, "max_length": 100},
    )
    told = parsed(heal_command(healing, findings.schedule, "demo"))
    assert {name: told[name] for name in origin} == origin
    assert (told["schedule_file"], told["methods"]) == (Path("DIR/schedule.json"), ("linear", "distill"))
    assert {name: told[name] for name in ("max_length", "temperature", "top_k", "heal_batch_size")} == {
        "max_length": 100, "temperature": 2.0, "top_k": 8, "heal_batch_size": 5,
    }  # fmt: skip
    for name in ("parameters", "embeddings", "steps", "max_minutes", "evaluate_every", "learning_rate"):
        assert told[name] == getattr(training, name)
    assert (told["precision"], told["checkpointing"], told["seed"]) == ("bf16", True, 11)


def test_rounds_of_healing_plan_for_themselves(findings: Findings) -> None:
    assert findings.schedule is not None
    origin = {"criterion": "search-loss", "keep_prefill": 0.5, "keep_decode": 0.75, "protected": "0", "phases": "split"}
    schedule = replace(findings.schedule, origin=origin)
    healing = replace(HEALING, origin={"rounds": 3, "dataset": "default"})
    told = parsed(heal_command(healing, schedule, "demo"))
    assert (told["schedule_file"], told["dataset"]) == (None, None)
    assert (told["num_rounds"], told["keep_prefill"], told["keep_decode"]) == (3, 0.5, 0.75)
    assert (told["protect"], told["phases"]) == (frozenset({0}), "split")
    manifest = replace(MANIFEST, healing=healing)
    commands, _ = list_commands(replace(findings, schedule=schedule, manifest=manifest))
    assert [command.split()[1] for command in commands][:3] == ["profile", "heal", "export"]


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


def test_an_evaluation_is_told_with_its_items(findings: Findings) -> None:
    """Of tasks that ship with the package as many of each, of a file the first ones."""
    assert findings.evaluation is not None
    whole, judged = findings.evaluation["runners"]
    tasks = dict.fromkeys(("sorting", "yes-no"), judged["accuracy"]["sorting"])
    evaluation = {**findings.evaluation, "num_items": 4, "runners": [whole, {**judged, "accuracy": tasks}]}
    for dataset, named, count in (("demo", "demo", 2), ("mine.jsonl", "TASKS", 4)):
        commands, _ = list_commands(replace(findings, evaluation={**evaluation, "dataset": dataset}))
        told = parsed(next(command for command in commands if " eval " in command))
        assert (told["tasks"], told["num_samples"]) == (named, count)


def test_what_was_healed_and_not_exported_is_only_healed(findings: Findings) -> None:
    healed = replace(MANIFEST, healing=HEALING, graphs={})
    commands, _ = list_commands(replace(findings, manifest=healed, bundle="better"))
    assert not any(" export " in command for command in commands)
    heal = next(command for command in commands if " heal " in command)
    assert "-o DIR/better " in heal
    exported, _ = list_commands(replace(findings, manifest=replace(healed, graphs=MANIFEST.graphs), bundle="slim"))
    assert any(command.startswith("voidprune export DIR/healed -o DIR/slim") for command in exported)
