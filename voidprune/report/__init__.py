"""Everything that was found in a folder, as one HTML page without external requests, its machine-readable twin, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2

import voidprune
from voidprune import artifacts, plots
from voidprune.errors import OutputError
from voidprune.plots.heat_map import draw_strip
from voidprune.plots.marks import draw_legend
from voidprune.plots.probe_curves import draw_probe
from voidprune.plots.size_bars import draw_size_bars
from voidprune.plots.trade_offs import draw_panel, draw_trade_offs, legend_entries
from voidprune.report.caveats import find_caveats
from voidprune.report.figures import show
from voidprune.report.findings import Findings, collect_findings
from voidprune.report.healing import describe_healing
from voidprune.report.layers import draw_layers, rank_layers
from voidprune.report.provenance import list_commands, list_missing, list_provenance
from voidprune.report.sizes import measure_parts
from voidprune.report.summary import describe_run, format_layers, make_cards, whole_runner
from voidprune.report.timings import read_timings
from voidprune.report.trade_offs import explain_panels, has_accuracy, make_panels, panels_document

KIND, VERSION = "report", 1


@dataclass(frozen=True)
class Report:
    """`page` is HTML without external requests, `document` a `voidprune.report/1` of the same facts, `pictures` by name.

    `left_out` are the caveats about files that are in the folder and not in the report.
    """

    page: str
    document: artifacts.Document
    pictures: dict[str, plots.Drawing]
    left_out: tuple[str, ...] = ()


def render_report(folder: Path) -> str:
    """The page alone. Raises ArtifactError."""
    return make_report(folder).page


def write_report(
    folder: Path,
    output: Path,
    *,
    pictures: Path | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _sentence: None,
) -> list[Path]:
    """Write the page, its twin beside it with the suffix .json, and with `pictures` each picture into that folder, as SVG and PNG.

    Returns the files; `tell` gets a sentence for whatever of the folder was left out. Raises
    ArtifactError, OutputError, and with `pictures` MissingExtraError without matplotlib; nothing is written then.
    """
    if output.suffix == ".json":
        raise OutputError(
            f"{output} is to be a page, which has its JSON beside it", hint="give a name that ends in .html"
        )
    report = make_report(folder)
    files = {output: report.page.encode(), output.with_suffix(".json"): artifacts.canonical_bytes(report.document)}
    if pictures is not None:
        for name, drawing in report.pictures.items():
            files[pictures / f"{name}.svg"] = plots.paint_svg(drawing).encode()
            files[pictures / f"{name}.png"] = plots.paint_png(drawing)
    for file in files:
        artifacts.check_output_file(file, overwrite=overwrite)
    for sentence in report.left_out:
        tell(sentence)
    for file, content in files.items():
        artifacts.write_file(file, content, overwrite=overwrite)
    return list(files)


def make_report(folder: Path) -> Report:
    """Everything there is to say of a folder. Raises ArtifactError where nothing in it is ours."""
    findings = collect_findings(folder)
    schedule, profile = findings.schedule, findings.profile
    known = schedule or profile
    documents = [one for one in (findings.comparison, findings.probe) if one is not None]
    model = known.model.name if known is not None else documents[0]["model"]["name"] if documents else "model"
    cards, caveats = make_cards(findings), find_caveats(findings)
    panels, accuracy = make_panels(findings), has_accuracy(findings)
    sizes, healing = measure_parts(findings), describe_healing(findings.manifest)
    seed = schedule.origin.get("seed", 0) if schedule is not None else 0
    layers = None
    if known is not None:
        layers = rank_layers(profile, known.model.num_layers, seed=seed if isinstance(seed, int) else 0)
    commands, about_commands = list_commands(findings)

    pictures: dict[str, plots.Drawing] = {}
    if layers is not None:
        pictures["layers"] = draw_layers(layers, schedule, model=model)
    if panels:
        pictures["trade-offs"] = draw_trade_offs(panels, model=model, accuracy=accuracy)
    if findings.probe is not None:
        pictures["probe"] = draw_probe(findings.probe)
    if sizes.bars:
        pictures["sizes"] = draw_size_bars(sizes.bars, model=model)

    missing, told = list_missing(findings), list_provenance(findings)
    facts = {
        "model": model,
        "title": _title(findings, model),
        "paragraph": describe_run(findings),
        "caveats": caveats,
        "commands": commands,
        "about_commands": about_commands,
        "recipe": "" if findings.record is None else findings.record.recipe,
    }
    inline = {name: plots.paint_inline(drawing, name=name) for name, drawing in pictures.items()}
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            **facts,
            missing=missing,
            provenance=told,
            files=findings.files,
            findings=findings,
            cards=cards,
            strip=plots.paint_inline(draw_strip(schedule), name="strip") if schedule is not None else "",
            inline=inline,
            widths={name: round(drawing.width) for name, drawing in pictures.items()},
            panels=[
                plots.paint_inline(draw_panel(panel, accuracy=accuracy), name=f"panel-{panel.scope}")
                for panel in panels
            ],
            legend=plots.paint_inline(draw_legend(legend_entries(panels), width=760), name="legend") if panels else "",
            about_panels=explain_panels(findings, panels),
            sizes=sizes,
            healing=healing,
            timings=None if findings.benchmark is None else read_timings(findings.benchmark),
            whole=None if findings.evaluation is None else whole_runner(findings.evaluation),
            version=voidprune.__version__,
            stylesheet=plots.stylesheet(),
        )
    )
    document: artifacts.Document = {
        "schema": artifacts.schema_key(KIND, VERSION),
        **facts,
        "missing": [{"what": what, "command": command} for what, command in missing],
        "provenance": [{"what": what, "value": value} for what, value in told],
        "files": dict(findings.files),
        "figures": [card.to_document() for card in cards],
        "schedule": None if schedule is None else schedule.to_document(),
        "layers": None if layers is None else layers.to_document(),
        "trade_offs": panels_document(panels, accuracy=accuracy) if panels else None,
        "sizes": sizes.to_document(),
        "healing": None if healing is None else healing.to_document(),
        "evaluation": findings.evaluation,
        "benchmark": findings.benchmark,
        "comparison": findings.comparison,
        "probe": findings.probe,
        "harness": findings.harness,
        "adaptive": findings.adaptive,
        "written_by": f"voidprune {voidprune.__version__}",
    }
    return Report(page, document, pictures, findings.left_out)


def _title(findings: Findings, model: str) -> str:
    schedule = findings.schedule
    if schedule is None:
        return f"{model}: what was measured"
    return f"{model}, whole" if schedule.is_full else f"{model} with fewer layers"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("voidprune", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "points": _points, "layers": format_layers}
    return environment


def _points(share: float) -> str:
    return f"{share * 100:+.1f}"
