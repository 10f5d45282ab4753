"""`voidprune compare`: what to compare, and the comparison as a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from voidprune import artifacts
from voidprune.errors import BudgetError
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.sizes import measure_sizes
from voidprune.pipeline.comparison import SCOPES, compare_criteria, comparison_document
from voidprune.pipeline.plan import Calibrated, make_profile, open_trials_for
from voidprune.pipeline.progress import Track, untracked
from voidprune.pipeline.tasks import dataset_name
from voidprune.profiling.profile import Profile
from voidprune.schedule import full_schedule


@dataclass(frozen=True)
class CompareRequest:
    """Keep ratios, what is held equal, and which searches join the rankings. Raises BudgetError at a ratio outside of (0, 1)."""

    keeps: tuple[float, ...]
    scopes: tuple[str, ...] = tuple(SCOPES)
    searches: tuple[str, ...] = ("loss",)
    search_evaluations: int | None = None
    seed: int = 0
    calibrated: Calibrated = Calibrated()  # noqa: RUF009  a frozen value

    def __post_init__(self) -> None:
        for keep in self.keeps:
            if not 0 < keep < 1:
                raise BudgetError(f"a keep ratio of {keep:g} is outside of (0, 1)", hint="--keep 0.75,0.5")


def compare_model(
    request: CompareRequest,
    checkpoint: Checkpoint,
    *,
    profile: Profile | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> artifacts.Document:
    """Compare on one model. Searches keep what they have done beside `output`. Raises every VoidpruneError of the way."""
    if profile is None:
        profile = make_profile(request.calibrated, checkpoint, track)
    whole = full_schedule(checkpoint.identity)
    trials = open_trials_for(request.calibrated, checkpoint, whole, sizes=measure_sizes(checkpoint), track=track)
    with Journal(output, key={**trials.key, "compare": True}, overwrite=overwrite) as journal:
        entries = compare_criteria(
            trials,
            profile,
            keeps=request.keeps,
            scopes=request.scopes,
            searches=request.searches,
            max_evaluations=request.search_evaluations,
            seed=request.seed,
            journal=journal,
            track=track,
        )
        document = comparison_document(trials, entries, dataset=_dataset_name(request.calibrated))
        journal.remove()
    return document


def _dataset_name(calibrated: Calibrated) -> str:
    return "built-in prompts" if calibrated.dataset is None else dataset_name(calibrated.dataset)
