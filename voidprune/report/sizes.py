"""What the bytes are spent on: embedding, layers that stay, layers that go, head, and the cache."""

from __future__ import annotations

from dataclasses import dataclass

from voidprune import artifacts, tables
from voidprune.plots.size_bars import Bar, Part
from voidprune.report.figures import Figure
from voidprune.report.findings import Findings
from voidprune.report.summary import find_costs


@dataclass(frozen=True)
class SizeFacts:
    """`bars` of the whole model and the pruned one; `costs` are predicted; `files` of the export as (name, bytes)."""

    bars: tuple[Bar, ...]
    costs: tuple[Figure, ...]
    files: tuple[tuple[str, int], ...]

    def to_document(self) -> artifacts.Document:
        return {
            "parts": {
                bar.name: [{"kind": part.kind, "name": part.name, "bytes": part.bytes} for part in bar.parts]
                for bar in self.bars
            },
            "costs": [figure.to_document() for figure in self.costs],
            "files": [{"name": name, "bytes": size} for name, size in self.files],
        }


def measure_parts(findings: Findings) -> SizeFacts:
    """Sizes are those of the profile: of the model as it is stored. Parts of no bytes are left out."""
    return SizeFacts(_bars(findings), _costs(findings), _files(findings))


def _bars(findings: Findings) -> tuple[Bar, ...]:
    if findings.profile is None:
        return ()
    sizes, schedule = findings.profile.sizes, findings.schedule
    # Without the head nearly nothing is left where it is tied: then it is stored as the embedding.
    rest = sizes.other_bytes - sizes.head_bytes
    is_tied = rest < sizes.head_bytes / 2
    union = range(len(sizes.layers)) if schedule is None else schedule.union
    kept = sum(sizes.layers[layer].total_bytes for layer in union)
    dropped = sum(layer.total_bytes for layer in sizes.layers) - kept

    def bar(name: str, layers: list[tuple[str, str, int]]) -> Bar:
        embedding = (
            ("embedding", "embedding, which is the head", sizes.other_bytes)
            if is_tied
            else ("embedding", "embedding", rest)
        )
        head = [] if is_tied else [("head", "head", sizes.head_bytes)]
        found = [embedding, *layers, *head]
        return Bar(name, tuple(Part(*part, tables.format_bytes(part[2])) for part in found if part[2]))

    whole = bar("whole model", [("kept", f"{len(sizes.layers)} layers", kept + dropped)])
    if schedule is None:
        return (whole,)
    gone = len(sizes.layers) - len(union)
    return (
        whole,
        bar("this schedule", [("kept", f"{len(union)} layers", kept), ("dropped", f"{gone} dropped", dropped)]),
    )


def _costs(findings: Findings) -> tuple[Figure, ...]:
    found = find_costs(findings)
    if found is None:
        return ()
    whole, pruned = found
    rows = (
        ("weight_bytes", "weights", "bytes"),
        ("kv_bytes_per_token", "K/V cache, a token", "bytes"),
        ("prefill_flops", "prompt of 512 tokens, arithmetic", "flops"),
        ("decode_bytes", "read for a token after 512", "bytes"),
    )
    return tuple(Figure(key, label, unit, getattr(pruned, key), getattr(whole, key)) for key, label, unit in rows)


def _files(findings: Findings) -> tuple[tuple[str, int], ...]:
    if findings.manifest is None:
        return ()
    return tuple(sorted(findings.manifest.sizes.items(), key=lambda entry: (-entry[1], entry[0])))
