"""Lists that transformers makes up: each rule by hand. That they are transformers' rules is tested with the families."""

from __future__ import annotations

from typing import Any

import pytest

from voidprune.errors import ModelError
from voidprune.models.layer_lists import FULL, SLIDING, AndNotEveryNth, EveryNth, FromThreshold, WhereZero

ROTATED = EveryNth("interval", nth=0, other=1)
WINDOWS = FromThreshold("first", switches=("on", "window"))


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        (EveryNth(2), {}, [SLIDING, FULL, SLIDING, FULL, SLIDING]),
        (EveryNth("period"), {"period": 3}, [SLIDING, SLIDING, FULL, SLIDING, SLIDING]),
        (ROTATED, {"interval": 4}, [1, 1, 1, 0, 1]),
        (WINDOWS, {"first": 3, "on": True, "window": 9}, [FULL, FULL, FULL, SLIDING, SLIDING]),
        (WINDOWS, {"first": 3, "on": True, "window": None}, [FULL] * 5),
        (WINDOWS, {"first": 3, "on": False, "window": 9}, [FULL] * 5),
        (WINDOWS, {"first": 0, "on": True, "window": 9}, [SLIDING] * 5),
        (WhereZero("other", ROTATED, ("on",)), {"interval": 2, "on": True}, [FULL, SLIDING, FULL, SLIDING, FULL]),
        (WhereZero("other", ROTATED, ("on",)), {"interval": 2, "on": False}, [FULL] * 5),
        (
            WhereZero("other", ROTATED, ("on",)),
            {"other": [0, 1, 1, 1, 0], "on": True},
            [SLIDING, FULL, FULL, FULL, SLIDING],
        ),
        (AndNotEveryNth("step"), {"step": 1}, []),
        (AndNotEveryNth("step"), {"step": 2}, [0, 2, 4]),
        (AndNotEveryNth("step"), {"step": 2, "list": [1, 2]}, [0, 1, 2, 4]),
    ],
)
def test_rules(rule: Any, fields: dict[str, Any], expected: list[Any]) -> None:
    assert rule.complete("list", fields.get, 5) == expected


@pytest.mark.parametrize("rule", [EveryNth(2), WINDOWS, WhereZero("other", ROTATED, ())])
def test_a_list_that_is_written_counts(rule: Any) -> None:
    written = [FULL, FULL, SLIDING]
    assert rule.complete("layer_types", {"layer_types": written}.get, 3) == written
    for wrong in (written[:2], "full", 3, [FULL, FULL, "linear_attention"]):
        with pytest.raises(ModelError, match=r"layer_types in config\.json"):
            rule.complete("layer_types", {"layer_types": wrong}.get, 3)


@pytest.mark.parametrize("period", [0, -1, None, "LLLG", 2.5, True])
def test_period_that_is_none(period: Any) -> None:
    with pytest.raises(ModelError, match=r"pattern in config\.json is"):
        EveryNth("pattern").complete("layer_types", {"pattern": period}.get, 4)


@pytest.mark.parametrize("listed", ["3", [1.5], ["1"], {"1": 1}])
def test_layer_numbers_that_are_none(listed: Any) -> None:
    with pytest.raises(ModelError, match=r"dense in config\.json is no list of layer numbers"):
        AndNotEveryNth("step").complete("dense", {"step": 1, "dense": listed}.get, 4)


@pytest.mark.parametrize("first", [-1, "3", None, 1.5])
def test_threshold_that_is_none(first: Any) -> None:
    with pytest.raises(ModelError, match=r"first in config\.json is"):
        WINDOWS.complete("layer_types", {"first": first, "on": True, "window": 4}.get, 4)
