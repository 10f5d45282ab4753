"""The README and docs/ say what is true: commands run, links lead somewhere, formats and recipes are what the code reads."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from click.testing import CliRunner

from tests.doctor.healthy import CPU_MACHINE
from voidprune import artifacts
from voidprune.cli import main
from voidprune.doctor.diagnosis import diagnose
from voidprune.errors import RecipeError
from voidprune.models.families import FAMILIES
from voidprune.pipeline.harness import HarnessReport
from voidprune.pipeline.steps import Step, run_steps
from voidprune.pipeline.tasks import task_rows
from voidprune.planning.budgets import Budget
from voidprune.planning.criteria import CRITERIA
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.profile import read_profile
from voidprune.recipe import parse_recipe
from voidprune.schedule import LayerAction, Phase

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def commands() -> list[list[str]]:
    """Every line of a shell block that calls voidprune, and the one in the running text."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("voidprune ")]
    lines += [found for found in re.findall(r"`(voidprune export [^`]+)`", README) if "MODEL" in found]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = task_rows("demo", num_items=6)
    items = [
        json.dumps(
            {"prompt": row.messages[0]["content"], "response": row.response, "answer": row.answer, "task": row.group}
        )
        for row in rows
    ]
    for name in ("prompts.jsonl", "items.jsonl"):
        (tmp_path / name).write_text("\n".join(items))
    training = [row.messages[0]["content"] for row in task_rows("yes-no", num_items=30, split="training")]
    (tmp_path / "training.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in training))
    found = commands()
    assert len(found) >= 8
    for arguments in found:
        arguments = ["demo" if argument == "MODEL" else argument for argument in arguments]
        if "-o" in arguments and (tmp_path / arguments[arguments.index("-o") + 1]).exists():
            arguments.append("--overwrite")
        if "--goal" in arguments:
            arguments += ["--max-loss", "0.9"]  # three items a task to judge by cannot show that less is lost
        if arguments[0] == "run":  # minutes of work: tests/pipeline/test_compression.py runs a smaller one
            arguments[1] = str(ROOT / arguments[1])
            arguments.append("--dry-run")
        if "distill" in arguments:
            arguments += ["--steps", "4"]
        if arguments[0] == "bench":  # what else runs beside the tests is not its business
            arguments += ["--rounds", "2", "--max-spread", "1e9"]
        result = CliRunner().invoke(main, arguments, prog_name="voidprune", catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"


def test_the_table_of_families_is_true() -> None:
    rows = re.findall(r"^\| (`.*) \| yes \| (yes|no) \|$", README, re.MULTILINE)
    found = {name: graphs for names, graphs in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == {model_type: "yes" if "onnx" in spec.formats else "no" for model_type, spec in FAMILIES.items()}


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


# ---- links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, spaces to hyphens, punctuation gone."""
    headings = re.findall(r"^#+ +(.+)$", _without_code(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def _without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = _without_code(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target for target in targets if not re.match(r"https?://", target)]
    for target in local:
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT.resolve()), f"{page.name}: {target} leads out of the repository"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
    used, defined = set(re.findall(r"\]\[([^]]+)\]", text)), set(re.findall(r"^\[([^]]+)\]: ", text, re.MULTILINE))
    assert used == defined, page.name


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\((\w[\w.-]*\.md)\)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert all(f"docs/{name}" in README for name in linked)


# ---- commands, pictures, code


def test_commands_of_the_docs_are_known(tmp_path: Path) -> None:
    """Every `voidprune ...` line of a shell block: the command is there, and so are its options."""
    lines = [
        line
        for page in DOCS.glob("*.md")
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8").replace("\\\n", " "), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("voidprune ")
    ]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = main.commands[words[0]]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words[1:] if word.startswith("-")} <= options, line


def test_the_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    drawing = runpy.run_path(str(DOCS / "pictures" / "draw.py"))
    drawing["main"](tmp_path)
    drawn = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_bytes() for file in (DOCS / "pictures").glob("*.svg")}
    concepts = (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert all(f"](pictures/{name})" in concepts for name in drawn)


def test_the_table_of_actions_is_true() -> None:
    concepts = (DOCS / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", concepts, re.MULTILINE)
    assert {name: cells for name, *cells in rows} == {
        str(action): ["yes" if does else "no" for does in (action.attends, action.writes_kv, action.runs_mlp)]
        for action in LayerAction
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Every document that the commands write, by its schema, of the demo model."""
    folder = tmp_path_factory.mktemp("written")

    def run(*arguments: object) -> str:
        texts = [str(argument) for argument in arguments]
        result = CliRunner().invoke(main, texts, prog_name="voidprune", catch_exceptions=False)
        assert result.exit_code == 0, f"{texts}: {result.output}"
        return result.stdout

    few = ("--num-samples", 2)
    kinds = ("profile", "schedule", "evaluation", "benchmark", "comparison", "probe", "lac")
    files = {name: folder / f"{name}.json" for name in kinds}
    run("profile", "demo", "-o", files["profile"], *few, "--max-new-tokens", 8)
    run("plan", files["profile"], "-o", files["schedule"], "--keep", 0.5)
    schedule = ("--schedule", files["schedule"], "--provider", "cpu")
    run("export", "demo", "-o", folder / "slim", *schedule)
    run(
        "export",
        "demo",
        "-o",
        folder / "packed",
        *schedule,
        "--format",
        "onnx",
        "--precision",
        "int4",
        "--zero-points",
        *few,
    )
    run("eval", folder / "slim", "--baseline", "demo", *few, "--provider", "cpu", "-o", files["evaluation"])
    run("eval", "demo", "--adaptive", "readout", "--tasks", "yes-no", *few, "-o", files["lac"])
    short = (
        "--prompt-lengths",
        6,
        "--context-lengths",
        6,
        "--new-tokens",
        2,
        "--rounds",
        2,
        "--max-spread",
        1000,
        "--provider",
        "cpu",
    )
    run("bench", folder / "slim", "--baseline", "demo", *short, "-o", files["benchmark"])
    run(
        "compare", "demo", "--dataset", "yes-no", "--num-samples", 6, "--max-new-tokens", 8, "--keep", 0.5,
        "--scope", "bytes", "--search-evaluations", 1, "-o", files["comparison"],
    )  # fmt: skip
    freeze = ("--intervention", "freeze", "--depths", 11, "--margin", 0.4)
    run("probe", "demo", "-o", files["probe"], "--tasks", "yes-no", "--num-samples", 3, *freeze)
    (folder / "job").mkdir()
    step = Step("note", "note.json", {}, (), lambda: artifacts.write_file(folder / "job" / "note.json", b"{}"))
    list(run_steps([step], folder / "job"))
    documents = [json.loads(file.read_bytes()) for file in (*files.values(), folder / "job" / "steps.json")]
    documents.append(json.loads((folder / "slim" / "voidprune.json").read_bytes()))
    documents.append(diagnose(CPU_MACHINE).to_document())
    documents.append(HarnessReport("demo", "sha256:0", None, {}, {}, {}, "0").to_document())
    return {"folder": folder, **{document["schema"]: document for document in documents}}


def documented_formats() -> Iterator[tuple[str, set[str], set[str]]]:
    """Schema, keys that MUST be there, and keys that MAY."""
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        named = re.match(r"`(voidprune\.[\w-]+/\d+)`", section)
        if named is not None:
            rows = re.findall(r"^\| (`[^|]+`) \| (MUST|MAY) \|", section, re.MULTILINE)
            keys: dict[str, set[str]] = {"MUST": set(), "MAY": set()}
            for names, duty in rows:
                keys[duty] |= set(re.findall(r"`(\w+)`", names))
            yield named[1], keys["MUST"], keys["MAY"]


def test_formats_are_those_of_the_files(written: Mapping[str, Any]) -> None:
    documented = {schema: (required, optional) for schema, required, optional in documented_formats()}
    assert set(documented) == set(written) - {"folder"}
    for schema, (required, optional) in documented.items():
        keys = set(written[schema])
        assert required <= keys <= required | optional, schema


def test_bundles_hold_what_the_formats_say(written: Mapping[str, Any]) -> None:
    from safetensors import safe_open

    graphs = {
        phase: onnx.load(written["folder"] / "slim" / f"{phase}.onnx", load_external_data=False) for phase in Phase
    }
    manifest = written["voidprune.bundle/1"]
    for phase, graph in graphs.items():
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        slots = [manifest["slots"][slot] for slot in manifest["graphs"][phase]["slots"]]
        assert metadata == {"voidprune.phase": str(phase), "voidprune.slots": " ".join(map(str, slots))}
        names = {value.name for value in (*graph.graph.input, *graph.graph.output)}
        assert {"input_ids", "attention_mask", "logits", "past_key_values.0.key", "present.0.value"} <= names
        assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 24, "com.microsoft": 1}
    with safe_open(written["folder"] / "packed" / "model.int4.safetensors", "np") as packed:
        formats = json.loads(packed.metadata()["voidprune.packed"])
        bits, block, zero_points, columns = formats["model.layers.0.mlp.up_proj.weight"]
        assert (bits, block, zero_points) == (4, 32, True)
        rows, blocks, width = packed.get_slice("model.layers.0.mlp.up_proj.weight").get_shape()
        assert (blocks, width) == (-(-columns // block), block * bits // 8)
        assert packed.get_slice("model.layers.0.mlp.up_proj.scales").get_shape() == [rows, blocks]
        assert packed.get_slice("model.layers.0.mlp.up_proj.zero_points").get_shape() == [rows, -(-blocks * bits // 8)]


def test_the_criterion_of_the_docs_works(written: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setitem(
        CRITERIA, "strongest-part", CRITERIA["lac"]
    )  # taken back after the test, whatever the code does
    exec(code, {})
    profile = read_profile(written["folder"] / "profile.json")
    criterion = CRITERIA["strongest-part"]
    assert criterion.name == "strongest-part"
    statistics = profile.statistics(Phase.DECODE)
    assert criterion.score is not None
    pairs = zip(statistics.attention_influence, statistics.mlp_influence, strict=True)
    assert criterion.score(statistics, 0) == tuple(max(pair) for pair in pairs)
    schedule = plan_schedule(profile.model, profile, criterion="strongest-part", budget=Budget(keep_decode=0.5))
    assert schedule.num_executed(Phase.DECODE) == 6


def test_the_session_of_the_docs_runs(written: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "edge-gpu.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    wanted = 'BundleSession(Path("slim"), provider="cuda")'
    assert wanted in code
    folder = str(written["folder"] / "slim")
    exec(code.replace(wanted, f'BundleSession(Path({folder!r}), provider="cpu")'), names)
    assert names["session"].provider == "cpu"


def test_costs_of_the_concepts_are_those_of_the_demo_model(written: Mapping[str, Any]) -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--keep[^`]*)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for options, cells in rows:
        arguments = [
            "plan",
            str(written["folder"] / "profile.json"),
            "-o",
            str(written["folder"] / "x.json"),
            "--dry-run",
        ]
        arguments += ["--criterion", "last-n", *shlex.split(options)]
        shown = CliRunner().invoke(main, arguments, prog_name="voidprune", catch_exceptions=False).stdout
        costs = [re.split(r"\s*│\s*", line)[1:5] for line in shown.splitlines() if line.count("│") == 5]
        table = {name: (schedule, ratio) for name, _whole, schedule, ratio in costs}
        named = ("weights", "K/V a token", "prefill arithmetic", "decode: read a token")
        layers = [table[f"layers executed in {phase}"][0] for phase in Phase]
        assert cells.split(" | ") == [*layers, *(table[name][1] for name in named)]


# ---- recipes


def documented_keys() -> dict[str, set[str]]:
    """The keys of each table of recipes.md, by its heading."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    tables = {}
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0].replace("`", "")
        rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
        tables[heading] = {key for names in rows for key in re.findall(r"`(\w+)`", names)}
    return tables


def known_keys(recipe: dict[str, Any], path: tuple[str, ...]) -> set[str]:
    """What the parser says that it knows at a place, when it meets a key that it does not."""
    document = json.loads(json.dumps(recipe))
    place = document
    for key in path:
        place = place[key]
    place["nobody_asked_for_this"] = 1
    with pytest.raises(RecipeError, match="has unknown keys: nobody_asked_for_this") as caught:
        parse_recipe(document, place="recipe", folder=ROOT)
    return set(str(caught.value.hint).removeprefix("known here: ").split(", "))


HUB = {"hub": "org/data", "split": "test"}
SMALLEST: dict[str, dict[str, Any]] = {
    "compression": {
        "model": "demo", "plan": {}, "data": {}, "heal": {"methods": ["linear"]}, "evaluate": {}, "export": {}, "bench": {},
    },
    "adaptive-evaluation": {
        "model": "demo", "alphas": [0.8], "modes": ["mask"], "max_new_tokens": 4, "datasets": {"one": {"layout": "boolq", **HUB}},
        "setups": {"fair": {"options": "file", "scoring": "generate"}},
    },
    "probe": {"model": "demo", "datasets": {"one": {"layout": "squad", **HUB}, "two": {"task": "capitals"}}},
}  # fmt: skip
PLACES: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "compression": ("compression", [()]),
    **{
        f"compression: {part}": ("compression", [(part,)])
        for part in ("data", "plan", "heal", "evaluate", "export", "bench")
    },
    "adaptive-evaluation": ("adaptive-evaluation", [()]),
    "adaptive-evaluation: setups": ("adaptive-evaluation", [("setups", "fair")]),
    "probe": ("probe", [()]),
    "probe: datasets": ("probe", [("datasets", "one"), ("datasets", "two")]),
}


@pytest.mark.parametrize("heading", PLACES)
def test_keys_of_recipes_are_those_of_the_parser(heading: str) -> None:
    kind, paths = PLACES[heading]
    recipe = {"schema": "voidprune.recipe/1", "kind": kind, **SMALLEST[kind]}
    parse_recipe(recipe, place="recipe", folder=ROOT)
    known = set[str]().union(*(known_keys(recipe, path) for path in paths)) - (
        {"schema", "kind"} if paths == [()] else set()
    )
    assert documented_keys()[heading] == known


def test_every_recipe_is_listed() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(\.\./recipes/([^)]+\.yaml)\)", text))
    files = {path.relative_to(ROOT / "recipes").as_posix(): path for path in (ROOT / "recipes").rglob("*.yaml")}
    assert linked == set(files)
    for name, file in files.items():
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["schema"] == "voidprune.recipe/1", name
