"""How much energy the processor or the card has used, by its own counter. None where there is none, or where it may not be read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")
"""Where Linux shows the counters of the processor's packages (Documentation/power/powercap/powercap.rst)."""


@dataclass(frozen=True)
class EnergyMeter:
    """`source` says whose energy it is, `joules` reads the counter: differences are meant, of all that ran in between."""

    source: str
    joules: Callable[[], float]


def find_energy_meter(provider: str, *, packages: Path = RAPL) -> EnergyMeter | None:
    """The meter of what a provider runs on."""
    return _card_meter() if provider == "cuda" else _package_meter(packages)


def _package_meter(folder: Path) -> EnergyMeter | None:
    """All packages of the processor together. Their counters are read by root alone on most systems."""
    counters = []
    for package in sorted(folder.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") > 1:  # a part of a package, which is counted with it
            continue
        try:
            limit = int((package / "max_energy_range_uj").read_text())
            counters.append(_Counter(package / "energy_uj", limit))
        except (OSError, ValueError):
            return None
    return EnergyMeter("processor", lambda: sum(counter.joules() for counter in counters)) if counters else None


class _Counter:
    """A counter of microjoules that starts again at its limit."""

    def __init__(self, file: Path, limit: int) -> None:
        self._file, self._limit = file, limit
        self._before, self._turns = self._read(), 0

    def joules(self) -> float:
        now = self._read()
        self._turns += now < self._before
        self._before = now
        return (self._turns * self._limit + now) / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def _card_meter() -> EnergyMeter | None:
    """NVML's count of millijoules since the driver was loaded, of the first card (nvmlDeviceGetTotalEnergyConsumption)."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    card, count = ctypes.c_void_p(), ctypes.c_ulonglong()

    def read() -> int:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(card, ctypes.byref(count)))

    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(card)) or read():
        return None

    def joules() -> float:
        read()
        return count.value / 1e3

    return EnergyMeter("card", joules)
