"""The command line as a user meets it: the happy path, every bad input, exit codes, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from voidprune import artifacts
from voidprune.cli import main
from voidprune.pipeline.models import demo_folder
from voidprune.pipeline.tasks import task_rows
from voidprune.schedule import full_schedule, write_schedule

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = (
    "profile",
    "probe",
    "plan",
    "compare",
    "heal",
    "export",
    "generate",
    "show",
    "diff",
    "families",
    "eval",
    "bench",
    "run",
    "report",
    "demo",
    "completion",
    "doctor",
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        main, [str(argument) for argument in arguments], catch_exceptions=False, prog_name="voidprune"
    )


def expect_error(*arguments: object, message: str, code: int = 1) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The happy path on the demo model: profile, plan, export."""
    folder = tmp_path_factory.mktemp("results")
    steps = [
        (
            "profile",
            "demo",
            "-o",
            folder / "profile.json",
            "--num-samples",
            6,
            "--max-new-tokens",
            8,
            "--device",
            "cpu",
        ),
        ("plan", folder / "profile.json", "-o", folder / "schedule.json", "--keep-prefill", 0.5, "--keep-decode", 0.8),
        ("export", "demo", "-o", folder / "slim", "--schedule", folder / "schedule.json", "--provider", "cpu"),
    ]
    for step in steps:
        result = invoke(*step)
        assert result.exit_code == 0, result.output
    return folder


def test_the_happy_path_leaves_what_it_says(results: Path) -> None:
    names = {path.name for path in (results / "slim").iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "decode.onnx",
        "genai_config.json",
        "generation_config.json",
        "model.safetensors",
        "prefill.onnx",
        "tokenizer.json",
        "voidprune.json",
    }
    assert sorted(path.name for path in results.iterdir() if path.suffix == ".json") == [
        "profile.json",
        "schedule.json",
    ]


def test_the_exported_folder_loads_in_stock_transformers_without_us(results: Path) -> None:
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, report = AutoModelForCausalLM.from_pretrained({str(results / 'slim')!r}, output_loading_info=True)\n"
        f"AutoTokenizer.from_pretrained({str(results / 'slim')!r})\n"
        "assert not report['missing_keys'] and not report['unexpected_keys'], report\n"
        "assert 'voidprune' not in sys.modules\n"
        "print(model.config.num_hidden_layers)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    manifest = json.loads((results / "slim" / "voidprune.json").read_bytes())
    assert int(finished.stdout) == len(manifest["kept_layers"])


def test_generate_streams_the_same_text_from_bundle_and_reference(results: Path) -> None:
    prompt = "Sort from smallest to largest: 91, 97, 73"
    bundle = invoke("generate", results / "slim", "--prompt", prompt, "--max-new-tokens", 12, "--provider", "cpu")
    torch = invoke(
        "generate", "demo", "--schedule", results / "schedule.json", "--prompt", prompt, "--max-new-tokens", 12
    )
    assert bundle.exit_code == torch.exit_code == 0
    assert bundle.stdout == torch.stdout


def test_eval_bench_and_report(results: Path, tmp_path: Path) -> None:
    evaluated = invoke(
        "eval", results / "slim", "--baseline", "demo", "--num-samples", 3, "--provider", "cpu",
        "-o", tmp_path / "evaluation.json", "--json",
    )  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    document = json.loads(evaluated.stdout)
    assert document == json.loads((tmp_path / "evaluation.json").read_bytes())
    assert [runner["name"] for runner in document["runners"]] == ["whole model", "reference", "onnx"]
    assert document["runners"][1]["accuracy"] == document["runners"][2]["accuracy"]
    assert document["num_items"] == 12
    assert document["schedule_hash"] == artifacts.file_hash(results / "schedule.json")
    schedule = json.loads((results / "schedule.json").read_bytes())
    assert document["model_fingerprint"] == schedule["model"]["fingerprint"], "of the whole model, not of the bundle"
    assert document["runners"][0]["against_whole"] is None
    assert document["runners"][2]["against_whole"]["agreement"]["top1"]["value"] < 1
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "evaluation.json")], env={"COLUMNS": "80"})
    assert "onnx against the whole model" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout
    timed = invoke(
        "bench", results / "slim", "--baseline", "demo", "--prompt-lengths", "6,9", "--new-tokens", 2, "--rounds", 2,
        "--max-spread", 1e9, "--provider", "cpu", "-o", tmp_path / "benchmark.json", "--plot", tmp_path / "bench.png",
    )  # fmt: skip
    assert timed.exit_code == 0, timed.output
    assert "whole model" in timed.stdout
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "benchmark.json")], env={"COLUMNS": "80"})
    assert "TTFT ms, 9" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    earlier = {**json.loads((tmp_path / "benchmark.json").read_bytes()), "schema": "voidprune.benchmark/1"}
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "benchmark.json").write_text(json.dumps(earlier))
    refused = invoke("show", tmp_path / "earlier" / "benchmark.json")
    assert refused.exit_code == 1
    assert "benchmark format 1; this version of voidprune reads format 2" in refused.output
    rendered = invoke("report", tmp_path, "-o", tmp_path / "report.html")
    assert rendered.exit_code == 0, rendered.output
    assert "time per output token" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["profile.json", "schedule.json", "slim"])
def test_show(results: Path, name: str) -> None:
    assert invoke("show", results / name).exit_code == 0
    document = json.loads(invoke("show", results / name, "--json").stdout)
    assert document["schema"].startswith("voidprune.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt-lengths", "1,8"), "'1,8' is not a list of whole numbers from 2"),
        (("--batch-sizes", "two"), "'two' is not a list of whole numbers from 1"),
        (("--plot", "times.pdf"), "neither *.svg nor *.png"),
    ],
)
def test_bench_refuses_before_it_measures(results: Path, options: tuple[str, ...], message: str) -> None:
    refused = invoke("bench", results / "slim", "--baseline", "demo", *options)
    assert refused.exit_code == 2
    assert message in refused.output


def test_plan_prints_costs_and_a_dry_run_writes_nothing(results: Path, tmp_path: Path) -> None:
    result = invoke("plan", results / "profile.json", "-o", tmp_path / "s.json", "--keep", 0.5, "--dry-run")
    assert result.exit_code == 0
    assert "K/V a token" in result.stdout
    assert "decode: read a token" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_export_plans_by_itself(tmp_path: Path) -> None:
    result = invoke(
        "export", "demo", "-o", tmp_path / "slim", "--keep", 0.3, "--criterion", "last-n", "--provider", "cpu"
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "slim" / "voidprune.json").read_bytes())
    layers = manifest["schedule"]["model"]["num_layers"]
    assert len(manifest["kept_layers"]) == max(1, int(0.3 * layers + 0.5))
    assert manifest["parity"]["onnx"] <= manifest["parity"]["tolerance"]


def test_heal_then_export_without_a_word_on_layers(results: Path, tmp_path: Path) -> None:
    dropped = invoke("plan", "demo", "-o", tmp_path / "schedule.json", "--drop-layers", "7,8")
    assert dropped.exit_code == 0, dropped.output
    arguments = ("heal", "demo", "--schedule", tmp_path / "schedule.json", "--dataset", "yes-no", "--num-samples", 30)
    healed = invoke(*arguments, "-o", tmp_path / "healed", "--max-new-tokens", 8, "--device", "cpu", "--quiet")
    assert healed.exit_code == 0, healed.output
    assert "healed by linear" in healed.stdout
    exported = invoke("export", tmp_path / "healed", "-o", tmp_path / "slim", "--provider", "cpu", "--json", "--quiet")
    assert exported.exit_code == 0, exported.output
    for folder in ("healed", "slim"):
        manifest = json.loads((tmp_path / folder / "voidprune.json").read_bytes())
        assert manifest["kept_layers"] == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
        assert manifest["healing"]["methods"] == ["linear"]
    assert "healed by linear" in invoke("show", tmp_path / "slim").stdout
    refused = ("eval", tmp_path / "healed", "--tasks", tmp_path / "seen.jsonl")
    seen = task_rows("yes-no", num_items=30, split="training")[3]
    (tmp_path / "seen.jsonl").write_text(json.dumps({"prompt": seen.messages[0]["content"], "response": "yes"}))
    expect_error(*refused, message="1 of the 1 prompts of seen.jsonl were trained on")
    expect_error(*arguments, "-o", tmp_path / "healed", message="exists")


def test_a_training_says_how_it_goes_and_what_came_of_it(tmp_path: Path) -> None:
    dropped = invoke("plan", "demo", "-o", tmp_path / "schedule.json", "--drop-layers", "5,7,8")
    assert dropped.exit_code == 0, dropped.output
    arguments = ("heal", "demo", "--schedule", tmp_path / "schedule.json", "--dataset", "demo", "--num-samples", 12,
                 "--responses", "dataset", "--device", "cpu", "-o", tmp_path / "out")  # fmt: skip
    short = ("--method", "distill", "--steps", 8, "--evaluate-every", 4, "--heal-batch-size", 8, "--rank", 4)
    refused = invoke(*arguments, "--rank", 4)
    assert refused.exit_code == 2
    assert "--rank goes with --method distill" in refused.stderr
    expect_error(*arguments, *short, "--embeddings", message="embeddings are not trained by adapters")
    expect_error(*arguments, *short, "--method", "linear", message="distill, linear do not follow each other")
    failed = invoke(*arguments, *short, "--learning-rate", 0.3, "--json")
    assert failed.exit_code == 0, failed.output
    assert json.loads(failed.stdout)["healing"]["settings"]["distill"]["alpha"] == 4
    assert re.search(
        r"^step 8: held-out loss [\d.]+, training loss [\d.]+, [\d,]+ tokens/s$", failed.stderr, re.MULTILINE
    )
    assert "nothing that was tried is better on held-out samples" in failed.stderr
    half = invoke(*arguments, "--method", "linear", *short, "--learning-rate", 0.3, "--overwrite", "--quiet")
    assert half.exit_code == 0, half.output
    assert half.stderr == "distill made nothing better on held-out samples and was dropped\n"
    assert "healed by linear " in half.stdout


def test_layers_leave_in_rounds(tmp_path: Path) -> None:
    arguments = ("heal", "demo", "--dataset", "demo", "--num-samples", 12, "--responses", "dataset", "--device", "cpu",
                 "-o", tmp_path / "out", "--quiet")  # fmt: skip
    for options, message in (
        ((), "Give --schedule, or --rounds and --keep"),
        (("--schedule", "s.json", "--rounds", 2), "Give --schedule, or --rounds and --keep"),
        (("--schedule", "s.json", "--keep", 0.5), "--keep goes with --rounds"),
    ):
        refused = invoke(*arguments, *options)
        assert refused.exit_code == 2
        assert message in refused.stderr
    expect_error(*arguments, "--rounds", 2, message="rounds count layers")
    healed = invoke(*arguments, "--rounds", 2, "--keep", 0.9, "--keep-decode", 0.8, "--protect", "0,11", "--json")
    assert healed.exit_code == 0, healed.output
    manifest = json.loads(healed.stdout)
    assert [manifest["schedule"][phase].count("full") for phase in ("prefill", "decode")] == [11, 10]
    assert manifest["schedule"]["origin"] == {
        "criterion": "search-loss", "keep_prefill": 0.9, "keep_decode": 0.8, "phases": "split", "protected": "0,11",
    }  # fmt: skip
    assert len(manifest["healing"]["outcomes"]["linear"]["rounds"]) == 2


# ---- choosing layers on the model

FEW = ("--dataset", "yes-no", "--num-samples", 3, "--max-new-tokens", 4, "--device", "cpu", "--quiet")


def test_plan_runs_the_model_and_a_profile_needs_no_model(results: Path, tmp_path: Path) -> None:
    searched = invoke(
        "plan", "demo", "-o", tmp_path / "searched.json", "--keep-prefill", 0.8, "--criterion", "search-loss",
        "--search-evaluations", 0, "--protect", "0,11", "--profile", results / "profile.json", *FEW,
    )  # fmt: skip
    assert searched.exit_code == 0, searched.output
    schedule = json.loads((tmp_path / "searched.json").read_bytes())
    assert schedule["prefill"].count("full") == 10
    assert schedule["prefill"][0] == schedule["prefill"][11] == "full"
    assert [path.name for path in tmp_path.iterdir()] == ["searched.json"]
    ranked = invoke("plan", results / "profile.json", "-o", tmp_path / "ranked.json", "--max-bytes", "5MB", "--json")
    assert ranked.exit_code == 0, ranked.output
    document = json.loads(ranked.stdout)
    assert document["costs"]["weight_bytes"] <= 5_000_000 < document["baseline"]["weight_bytes"]
    assert document["schedule"] == json.loads((tmp_path / "ranked.json").read_bytes())


def test_layers_by_name(results: Path, tmp_path: Path) -> None:
    for source in ("demo", results / "profile.json"):
        for option, layers in (("--drop-layers", "3,7,9-10"), ("--keep-layers", "0-2,4-6,8,11")):
            result = invoke("plan", source, "-o", tmp_path / "s.json", option, layers, "--overwrite", "--json")
            assert result.exit_code == 0, result.output
            prefill = json.loads(result.stdout)["schedule"]["prefill"]
            assert [layer for layer, action in enumerate(prefill) if action == "skip"] == [3, 7, 9, 10]


def test_an_infeasible_budget_names_one_that_is_feasible(results: Path, tmp_path: Path) -> None:
    arguments = ("plan", results / "profile.json", "-o", tmp_path / "s.json", "--max-bytes")
    result = expect_error(*arguments, "1kB", message="no schedule is within 1,000 bytes")
    amount = result.stderr.splitlines()[1].split(": ")[-1].removesuffix(" bytes").replace(",", "")
    assert invoke(*arguments, amount).exit_code == 0
    (tmp_path / "s.json").unlink()
    expect_error(*arguments, int(amount) - 1, message="no schedule is within")


def test_export_to_a_goal(tmp_path: Path) -> None:
    for name, split, count in (("choose", "calibration", 2), ("judge", "validation", 16)):
        rows = task_rows("yes-no", num_items=count, split=split)
        lines = [{"prompt": row.messages[0]["content"], "response": row.response, "answer": row.answer} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (
        "export", "demo", "--goal", "fast-prompt", "--max-loss", 0.1, "--responses", "dataset", "--max-new-tokens", 16,
        "--dataset", tmp_path / "choose.jsonl", "--device", "cpu", "--provider", "cpu", "--quiet",
    )  # fmt: skip
    result = invoke(*arguments, "--judging", tmp_path / "judge.jsonl", "-o", tmp_path / "fast")
    assert result.exit_code == 0, result.output
    assert "beside the whole model, allowed 10.0%" in result.stdout
    schedule = json.loads((tmp_path / "fast" / "voidprune.json").read_bytes())["schedule"]
    assert schedule["prefill"].count("full") < 12 == schedule["decode"].count("full")
    assert schedule["origin"]["goal"] == "fast-prompt"
    too_few = (*arguments, "--judging", tmp_path / "choose.jsonl", "-o", tmp_path / "none")
    expect_error(*too_few, message="too few")
    assert not (tmp_path / "none").exists()


def test_compare_writes_what_show_reads(results: Path, tmp_path: Path) -> None:
    arguments = (
        "compare", "demo", "--keep", "0.8", "--scope", "decode", "--search-evaluations", 0,
        "--profile", results / "profile.json", "--dataset", tmp_path / "texts.txt", *FEW[2:],
    )  # fmt: skip
    (tmp_path / "texts.txt").write_text("Ann has 4 beads.\n\nBen buys 7 eggs.\n\nVera has 31 coins.")
    targets = ("-o", tmp_path / "comparison.json", "--plot", tmp_path / "comparison.svg")
    result = invoke(*arguments, *targets)
    assert result.exit_code == 0, result.output
    assert "search-loss" in result.stdout
    shown = invoke("show", tmp_path / "comparison.json")
    assert shown.stdout == result.stdout
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "comparison.svg", "texts.txt"]
    expect_error(*arguments, *targets, message="exists")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", 0.5, "--max-bytes", "lots"), "'lots' is no amount"),
        (("--max-bytes", "0"), "--max-bytes 0 is no limit"),
        (("--drop-layers", "3-1"), "'3-1' is no list of layers"),
        (("--drop-layers", "0-99999999999"), "is no list of layers"),
        (("--drop-layers", "12"), "there is no layer 12; the model has 12"),
        (("--drop-layers", "0-11"), "no layer is left"),
        (("--keep", 0.5, "--protect", "99"), "there is no layer 99"),
        (("--drop-layers", "1", "--protect", "1", "--keep", 0.5), "layer 1 is both protected and dropped"),
        (("--keep-layers", "1", "--keep", 0.5), "--keep-layers says all"),
        (("--goal", "small", "--keep", 0.5), "a goal finds out by itself"),
        (("--goal", "small", "--max-loss", 2), "a loss of 2 is outside of (0, 1)"),
        (("--keep-prefill", 0.5, "--keep-decode", 1, "--phases", "shared"), "different keep ratios"),
        (("--keep", 0.5, "--criterion", "search-loss", "--dataset", "nowhere"), "no task or file nowhere"),
    ],
)
def test_budgets_that_make_no_sense(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    for command in ("plan", "export"):
        expect_error(command, "demo", "-o", tmp_path / "out", *arguments, message=message)
    assert list(tmp_path.iterdir()) == []


def test_what_runs_the_model_is_refused_with_a_profile_alone(results: Path, tmp_path: Path) -> None:
    arguments = ("plan", results / "profile.json", "-o", tmp_path / "s.json")
    expect_error(*arguments, "--keep", 0.5, "--criterion", "auto", message="auto has to run the model")
    expect_error(*arguments, "--goal", "small", message="a goal has to run the model")
    twice = invoke(*arguments, "--keep", 0.5, "--profile", results / "profile.json")
    assert twice.exit_code == 2
    assert "a profile is given already" in twice.stderr


@pytest.mark.parametrize("keeps", ["0", "1", "0.5,nan"])
def test_compare_refuses_shares_that_leave_nothing_to_compare(keeps: str) -> None:
    expect_error("compare", "demo", "--keep", keeps, message="outside of (0, 1)")


def test_usage_errors(tmp_path: Path) -> None:
    for arguments in (
        ("compare", "demo", "--keep", "half"),
        ("plan", "demo", "--keep", 0.5),
        ("plan", "demo", "-o", tmp_path / "s", "--keep", 0.5, "--criterion", "best"),
        ("plan", "demo", "-o", tmp_path / "s", "--goal", "tiny"),
        ("export", "demo", "-o", tmp_path / "s", "--keep", 0.5, "--num-samples", 1),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


# ---- bad input


def test_missing_model(tmp_path: Path) -> None:
    expect_error("profile", tmp_path / "absent", "-o", tmp_path / "p.json", message="no model at")


@pytest.mark.parametrize("command", ["show", "generate --prompt a", "eval --tasks demo", "profile -o p", "report -o r"])
def test_a_name_that_no_file_can_have(command: str) -> None:
    name, *options = command.split()
    expect_error(name, "a" * 300, *options, message="a name is too long")


def test_empty_folder_is_no_model(tmp_path: Path) -> None:
    expect_error("export", tmp_path, "-o", tmp_path / "out", "--keep", 0.5, message="holds no config.json")
    assert list(tmp_path.iterdir()) == []


def test_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 2}')
    expect_error(
        "export", tmp_path, "-o", tmp_path / "out", "--keep", 0.5, message="model_type 'mamba' is not supported"
    )


@pytest.mark.parametrize("keep", ["0", "1.5", "-1", "nan"])
def test_keep_ratio_outside(keep: str, tmp_path: Path) -> None:
    expect_error("export", "demo", "-o", tmp_path / "out", "--keep", keep, message="outside of (0, 1]")
    assert list(tmp_path.iterdir()) == []


def test_no_budget_is_an_error(results: Path, tmp_path: Path) -> None:
    for arguments in (("plan", results / "profile.json"), ("plan", "demo"), ("export", "demo")):
        expect_error(*arguments, "-o", tmp_path / "out", message="nothing says how small the schedule is to be")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no samples"), ('{"prompt": "a"}\n{oops\n', "line 2 is not JSON")]
)
def test_bad_calibration_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    expect_error("profile", "demo", "-o", tmp_path / "p.json", "--dataset", tmp_path / "data.jsonl", message=message)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_schedule_of_another_model(tmp_path: Path) -> None:
    from voidprune.schedule import ModelIdentity

    write_schedule(tmp_path / "schedule.json", full_schedule(ModelIdentity("other", "llama", 7, "sha256:0")))
    arguments = ("--schedule", tmp_path / "schedule.json")
    expect_error(
        "export", "demo", "-o", tmp_path / "out", *arguments, message="is for other (llama, 7 layers), not for"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"]


def test_existing_output_is_never_overwritten_unasked(results: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    expect_error("export", "demo", "-o", tmp_path / "out", "--keep", 0.5, message="exists")
    expect_error("plan", results / "profile.json", "-o", results / "schedule.json", "--keep", 0.5, message="exists")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_broken_artefacts(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(artifacts.canonical_bytes({"schema": "voidprune.profile/99"}))
    expect_error("plan", tmp_path / "profile.json", "-o", tmp_path / "s.json", "--keep", 0.5, message="reads format 2")


def test_eval_of_an_unknown_task() -> None:
    expect_error("eval", "demo", "--tasks", "nonsense", message="no task or file nonsense")


def test_overwrite_spares_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    arguments = ("--keep", 0.5, "--criterion", "last-n", "--overwrite")
    expect_error("export", "demo", "-o", tmp_path / "out", *arguments, message="was not written by this command")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_a_bundle_is_not_exported_over_itself(results: Path) -> None:
    arguments = ("--keep", 0.5, "--criterion", "last-n", "--overwrite", "--provider", "cpu")
    expect_error("export", results / "slim", "-o", results / "slim", *arguments, message="holds the model itself")
    assert (results / "slim" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "option", [("--single-turn",), ("--boundary", "prefill"), ("--keep", 0.5), ("--criterion", "lac")]
)
def test_a_schedule_leaves_nothing_to_choose(results: Path, tmp_path: Path, option: tuple[object, ...]) -> None:
    result = invoke("export", "demo", "-o", tmp_path / "x", "--schedule", results / "schedule.json", *option)
    assert result.exit_code == 2
    assert f"does not go with {option[0]}" in result.stderr


def test_eval_refuses_options_that_say_nothing_here(results: Path) -> None:
    schedule = results / "schedule.json"
    expect_error("eval", results / "slim", "--schedule", schedule, message="has its schedule already")
    expect_error("eval", "demo", "--baseline", "demo", message="is no bundle to put beside a baseline")


def test_a_missed_gate_exits_with_3_and_still_says_what_was_measured(results: Path, tmp_path: Path) -> None:
    arguments = ("eval", "demo", "--schedule", results / "schedule.json", "--tasks", "sorting", "--num-samples", 4)
    gates = ("--min-score", 0, "--min-score", "sorting=0", "--max-ppl-ratio", 1e9)
    assert invoke(*arguments, *gates, "-o", tmp_path / "met.json").exit_code == 0
    missed = expect_error(
        *arguments, "--max-ppl-ratio", "0.5", "--json", "-o", tmp_path / "missed.json",
        message="times that of the whole model, asked is at most 0.5", code=3,
    )  # fmt: skip
    assert json.loads(missed.stdout) == json.loads((tmp_path / "missed.json").read_bytes())
    assert (tmp_path / "met.json").read_bytes() == (tmp_path / "missed.json").read_bytes()


def test_gates_that_cannot_be_measured_are_refused_at_once(results: Path) -> None:
    arguments = ("eval", "demo", "--num-samples", 1)
    expect_error(*arguments, "--min-score", "history=0.5", message="the task history has no score")
    expect_error(*arguments, "--max-ppl-ratio", "1.1", message="the perplexity ratio is to the whole model")
    expect_error(
        "eval", results / "slim", "--max-ppl-ratio", "1.1", message="the perplexity ratio is to the whole model"
    )
    for value in ("1.5", "nan", "=0.5", "sorting=", "sorting=-1"):
        refused = invoke(*arguments, "--min-score", value)
        assert refused.exit_code == 2
        assert "is not a share from 0 to 1" in refused.stderr


@pytest.mark.parametrize("option", [("--tasks", "demo"), ("--num-samples", 3), ("--max-ppl-ratio", 2)])
def test_options_that_say_nothing_to_the_harness_are_refused(option: tuple[object, ...]) -> None:
    refused = invoke("eval", "demo", "--harness", "boolq", *option)
    assert refused.exit_code == 2
    assert f"{option[0]} does not go with --harness" in refused.stderr


def test_options_of_the_harness_go_with_it_alone() -> None:
    refused = invoke("eval", "demo", "--limit", 3)
    assert refused.exit_code == 2
    assert "--limit goes with --harness" in refused.stderr


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of it fails, installed or not
    refused = expect_error("eval", "demo", "--harness", "boolq", message="lm-evaluation-harness is not installed")
    assert "pip install 'voidprune[eval]'" in refused.stderr


def test_export_publishes_nothing_that_misses_its_gate(results: Path, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(
        '{"prompt": "Sort from smallest to largest: 91, 97, 73", "answer": "no", "task": "t"}'
    )
    arguments = ("export", "demo", "-o", tmp_path / "out", "--schedule", results / "schedule.json", "--provider", "cpu")
    gates = ("--eval-tasks", tmp_path / "items.jsonl", "--min-score", "t=0.5")
    missed = expect_error(*arguments, *gates, message="t scores 0.0000, asked is at least 0.5", code=3)
    assert "nothing was published" in missed.stderr
    assert "t (1 items)" in missed.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]
    assert invoke(*arguments, *gates[:-1], "t=0").exit_code == 0
    assert (tmp_path / "out" / "voidprune.json").exists()


def test_bench_refuses_what_is_not_the_whole_model(results: Path) -> None:
    expect_error("bench", results / "slim", "--baseline", results / "slim", message="is not the whole model in fp32")


def test_bench_beyond_the_context(results: Path) -> None:
    arguments = ("--baseline", "demo", "--prompt-lengths", 5000, "--provider", "cpu")
    expect_error("bench", results / "slim", *arguments, message="5000 tokens are asked for; the model's context is 512")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    expect_error(
        "profile", "demo", "-o", tmp_path / "p.json", "--device", "nosuch", message="torch cannot use the device nosuch"
    )


def test_a_result_with_holes_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"schema": "voidprune.evaluation/1"}')
    expect_error("show", tmp_path / "evaluation.json", message="evaluation format 1; this version of voidprune reads")
    (tmp_path / "evaluation.json").write_text('{"schema": "voidprune.evaluation/2"}')
    expect_error("show", tmp_path / "evaluation.json", message="is not a whole evaluation")
    refused = expect_error("report", tmp_path, "-o", tmp_path / "r.html", message="holds nothing that can be read")
    assert "evaluation.json was left out: it is not a whole evaluation" in refused.stderr


def test_a_report_says_which_files_it_left_out(tmp_path: Path) -> None:
    """On the page and on stderr, however it names them; what can be read is there."""
    from tests.report.documents import fill_folder

    folder = tmp_path / "results"
    folder.mkdir()
    fill_folder(folder)
    found = json.loads((folder / "evaluation.json").read_bytes())
    (folder / "evaluation-of-all.json").write_text(json.dumps({**found, "dataset": "all"}))
    (folder / "benchmark.json").write_text('{"schema": "voidprune.benchmark/1"}')
    result = invoke("report", folder, "-o", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "evaluation.json is the evaluation that is shown; left out: evaluation-of-all.json.",
        "benchmark.json was left out: it has benchmark format 1; this version of voidprune reads format 2.",
    ]
    twin = json.loads((tmp_path / "r.json").read_bytes())
    assert set(result.stderr.splitlines()) <= set(twin["caveats"])
    assert (twin["evaluation"], twin["benchmark"]) == (found, None)
    assert not {"evaluation-of-all.json", "benchmark.json"} & twin["files"].keys()
    page = (tmp_path / "r.html").read_text()
    assert all(sentence in page for sentence in result.stderr.splitlines())


def test_termination_leaves_nothing_half_built(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom voidprune import cli\nfrom voidprune.pipeline import export\n"
        "export.verify_bundle = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"cli.main(['export', 'demo', '-o', {str(tmp_path / 'out')!r}, '--keep', '0.5', '--criterion', 'last-n'])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.returncode == 143, finished.stderr
    assert list(tmp_path.iterdir()) == []


# ---- help


def test_help_has_not_changed() -> None:
    texts = [invoke("--help").stdout, *(invoke(command, "--help").stdout for command in COMMANDS)]
    assert "\n".join(texts) == (GOLDEN / "help.txt").read_text()


def test_the_command_line_starts_without_anything_heavy() -> None:
    script = "import sys, voidprune.cli; print([m for m in ('torch', 'transformers', 'numpy', 'onnx', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("options", [("--drop-layers", "3,4"), ("--keep", "0.5", "--criterion", "lac")])
def test_planning_from_a_profile_needs_neither_torch_nor_transformers(results: Path, options: tuple[str, ...]) -> None:
    arguments = ["plan", str(results / "profile.json"), "--dry-run", "--json", *options]
    script = (
        "import sys\nfrom voidprune.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "sys.exit(', '.join(name for name in ('torch', 'transformers') if name in sys.modules) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["schedule"]["origin"]["criterion"] in ("explicit", "lac")


def test_a_family_without_graphs_is_exported_as_a_checkpoint(tmp_path: Path) -> None:
    from tests.tiny_models import build_model

    source = build_model("mixtral", tmp_path / "model")
    write_schedule(tmp_path / "schedule.json", full_schedule(source.identity))
    arguments = ["export", source.folder, "--schedule", tmp_path / "schedule.json", "--provider", "cpu"]
    result = invoke(*arguments, "-o", tmp_path / "slim")
    assert result.exit_code == 0
    assert "only a slim checkpoint is written (--format hf): no ONNX graphs are made of mixtral models" in result.stderr
    assert not list((tmp_path / "slim").glob("*.onnx"))
    asked = expect_error(
        *arguments, "-o", tmp_path / "graphs", "--format", "onnx", message="no ONNX graphs are made of mixtral"
    )
    assert "--format hf" in asked.stderr
    assert not (tmp_path / "graphs").exists()


def test_families_are_listed() -> None:
    from voidprune.models.families import FAMILIES, REFUSED

    lines = invoke("families").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*FAMILIES, *REFUSED]
    for line in lines:
        name, _, said = line.partition(" ")
        expected = " ".join(FAMILIES[name].formats) if name in FAMILIES else "refused"
        assert said.lstrip().startswith(f"{expected} ")


def test_the_demo_model_is_small_enough() -> None:
    assert sum(path.stat().st_size for path in demo_folder().iterdir()) < 10_000_000
