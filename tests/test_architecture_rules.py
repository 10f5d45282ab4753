"""The house has floors: a lower room may import a higher one, never the reverse. Read from the source, not from a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import voidprune

ROOT = Path(voidprune.__file__).parent

# From top to bottom, as in the design. Rooms of one row may import each other.
ROWS: list[set[str]] = [
    {"errors"},
    {"artifacts"},
    {"journal"},
    {"schedule"},
    {"models"},
    {"profiling"},
    {"execution"},
    {"planning"},
    {"export"},
    {"quality"},
    {"healing"},
    {"demo"},  # besides what `test_demo_...` says of it
    {"recipe", "pipeline"},
    {"walkthrough"},
    {"tables", "plots", "report", "doctor"},
    {"cli"},
    {"__main__"},
]
RANKS = {room: rank for rank, row in enumerate(ROWS) for room in row}

# Planning and exporting work on a machine that has neither.
HEAVY = ("torch", "transformers")
LIGHT_ROOMS = (
    "errors",
    "artifacts",
    "journal",
    "schedule",
    "models",
    "planning",
    "export",
    "tables",
    "plots",
    "report",
    "doctor",
    "cli",
)
LIGHT_MODULES = (
    "execution.session",
    "execution.generation",
    "execution.providers",
    "execution.device_weights",
    "execution.integrity",
    "execution.sampling",
    "execution.manifest",
    "execution.packing_record",
    "profiling.profile",
    "profiling.calibration",
    "pipeline.plan",
)
# `objectives` runs models, so it is not among them.
EXCEPTIONS = ("planning.objectives",)


def modules() -> dict[str, Path]:
    """Dotted name below `voidprune` -> file; the package itself is ""."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it: dotted names below `voidprune`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("voidprune").lstrip(".") for name in found if name.split(".")[0] == "voidprune"}
    return {name for name in ours if name in MODULES and name}


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_module_imports_nothing_from_below(module: str) -> None:
    assert room_of(module) in RANKS, f"{module} is in no room of the design; give it a row here and there"
    for imported in imported_modules(MODULES[module]):
        assert RANKS[room_of(imported)] <= RANKS[room_of(module)], f"{module} imports {imported}, which is below it"


def test_package_itself_imports_nothing_of_ours() -> None:
    assert imported_modules(MODULES[""]) == set()


def test_demo_is_imported_at_the_edge_only() -> None:
    for module, path in MODULES.items():
        if room_of(module) not in ("demo", "pipeline", "cli"):
            assert not {name for name in imported_modules(path) if room_of(name) == "demo"}, module


def test_demo_knows_nothing_of_pruning() -> None:
    for module, path in MODULES.items():
        if room_of(module) == "demo":
            rooms = {room_of(name) for name in imported_modules(path)}
            assert rooms <= {"demo", "errors", "artifacts"}, f"{module} imports {sorted(rooms)}"


def test_imports_are_no_circle() -> None:
    """Within a row, too: following imports never leads back."""
    graph = {module: imported_modules(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"imports go round: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_planning_and_exporting_import_neither_torch_nor_transformers() -> None:
    light = [
        f"voidprune.{name}"
        for name in MODULES
        if (room_of(name) in LIGHT_ROOMS or name in LIGHT_MODULES) and name not in EXCEPTIONS
    ]
    script = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    for heavy in {HEAVY!r}:
        if heavy in sys.modules:
            sys.exit(f"{{name}} imports {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(light) >= 12


def test_tests_mirror_modules() -> None:
    """A test file has the name and the place of what it tests."""
    tests = Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        name = ".".join((*path.relative_to(tests).parts[:-1], path.stem.removeprefix("test_")))
        if name in ("architecture_rules", "documentation", "readme"):
            continue
        if (ROOT / Path(*name.split("."))).is_dir():  # a folder of data, such as the demo model
            continue
        assert name in MODULES, f"{path.relative_to(tests)} tests no module of that name"
