"""Quality that a model must have to pass: least scores, and how much perplexity may grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voidprune.errors import DatasetError, ModelError, QualityGateError
from voidprune.models.checkpoint import Checkpoint, open_checkpoint
from voidprune.pipeline.evaluation import EvaluationReport, evaluate_checkpoint
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row


@dataclass(frozen=True)
class Gates:
    """What is asked for. Measured figures are compared as they are, without their intervals.

    `min_scores` are least accuracies by task, `min_score` that of every task which has none of its own; `max_ppl_ratio` is the
    largest perplexity of given responses, as a multiple of the whole model's.
    """

    min_scores: Mapping[str, float] = field(default_factory=dict)
    min_score: float | None = None
    max_ppl_ratio: float | None = None

    def __bool__(self) -> bool:
        return bool(self.min_scores) or self.min_score is not None or self.max_ppl_ratio is not None

    def check_rows(self, rows: Sequence[Row], *, has_whole: bool) -> None:
        """Say before hours of work that a gate could not be measured. Raises DatasetError, ModelError."""
        self.check_tasks(list(dict.fromkeys(row.group for row in rows if row.answer is not None)))
        if self.max_ppl_ratio is None:
            return
        if not any(row.response is not None or row.text is not None for row in rows):
            raise DatasetError("no item has a response, so there is no perplexity", hint="leave --max-ppl-ratio out")
        if not has_whole:
            raise ModelError(
                "the perplexity ratio is to the whole model, and only one model is evaluated",
                hint="give --baseline for a bundle, --schedule for a whole model",
            )

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Raise DatasetError where a score is asked for that none of `tasks`, those with a score, has."""
        for task in self.min_scores:
            if task not in tasks:
                raise DatasetError(
                    f"the task {task} has no score", hint=f"tasks with a score: {', '.join(tasks) or 'none'}"
                )
        if self.min_score is not None and not tasks:
            raise DatasetError("no task has a score", hint="leave --min-score out")

    def check(self, report: EvaluationReport, *, consequence: str = "") -> None:
        """Raise QualityGateError with every gate that the judged runner misses. `consequence` is told in the hint."""
        comparison = report.compare(report.judged)
        ratio = None if comparison is None else comparison.perplexity_ratio
        missed = self._missed_scores(
            {task: accuracy.share for task, accuracy in report.evaluations[report.judged].accuracy.items()}
        )
        if self.max_ppl_ratio is not None:
            assert ratio is not None, "check_rows has refused it"
            if not ratio.value <= self.max_ppl_ratio:
                missed.append(
                    f"perplexity is {ratio.value:.4f} times that of the whole model, asked is at most {self.max_ppl_ratio:g}"
                )
        _refuse(missed, f"{report.model} ({report.judged})", consequence)

    def check_scores(self, scores: Mapping[str, float], *, what: str) -> None:
        """The same for scores by task alone. Raises DatasetError too, where a task that a gate names has none."""
        self.check_tasks(list(scores))
        _refuse(self._missed_scores(scores), what, "")

    def _missed_scores(self, scores: Mapping[str, float]) -> list[str]:
        missed = []
        for task, score in scores.items():
            asked = self.min_scores.get(task, self.min_score)
            if asked is not None and not score >= asked:
                missed.append(f"{task} scores {score:.4f}, asked is at least {asked:g}")
        return missed


def _refuse(missed: Sequence[str], what: str, consequence: str) -> None:
    if missed:
        raise QualityGateError(
            f"{what} misses its gate: {'; '.join(missed)}",
            hint=f"{consequence}; {QualityGateError.usual_hint}" if consequence else None,
        )


def gate_bundle(
    gates: Gates,
    rows: Sequence[Row],
    *,
    dataset: str,
    source: Checkpoint,
    on_report: Callable[[EvaluationReport], None] = lambda _report: None,
    provider: str | None = None,
    track: Track = untracked,
) -> Callable[[Path], None]:
    """What an export asks of the staged folder before it publishes it: the function raises QualityGateError.

    `on_report` gets what was measured, whether the gates are met or not. The whole model, `source`, runs beside the bundle only
    where a gate needs it.
    """
    gates.check_rows(rows, has_whole=True)

    def check(stage: Path) -> None:
        report = evaluate_checkpoint(
            open_checkpoint(stage, name=source.name),
            rows,
            dataset=dataset,
            baseline=source if gates.max_ppl_ratio is not None else None,
            provider=provider,
            track=track,
        )
        on_report(report)
        gates.check(report, consequence="nothing was published")

    return check
