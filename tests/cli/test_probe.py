"""`voidprune probe`, what `show` makes of it, the schedule that it leads to, and its recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli import expect_error, invoke
from voidprune.recipe import ProbeRecipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "attend-first"
RECORDS = {
    "capitals": {"prompt": "Sort from smallest to largest: 91, 97, 73", "response": "73, 91, 97"},
    "squad": {"context": "Ann likes tea.", "question": "What does Ann like?", "answers": {"text": ["tea"]}},
    "summaries": {"article": "Ann likes tea. Ben likes rice.", "highlights": "Ann likes tea."},
}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("probe") / "probe.json"
    options = ("--intervention", "freeze", "--intervention", "skip-attention", "--depths", "6-8,11", "--margin", 0.4)
    result = invoke(
        "probe", "demo", "-o", output, "--tasks", "yes-no", "--num-samples", 6, *options, "--device", "cpu", "-q"
    )
    assert result.exit_code == 0, result.output
    assert "yes-no, the prompt: accuracy (6 items, whole model 100.0%)" in " ".join(result.stdout.split())
    return output


def test_show_prints_it_in_80_columns(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("show", probe)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "harmless from" in shown.stdout
    assert json.loads(invoke("show", probe, "--json").stdout) == json.loads(probe.read_bytes())
    assert json.loads(probe.read_bytes())["schema"] == "voidprune.probe/1"


def test_it_becomes_a_schedule(probe: Path, tmp_path: Path) -> None:
    freeze, skip = (one["harmless_from"] for one in json.loads(probe.read_bytes())["results"])
    assert freeze is not None
    assert skip is not None
    result = invoke("plan", "demo", "--from-probe", probe, "-o", tmp_path / "schedule.json")
    assert result.exit_code == 0, result.output
    schedule = json.loads((tmp_path / "schedule.json").read_bytes())
    assert schedule["origin"] == {"criterion": "probe", "freeze": freeze, "skip_attention": skip, "margin": 0.4}
    low, high = min(freeze, skip), max(freeze, skip)
    one = "skip_attention" if skip < freeze else "kv_only"
    assert schedule["prefill"] == ["full"] * low + [one] * (high - low) + ["skip"] * (12 - high)
    assert schedule["decode"] == ["full"] * skip + ["skip_attention"] * (12 - skip)


def test_a_probe_says_all(probe: Path, tmp_path: Path) -> None:
    arguments = ("plan", "demo", "--from-probe", probe, "-o", tmp_path / "schedule.json")
    for more in (("--keep", 0.5), ("--criterion", "lac"), ("--goal", "balanced"), ("--drop-layers", "3")):
        expect_error(*arguments, *more, message="a probe says by itself what may go")
    expect_error(*arguments, "--boundary", "prefill", message="leaves the last prompt token alone")
    document = json.loads(probe.read_bytes())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**document, "model": {**document["model"], "fingerprint": "sha256:0"}}))
    expect_error(*arguments[:3], other, *arguments[4:], message="the probe is of voidprune-demo, not of")
    nothing = [{**one, "harmless_from": None} for one in document["results"]]
    other.write_text(json.dumps({**document, "results": nothing}))
    expect_error(*arguments[:3], other, *arguments[4:], message="neither intervention to be harmless")


def test_the_demo_model_is_asked_what_it_was_made_for(tmp_path: Path) -> None:
    options = (
        "--intervention",
        "freeze",
        "--depths",
        "11",
        "--num-samples",
        2,
        "--margin",
        0.5,
        "--device",
        "cpu",
        "-q",
    )
    assert invoke("probe", "demo", "-o", tmp_path / "probe.json", *options).exit_code == 0
    assert json.loads((tmp_path / "probe.json").read_bytes())["dataset"].startswith("demo")


def test_what_is_refused(probe: Path, tmp_path: Path) -> None:
    output = tmp_path / "probe.json"
    expect_error("probe", "demo", "-o", probe, "--tasks", "demo", message="exists")
    expect_error("probe", "demo", "-o", output, "--tasks", "rivers", message="there is no task or file rivers")
    expect_error("probe", "demo", "-o", output, "--depths", "12", "--tasks", "yes-no", message="has no layer 12")
    assert invoke("probe", "demo", "-o", output, "--margin", 1).exit_code == 2


@pytest.mark.parametrize("name", ["llama-2-7b", "mistral-7b", "yi-6b", "llemma-7b"])
def test_the_recipes_read(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert isinstance(recipe, ProbeRecipe)
    assert list(recipe.datasets) == ["capitals", "arithmetic", "squad", "summaries"]
    assert recipe.scopes == ("prompt", "published")


def test_a_recipe_on_the_demo_model(tmp_path: Path) -> None:
    for name, record in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    source = (RECIPES / "llama-2-7b.yaml").read_text()
    few = source.replace("[random, freeze, skip-attention, switch, shuffle]", "[freeze]").replace(
        "[prompt, published]", "[prompt]"
    )
    assert few.count("freeze]") == few.count("[prompt]") == 1
    (tmp_path / "recipe.yaml").write_text(few)
    data = [word for name in ("capitals", "summaries") for word in ("--data", f"{name}={tmp_path / name}.jsonl")]
    arguments = ("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--model", "demo", "--dtype", "fp32", "-q")
    result = invoke(*arguments, *data, "--limit", 1)
    assert result.exit_code == 0, result.output
    written = [line for line in result.stdout.splitlines() if line.startswith("wrote")]
    assert written == [f"wrote {tmp_path / 'out' / f'{name}.json'}" for name in ("capitals", "summaries")]
    found = json.loads((tmp_path / "out" / "summaries.json").read_bytes())
    assert found["whole"]["cnn_dailymail"]["perplexity"] > 1
    last = found["results"][0]["points"][-1]["tasks"]["cnn_dailymail"]
    assert last["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-4)
    again = invoke(*arguments, *data, "--limit", 1)
    assert again.stdout == result.stdout.replace("wrote", "kept")
    assert invoke(*arguments, "--alpha", 0.5).exit_code == 2
    squad = ("--data", f"squad={tmp_path / 'capitals.jsonl'}")
    refused = expect_error(*arguments[:3], tmp_path / "other", *arguments[4:], *squad, message="answers has no list")
    assert "a record of squad has context, question, answers" in refused.stderr
