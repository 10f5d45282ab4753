"""A comparison that was asked for: its bounds, and that it goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_plan import FEW
from voidprune.errors import BudgetError
from voidprune.pipeline.compare import CompareRequest, compare_model
from voidprune.pipeline.models import open_model
from voidprune.pipeline.plan import Calibrated, make_profile
from voidprune.pipeline.progress import untracked

TEXTS = "\n\n".join(f"{number}, 4 and 9, sorted from smallest to largest" for number in range(20, 24))


@pytest.mark.parametrize("keeps", [(0.0,), (0.5, 1.0), (float("nan"),), (-1.0,)])
def test_shares_that_leave_nothing_to_compare_are_refused(keeps: tuple[float, ...]) -> None:
    with pytest.raises(BudgetError, match=r"outside of \(0, 1\)"):
        CompareRequest(keeps=keeps)


def test_a_comparison_that_was_stopped_goes_on_to_the_same_end(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = open_model("demo")
    profile = make_profile(FEW, checkpoint, untracked)

    (data := tmp_path_factory.mktemp("data") / "texts.txt").write_text(TEXTS)
    few = Calibrated(dataset=str(data), responses="dataset", device="cpu")
    request = CompareRequest(keeps=(0.9,), scopes=("prefill",), search_evaluations=0, calibrated=few)

    def compare(output: Path, **settings: Any) -> Any:
        return compare_model(request, checkpoint, profile=profile, output=output, **settings)

    left = 7

    @contextmanager
    def stop(what: str, _total: int | None, _unit: str) -> Iterator[Any]:
        def advance(_amount: int) -> None:
            nonlocal left
            left -= what.startswith("searching")
            if not left:
                raise KeyboardInterrupt

        yield advance

    whole = compare(tmp_path / "whole.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "stopped.json", track=stop)
    partial = tmp_path / "stopped.json.partial"
    assert len(partial.read_bytes().splitlines()) > 3
    assert compare(tmp_path / "stopped.json") == whole
    assert not list(tmp_path.iterdir())
