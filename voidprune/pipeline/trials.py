"""A model and items to try schedules on: one half to choose by, the other to judge what was chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from voidprune.errors import DatasetError, ModelError
from voidprune.execution.rescoring import Likelihoods, Rescorer
from voidprune.journal import Journal
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.models.sizes import ModelSizes
from voidprune.pipeline.progress import Track, untracked
from voidprune.planning.objectives import Grader, Grades, LossObjective, TaskObjective, group_samples
from voidprune.profiling.calibration import Row, Sample, encode_rows, fingerprint_samples, require_responses
from voidprune.profiling.tracing import generate_responses
from voidprune.quality.metrics import answer_of
from voidprune.schedule import Schedule


@dataclass(frozen=True)
class Trials:
    """What schedules are tried on. `choosing` and `judging` are disjoint samples with responses of the same kind.

    `asks` says whether every sample has an answer to be checked.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    sizes: ModelSizes
    choosing: tuple[Sample, ...]
    judging: tuple[Sample, ...]
    whole: Schedule
    end_tokens: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    asks: bool

    @property
    def groups(self) -> dict[str, list[int]]:
        """Indices of the judging samples, by task."""
        return group_samples(self.judging)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge(self, self.judging)

    def objective(self, name: str, *, journal: Journal | None = None) -> LossObjective:
        """What a search minimises on the choosing half: "loss" or "task". Raises DatasetError where answers are missing."""
        rescorer = Rescorer(self.model, self.choosing, self.whole, batch_size=self.batch_size)
        if name == "loss":
            return LossObjective(rescorer, journal=journal)
        return TaskObjective(rescorer, self.grader(rescorer), journal=journal)

    def grader(self, rescorer: Rescorer) -> Grader:
        tokenizer = load_tokenizer(self.checkpoint.folder)

        def is_right(sample: Sample, tokens: Sequence[int]) -> bool:
            return answer_of(str(tokenizer.decode(list(tokens), skip_special_tokens=True))) == sample.answer

        return Grader(
            self.model,
            rescorer,
            is_right,
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.end_tokens,
            batch_size=4 * self.batch_size,
        )

    @property
    def key(self) -> dict[str, str | int]:
        """All that determines what a search finds, for its journal."""
        return {
            "model": self.checkpoint.identity.fingerprint,
            "samples": fingerprint_samples(self.choosing),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "boundary": str(self.whole.boundary),
            "dtype": str(self.model.dtype),
        }


class Judge:
    """Grades of schedules on samples, each schedule graded once."""

    def __init__(self, trials: Trials, samples: Sequence[Sample]) -> None:
        self._rescorer = Rescorer(trials.model, samples, trials.whole, batch_size=trials.batch_size)
        self._grader = trials.grader(self._rescorer) if trials.asks else None
        self._grades: dict[tuple[object, ...], Grades] = {}

    def measure(self, schedule: Schedule) -> Likelihoods:
        """The likelihoods alone, without any generation."""
        return self._rescorer.measure(schedule)

    def grade(self, schedule: Schedule) -> Grades:
        key = (schedule.prefill, schedule.decode)
        if key not in self._grades:
            self._grades[key] = (
                Grades(self._rescorer.measure(schedule), None) if self._grader is None else self._grader.grade(schedule)
            )
        return self._grades[key]


def open_trials(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    judging_rows: Sequence[Row] | None,
    *,
    whole: Schedule,
    sizes: ModelSizes,
    judges: bool = True,
    responses: str = "generate",
    max_new_tokens: int = 64,
    max_length: int | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    device: str | None = None,
    track: Track = untracked,
) -> Trials:
    """Load a model and samples. Without `judging_rows`, every second sample of each group is put aside for judging.

    Where nothing is to be judged (`judges` False), all samples are there to choose by.

    `responses` is "generate" (the whole model answers) or "dataset". `whole` is the unpruned schedule, with the boundary that
    is to be used, `sizes` those of the precision that is to be shipped. Raises ModelError, DatasetError, RuntimeProviderError.
    """
    device = device or default_device()
    dtype = dtype or ("bf16" if device.startswith("cuda") else "fp32")
    ends = end_tokens(checkpoint.folder)
    context = checkpoint.architecture.context_length
    longest = min(max_length or context, context) - (max_new_tokens if responses == "generate" else 0)
    if longest < 2:
        raise ModelError(
            f"responses of {max_new_tokens} tokens leave no room for prompts in a context of {context}",
            hint="lower --max-new-tokens",
        )
    tokenizer = load_tokenizer(checkpoint.folder)
    model = load_model(checkpoint.folder, dtype=dtype, device=device)

    def prepare(some_rows: Sequence[Row], what: str) -> list[Sample]:
        if responses == "generate":
            some_rows = [replace(row, response=None) for row in some_rows]
        samples = encode_rows(some_rows, tokenizer, end_tokens=ends, max_length=longest)
        if responses == "dataset":
            require_responses(samples)
            return samples
        with track(f"answering, {what}", len(samples), "samples") as advance:
            return generate_responses(
                model,
                samples,
                max_new_tokens=max_new_tokens,
                end_tokens=ends,
                batch_size=batch_size,
                on_progress=lambda num_samples, _num_tokens: advance(num_samples),
            )

    choosing = prepare(rows, "to choose")
    judging: list[Sample] = []
    if judges and judging_rows is None:
        choosing, judging = _halve(choosing)
    elif judges:
        judging = prepare(judging_rows or (), "to judge")
    judging = _without(judging, choosing)
    if not choosing or (judges and not judging):
        raise DatasetError("there are too few samples to choose by some and judge by others", hint="give at least two")
    answered = [sample.answer is not None for sample in (*choosing, *judging)]
    return Trials(
        checkpoint=checkpoint,
        model=model,
        sizes=sizes,
        choosing=tuple(choosing),
        judging=tuple(judging),
        whole=whole,
        end_tokens=ends,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        asks=all(answered),
    )


def _halve(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every second sample of each group, and the others."""
    seen: dict[str, int] = {}
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        number = seen.get(sample.group, 0)
        seen[sample.group] = number + 1
        halves[number % 2].append(sample)
    return halves


def _without(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """The samples whose prompts are not among the others': what is judged was never chosen by."""
    prompts = {sample.prompt for sample in others}
    return [sample for sample in samples if sample.prompt not in prompts]
