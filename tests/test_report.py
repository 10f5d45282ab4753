"""The report: complete, self-contained, well-formed, the same each time, and readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.documents import HOSTILE, adaptive, benchmark, fill_folder, harness, probe, write_results
from tests.report.test_findings import evaluation
from tests.test_plots import make_comparison
from voidprune import artifacts
from voidprune.errors import ArtifactError, MissingExtraError, OutputError
from voidprune.planning.criteria import CRITERIA
from voidprune.report import make_report, render_report, write_report

VOID_ELEMENTS = {"meta", "br", "rect", "polygon", "polyline"}


class Page(HTMLParser):
    """What of the structure of a page can be checked without a browser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pointed_at: list[str] = []
        self.requests: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, tag: str, attrs: dict[str, str | None]) -> None:
        if attrs.get("id"):
            self.ids.append(str(attrs["id"]))
        self.pointed_at += str(attrs.get("aria-labelledby") or "").split()
        self.requests += [f"{tag} {name}" for name in ("src", "href", "xlink:href", "srcset", "data") if name in attrs]
        if tag in ("script", "link", "iframe", "img", "object", "embed"):
            self.requests.append(tag)
        if tag == "svg":
            self.pictures.append(attrs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    fill_folder(folder)
    return folder


def test_the_page_is_complete_and_well_formed(folder: Path) -> None:
    text = render_report(folder)
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    assert set(page.pointed_at) <= set(page.ids)
    assert len(page.pictures) >= 7
    assert all(picture["role"] == "img" and picture["aria-labelledby"] for picture in page.pictures)
    for heading in (
        "What was dropped", "What it cost in quality", "What it bought in bytes", "What it bought in time",
        "Know before use", "Layers by phase", "Quality against size and time", "What layers need of earlier tokens",
        "Bytes and time", "Tasks of lm-evaluation-harness", "LAC token by token", "Make it again", "Where it comes from",
    ):  # fmt: skip
        assert heading in text
    for figure in ("25.0 %", "whole 50.0 %", "-25.0 points [-75.0, +37.5]", "20.00 ms", "whole 40.00 ms", "50 % less"):
        assert figure in text
    assert "sha256:default1" in text


def test_the_page_asks_nobody_for_anything(folder: Path) -> None:
    text = render_report(folder)
    assert Page(text).requests == []
    assert re.findall(r"url\(|@import|https?://", text) == []


def test_what_others_wrote_is_text_and_never_markup(folder: Path) -> None:
    document = evaluation()
    for runner in document["runners"]:
        runner["accuracy"] = {HOSTILE: runner["accuracy"]["sorting"]}
        if runner["against_whole"]:
            runner["against_whole"]["accuracy"] = {HOSTILE: runner["against_whole"]["accuracy"]["sorting"]}
    comparison = make_comparison()
    comparison["model"]["name"] = HOSTILE
    write_results(folder, evaluation={**document, "dataset": HOSTILE}, comparison=comparison, probe=probe(task=HOSTILE))
    report = make_report(folder)
    assert "<script" not in report.page
    assert report.page.count("&lt;script&gt;alert(1)") > 6
    assert Page(report.page).open == []


def test_every_criterion_and_the_schedule_are_in_the_heat_map(folder: Path) -> None:
    text = render_report(folder)
    for name in CRITERIA:
        assert re.search(rf"<title>layer 0, [a-z ]+: {name} ranks it \d of 2", text), name
    assert "layer 1, prefill: only keys and values are written" in text
    assert "active for 40.0% of tokens" in text


@pytest.mark.parametrize(
    "name", ["profile", "schedule", "evaluation", "benchmark", "comparison", "probe", "harness", "adaptive"]
)
def test_what_is_missing_is_said_with_the_command_that_adds_it(folder: Path, name: str) -> None:
    """Each kind of result alone, and all without it."""
    (folder / f"{name}.json").rename(folder.parent / f"{name}.json")
    without = make_report(folder)
    for file in folder.iterdir():
        file.unlink()
    (folder.parent / f"{name}.json").rename(folder / f"{name}.json")
    alone = make_report(folder)
    for report in (without, alone):
        assert Page(report.page).open == []
        artifacts.canonical_bytes(report.document)
    command = {
        "profile": "profile",
        "schedule": "plan",
        "benchmark": "bench",
        "comparison": "compare",
        "probe": "probe",
    }
    if name in command:
        commands = {one["command"].split()[1] for one in without.document["missing"]}
        assert command[name] in commands
        assert command[name] not in {one["command"].split()[1] for one in alone.document["missing"]}
    assert alone.document["files"].keys() == {f"{name}.json"}


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first, second = (write_report(folder, tmp_path / name / "report.html") for name in ("one", "two"))
    assert [path.name for path in first] == ["report.html", "report.json"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_twin_says_the_same(folder: Path, tmp_path: Path) -> None:
    write_report(folder, tmp_path / "report.html")
    twin = artifacts.read_document(tmp_path / "report.json", kind="report", version=1)
    page = (tmp_path / "report.html").read_text()
    assert twin["paragraph"] in page
    cards = {card["key"]: card for card in twin["figures"]}
    accuracy = cards["quality"]["figures"][0]
    assert (accuracy["value"], accuracy["whole"], accuracy["interval"]) == (0.25, 0.5, [-0.75, 0.375])
    assert cards["time"]["figures"][0]["change"] == 0.5
    assert len(twin["layers"]["rankings"]) == 2 * 7 + 3
    assert {panel["scope"] for panel in twin["trade_offs"]["panels"]} == {"bytes", "prefill", "decode"}
    assert twin["probe"] == json.loads((folder / "probe.json").read_bytes())
    assert twin["schedule"] == json.loads((folder / "schedule.json").read_bytes())
    write_report(folder, folder / "report.html")
    write_report(folder, folder / "report.html", overwrite=True)
    assert (folder / "report.json").read_bytes() == (tmp_path / "report.json").read_bytes(), "a report is no result"


def test_times_of_one_round_stand_without_intervals(folder: Path) -> None:
    once = {"num_rounds": 1, "confidence": None, "widest": None}
    write_results(folder, benchmark={**benchmark(spread=0.0), **once})
    report = make_report(folder)
    assert "One round, so there are no intervals." in report.page
    for text in ("0% interval", "[20.00, 20.00]", "[0.50, 0.50]", "[-50.0, -50.0]"):
        assert text not in report.page
    (card,) = (card for card in report.document["figures"] if card["key"] == "time")
    assert card["figures"][0]["change"] == 0.5
    assert card["figures"][0]["interval"] is None
    assert [panel["measured"]["cost_interval"] for panel in report.document["trade_offs"]["panels"][1:]] == [None, None]


def test_pictures_are_written_as_svg_and_png(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="PNG pictures need the extra [report]")
    files = write_report(folder, tmp_path / "report.html", pictures=tmp_path / "pictures")
    names = ("layers", "trade-offs", "probe", "sizes")
    assert {file.name for file in files[2:]} == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    with pytest.raises(OutputError, match="exists"):
        write_report(folder, tmp_path / "report.html")
    again = write_report(folder, tmp_path / "report.html", pictures=tmp_path / "pictures", overwrite=True)
    assert again == files


def test_without_matplotlib_there_is_the_whole_page_and_no_png(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = render_report(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="PNG pictures need matplotlib") as caught:
        write_report(folder, tmp_path / "report.html", pictures=tmp_path / "pictures")
    assert caught.value.hint == "pip install 'voidprune[report]'"
    assert not (tmp_path / "pictures").exists()
    write_report(folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == complete
    assert "--pictures FOLDER" in complete


def test_a_page_is_no_json(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is to be a page"):
        write_report(folder, tmp_path / "report.json")
    with pytest.raises(ArtifactError, match="holds no results"):
        write_report(tmp_path / "results" / "..", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


# ---- in a browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
)  # fmt: skip

MEASURE = """
<script>
addEventListener("load", () => {
  const boxes = {};
  for (const card of document.querySelectorAll(".card")) boxes[card.id] = Math.ceil(card.getBoundingClientRect().bottom);
  const wide = [];
  for (const one of document.querySelectorAll("main *")) {
    if (one.closest(".scroll, pre, svg")) continue;
    if (one.getBoundingClientRect().right > innerWidth + 0.5) wide.push(one.outerHTML.slice(0, 120));
  }
  const found = {inner: innerWidth, scroll: document.documentElement.scrollWidth, boxes, wide,
    paper: getComputedStyle(document.body).backgroundColor};
  document.documentElement.setAttribute("data-measured", JSON.stringify(found));
});
</script>
"""


def look(page: Path, profile: Path, *, width: int, dark: bool = False) -> dict[str, object]:
    """What a browser makes of a page at that width; no message on its console."""
    assert CHROMIUM is not None
    # The window cannot be as narrow as a phone, so the page is shown in a frame, which can.
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<!doctype html><title>frame</title><iframe src="measured.html" width="{width}" height="800" style="border:0"></iframe>'
        "<script>onload = () => { const inside = document.querySelector('iframe').contentDocument.documentElement; "
        "document.documentElement.setAttribute('data-measured', inside.getAttribute('data-measured')); }</script>"
    )
    flags = [*FLAGS, "--allow-file-access-from-files", f"--user-data-dir={profile}", "--window-size=1400,900"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    finished = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=900, check=True
    )
    assert "CONSOLE" not in finished.stderr, finished.stderr
    found = re.search(r'data-measured="([^"]*)"', finished.stdout)
    assert found is not None, finished.stderr
    return dict(
        json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("num_layers", [2, 80])
def test_in_a_browser(folder: Path, tmp_path: Path, num_layers: int) -> None:
    if num_layers > 2:
        fill_folder_with_layers(folder, num_layers)
    page = tmp_path / "report.html"
    write_report(folder, page)
    wide = look(page, tmp_path / "wide", width=1280)
    assert wide["inner"] == wide["scroll"] == 1280
    assert wide["wide"] == []
    boxes = wide["boxes"]
    assert isinstance(boxes, dict)
    assert boxes.keys() == {f"card-{key}" for key in ("dropped", "quality", "bytes", "time")}
    assert max(boxes.values()) <= 800, "the figures are above the fold"
    phone = look(page, tmp_path / "phone", width=390)
    assert phone["inner"] == phone["scroll"] == 390
    assert phone["wide"] == []
    dark = look(page, tmp_path / "dark", width=1280, dark=True)
    assert wide["paper"] == "rgb(255, 255, 255)"
    assert dark["paper"] == "rgb(18, 24, 31)"


def fill_folder_with_layers(folder: Path, num_layers: int) -> None:
    """The same results, of a model of as many layers as the largest have."""
    from tests.profiling.test_profile import fill_blocks, make_profile
    from tests.report.documents import make_schedule
    from voidprune.models.sizes import ModelSizes
    from voidprune.profiling.profile import LayerStatistics, Profile, write_profile
    from voidprune.schedule import ModelIdentity, Phase, schedule_hash, write_schedule

    small = make_profile()
    ramp = tuple((layer * 37 % num_layers) / num_layers for layer in range(num_layers))
    spans = tuple(number % 7 / 7 for number in range(num_layers * (num_layers + 1) // 2))
    active = tuple(int(value * 100) for value in ramp)
    statistics = LayerStatistics(100, active, ramp, ramp, ramp, ramp, 1, spans)
    profile = Profile(
        ModelIdentity("a-large-model", "llama", num_layers, "sha256:large"),
        ModelSizes(small.sizes.layers[:1] * num_layers, 50, 30, 8, 16, 4),
        small.lac,
        small.calibration,
        {"default": dict.fromkeys(Phase, fill_blocks(statistics))},
    )
    write_profile(folder / "profile.json", profile, overwrite=True)
    schedule = make_schedule(profile)
    write_schedule(folder / "schedule.json", schedule, overwrite=True)
    model = {"model": profile.model.to_document()}
    fingerprint = {"model_fingerprint": profile.model.fingerprint}
    write_results(
        folder,
        comparison={**make_comparison(), **model},
        probe={**probe(num_layers=num_layers), **model},
        evaluation={**evaluation(), "schedule_hash": schedule_hash(schedule), **fingerprint},
        benchmark={**benchmark(), **fingerprint},
        harness={**harness(), **fingerprint},
        adaptive={**adaptive(), **fingerprint},
    )
