"""Pictures: the same bytes from the same document, every criterion told apart."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from voidprune import artifacts
from voidprune.planning.criteria import CRITERIA
from voidprune.plots import paint_svg, plot_comparison

NAMES = [*CRITERIA, "search-loss", "search-task"]


def quality(loss: float, share: float | None) -> artifacts.Document:
    accuracy = None
    if share is not None:
        tasks = {"sorting": share, "yes-no": share}
        accuracy = {task: {"share": one, "num_items": 4, "drop_upper": 0.5} for task, one in tasks.items()}
    return {"loss": loss, "perplexity_ratio": 1.0 + loss, "perplexity_ratio_upper": 2.0, "accuracy": accuracy}


def costs(share: float) -> artifacts.Document:
    names = ("weight_bytes", "kv_bytes_per_token", "prefill_flops", "decode_bytes")
    return {name: int(1000 * share) for name in names}


def make_comparison(*, asked: bool = True) -> artifacts.Document:
    """A comparison of every criterion at two budgets of two scopes, in the form that `comparison_document` writes."""
    rows = [
        {
            "scope": scope,
            "keep": keep,
            "criterion": name,
            "prefill": ["full", "skip"],
            "decode": ["full", "skip"],
            "costs": costs(keep),
            **quality(1.0 + number / 10, keep - number / 50 if asked else None),
            "margin": [0.1, 0.05, 0.15] if number == 0 else None,
        }
        for scope in ("bytes", "prefill")
        for keep in (0.75, 0.5)
        for number, name in enumerate(NAMES)
    ]
    return {
        "schema": "voidprune.comparison/2",
        "model": {"name": "<tiny>", "model_type": "llama", "num_layers": 2, "fingerprint": "sha256:abc"},
        "dataset": "demo",
        "num_choosing": 4,
        "num_judging": 8,
        "measure": "accuracy" if asked else "loss",
        "whole": {"costs": costs(1), **quality(0.5, 1.0 if asked else None)},
        "rows": rows,
        "written_by": "voidprune",
    }


@pytest.mark.parametrize("asked", [True, False])
def test_the_same_document_gives_the_same_picture(asked: bool) -> None:
    document = make_comparison(asked=asked)
    first = paint_svg(plot_comparison(document))
    assert paint_svg(plot_comparison(document)) == first
    ElementTree.fromstring(first)  # well formed, though the name of the model holds a <
    for text in (*NAMES, "bytes of the checkpoint", "arithmetic of the prompt"):
        assert text in first
    assert ("mean accuracy" if asked else "perplexity, multiple") in first
    assert not re.search(r"20\d\d-\d\d-\d\d", first), "nothing of it is the date"
