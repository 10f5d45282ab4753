"""Items by the name that a user gives them: a task of the demo, all of its tasks, capitals, or a file."""

from __future__ import annotations

from pathlib import Path

from voidprune.demo.tasks import TASKS, make_items
from voidprune.errors import DatasetError
from voidprune.profiling.calibration import Row, capital_rows, read_rows

NUM_ITEMS = 100  # of each generated task, unless told


def task_rows(tasks: str, *, num_items: int, split: str = "evaluation") -> list[Row]:
    """Rows of the demo's tasks: "demo" for all of them, or one by its name."""
    chosen = list(TASKS) if tasks == "demo" else [tasks]
    return [
        Row(
            place=f"{task}, item {number}",
            messages=({"role": "user", "content": item.prompt},),
            response=item.response,
            answer=item.answer,
            group=task,
        )
        for task in chosen
        for number, item in enumerate(make_items(task, split=split, num_items=num_items))
    ]


def find_rows(name: str, *, num_items: int | None = None, split: str = "evaluation") -> list[Row]:
    """Rows of generated tasks (`num_items` of each), or the first `num_items` of capitals or of a file. Raises DatasetError."""
    if name == "capitals":
        return capital_rows()[:num_items]
    if name in ("demo", *TASKS):
        return task_rows(name, num_items=num_items or NUM_ITEMS, split=split)
    if not Path(name).exists():
        raise DatasetError(
            f"there is no task or file {name}", hint=f"give a file, demo, capitals, or one of {', '.join(TASKS)}"
        )
    return read_rows(Path(name))[:num_items]


def dataset_name(name: str) -> str:
    """How results call what `find_rows` reads: a task by its name, a file without its folder."""
    return name if name in ("demo", "capitals", *TASKS) else Path(name).name
