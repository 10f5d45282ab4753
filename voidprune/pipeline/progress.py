"""How steps report progress, so that nothing here knows about terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Track = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""`with track(what, total, unit) as advance: advance(n)`; the total is None where it is not known beforehand."""


@contextmanager
def untracked(_what: str, _total: int | None, _unit: str) -> Iterator[Advance]:
    yield lambda _amount: None
