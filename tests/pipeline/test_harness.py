"""Tasks of lm-evaluation-harness from local files, on a model under a schedule and on its bundle."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'voidprune[eval]'")

from click.testing import CliRunner
from rich.console import Console

from voidprune.cli import main
from voidprune.errors import DatasetError, HealingError
from voidprune.pipeline.export import export_model
from voidprune.pipeline.harness import run_harness
from voidprune.pipeline.heal import heal_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.samples import Answering
from voidprune.pipeline.tasks import task_rows
from voidprune.report.findings import describe
from voidprune.schedule import dropped_schedule
from voidprune.tables import harness_table

pytestmark = pytest.mark.filterwarnings("default")  # what lm_eval and datasets warn of is theirs
NUM_ITEMS = 6

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
metadata: {{version: 1.0}}
"""
CHOICE = """
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
generation_kwargs: {until: ["\\n"], max_gen_toks: 40}
filter_list: [{name: last, filter: [{function: regex, regex_pattern: "Answer: (\\\\w+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = task_rows("yes-no", num_items=NUM_ITEMS)
    items = [
        {"question": row.messages[0]["content"], "label": int(row.answer == "no"), "answer": row.answer} for row in rows
    ]
    data = folder / "items.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))

    def write(name: str, kind: str, text: str, target: str, rest: str) -> None:
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, text=text, target=target) + rest
        )

    write("vp_choice", "multiple_choice", "{{question}}", "label", CHOICE)
    write("vp_generate", "generate_until", "{{question}}", "answer", GENERATE)
    write("vp_rolling", "loglikelihood_rolling", "", '"{{question}}"', ROLLING)
    (folder / "vp_broken.yaml").write_text(
        TASK.format(name="vp_broken", data=folder / "absent.jsonl", kind="multiple_choice", text="a", target="b")
    )
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "slim"
    checkpoint = open_model("demo")
    export_model(checkpoint, dropped_schedule(checkpoint.identity, {9}), folder, provider="cpu")
    return folder


def test_schedule_and_bundle_beside_the_whole_model(tasks: Path, bundle: Path) -> None:
    names = ("vp_choice", "vp_generate", "vp_rolling")
    found = run_harness(
        str(bundle), names, baseline="demo", include_path=tasks, apply_chat_template=True, provider="cpu", num_fewshot=0
    )
    assert list(found.results) == ["whole model", "reference", "onnx"]
    assert found.num_cut == {"whole model": 0, "reference": 0, "onnx": 0}
    whole, reference, onnx = found.results.values()
    assert whole["vp_generate"].metrics["exact_match,last"] == 1.0
    for task in names:
        assert reference[task].num_items == NUM_ITEMS
        assert onnx[task].metrics == pytest.approx(reference[task].metrics, abs=1e-4)
    assert whole["vp_rolling"].metrics != pytest.approx(onnx["vp_rolling"].metrics, abs=1e-3)
    assert set(found.scores) == {"vp_choice", "vp_generate"}
    document = found.to_document()
    assert document["model_fingerprint"] == open_model("demo").identity.fingerprint, "of the whole model"
    metric = document["runners"][2]["tasks"]["vp_choice"]["metrics"]["acc,none"]
    assert set(metric) == {"value", "interval", "against_whole"}
    assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]
    assert metric["against_whole"]["p_value"] <= 1
    assert document["runners"][0]["tasks"]["vp_choice"]["metrics"]["acc,none"]["against_whole"] is None


def test_from_the_command_line_with_a_gate(tasks: Path, tmp_path: Path) -> None:
    arguments = ["eval", "demo", "--harness", "vp_generate", "--include-path", str(tasks), "--apply-chat-template"]
    arguments += ["--limit", "3", "-o", str(tmp_path / "harness.json")]
    met = CliRunner().invoke(main, [*arguments, "--min-score", "0.9"], env={"COLUMNS": "80"})
    assert met.exit_code == 0, met.output
    assert met.stderr == ""
    assert "vp_generate" in met.stdout
    assert max(map(len, met.stdout.splitlines())) <= 80
    document, (_table,) = describe(tmp_path / "harness.json")
    assert document["settings"]["limit"] == 3
    assert document["runners"][0]["tasks"]["vp_generate"]["num_items"] == 3
    missed = CliRunner().invoke(main, [*arguments, "--overwrite", "--min-score", "other=0.9"])
    assert missed.exit_code == 1
    assert "the task other has no score" in missed.stderr


def test_unknown_and_broken_tasks_are_named(tasks: Path) -> None:
    with pytest.raises(DatasetError, match="lm_eval knows no task nonsense"):
        run_harness("demo", ["nonsense"], include_path=tasks)
    with pytest.raises(DatasetError, match="there is no folder"):
        run_harness("demo", ["vp_choice"], include_path=tasks / "absent")
    with pytest.raises(DatasetError, match=r"lm_eval cannot load vp_broken: .*absent"):
        run_harness("demo", ["vp_broken"], include_path=tasks)


def test_prompts_that_a_model_was_healed_with_are_refused(tasks: Path, tmp_path: Path) -> None:
    """Where they are the same, token for token: asked in the chat template, without worked examples."""
    checkpoint = open_model("demo")
    schedule, dataset = dropped_schedule(checkpoint.identity, {9}), Answering(responses="dataset")
    others = task_rows("yes-no", num_items=8, split="training")
    rows = {"seen": [*task_rows("yes-no", num_items=1), *others], "unseen": others}
    for name, used in rows.items():
        heal_model(checkpoint, schedule, tmp_path / name, used, answering=dataset, device="cpu")
    for task in ("vp_choice", "vp_generate"):
        with pytest.raises(HealingError, match=f"1 of the 6 prompts of the lm_eval tasks {task} were trained on"):
            run_harness(str(tmp_path / "seen"), [task], include_path=tasks, apply_chat_template=True, num_fewshot=0)
    healed = run_harness(
        str(tmp_path / "unseen"), ["vp_choice"], include_path=tasks, apply_chat_template=True, num_fewshot=0
    )
    assert healed.to_document()["num_compared_prompts"] == NUM_ITEMS
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(harness_table(healed.to_document()))
    shown = " ".join(console.export_text().split())
    assert "none of 6 prompts is, token for token, one that its weights were fitted to" in shown
    whole = run_harness("demo", ["vp_rolling"], include_path=tasks)
    assert whole.to_document()["num_compared_prompts"] is None
