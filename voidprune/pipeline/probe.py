"""Every intervention at every depth on the same items: how much is lost, and from which depth on nothing is.

Items with an answer count right or wrong, by generation, or by the likeliest choice where there are choices; others by the
perplexity of their response, given or the whole model's own. A greedy response that an intervention leaves the most likely at every
token is not generated again; one that is generated ends at twice the length of the whole model's longest in its task, right or not.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import voidprune
from voidprune import artifacts
from voidprune.errors import ArtifactError, DatasetError, ModelError
from voidprune.journal import Journal
from voidprune.pipeline.adaptive import Subject
from voidprune.pipeline.progress import Track, untracked
from voidprune.profiling.calibration import Row, Sample, fingerprint_samples
from voidprune.profiling.probing import (
    Donation,
    Intervention,
    Probe,
    ProbedModel,
    Scope,
    find_donations,
    probed,
)
from voidprune.profiling.tracing import generate_responses
from voidprune.quality.metrics import answer_of, best_choice
from voidprune.quality.noninferiority import Loss, accuracy_loss, num_items_needed, perplexity_loss
from voidprune.quality.statistics import estimate_ratio, estimate_share, exponential
from voidprune.schedule import ModelIdentity

KIND, VERSION = "probe", 1
MAX_NEW_TOKENS = {"capitals": 12}
"""Longest responses to tasks whose answers are short, but which a base model may not end."""


@dataclass(frozen=True)
class ProbeSettings:
    """What is tried. `depths` None are all of them; `margin` is what may be lost, of the whole model's accuracy or perplexity."""

    interventions: tuple[Intervention, ...] = tuple(Intervention)
    scopes: tuple[Scope, ...] = (Scope.PROMPT,)
    depths: tuple[int, ...] | None = None
    margin: float = 0.01
    max_new_tokens: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.interventions
        assert self.scopes
        assert 0 < self.margin < 1

    @property
    def curves(self) -> tuple[tuple[Intervention, Scope], ...]:
        """What gives a curve of its own: where scopes are the same, the first one."""
        return tuple(
            (intervention, scope)
            for intervention in self.interventions
            for scope in (self.scopes if intervention.has_scope else self.scopes[:1])
        )


@dataclass(frozen=True)
class HarmlessDepths:
    """From which layer on a probe showed freezing the prompt, and leaving out attention, to be harmless; None: nowhere."""

    model: ModelIdentity
    freeze: int | None
    skip_attention: int | None
    margin: float


@dataclass(frozen=True)
class _Marks:
    """By sample: whether it is `right` [A], whether it has its donor's answer `switched` [A], and `nll` [S], in nats."""

    right: list[bool]
    switched: list[bool]
    nll: list[float]


def probe_model(
    subject: Subject,
    rows: Sequence[Row],
    *,
    dataset: str,
    settings: ProbeSettings,
    output: Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> artifacts.Document:
    """Run the whole model, then each intervention at each depth; a `voidprune.probe/1`, written to `output` where one is given.

    A run that was killed goes on where it stopped. Raises DatasetError, also where the whole model gets nothing right; ModelError.
    """
    if output is not None:
        artifacts.check_output_file(output, overwrite=overwrite)
    num_layers = subject.checkpoint.identity.num_layers
    depths = tuple(range(num_layers)) if settings.depths is None else tuple(sorted(settings.depths))
    if depths[-1] >= num_layers:
        raise ModelError(
            f"{subject.checkpoint.identity.name} has no layer {depths[-1]}", hint=f"up to {num_layers - 1}"
        )
    samples = subject.encode(rows, max_new_tokens=settings.max_new_tokens)
    key = {
        "model": subject.checkpoint.identity.fingerprint,
        "samples": fingerprint_samples(samples),
        "answers": [sample.answer for sample in samples],
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "dtype": subject.dtype,
        "voidprune": voidprune.__version__,
    }
    with Journal(output, key=key, overwrite=overwrite) as journal:
        items = _Items(subject, samples, settings, journal, track)
        curves: dict[tuple[Intervention, Scope], dict[int, _Marks]] = {}
        total = len(settings.curves) * len(depths) * len(samples)
        with track("probing", total, "items") as advance:
            for intervention, scope in settings.curves:
                for depth in reversed(depths):
                    step = f"{intervention} {scope if intervention.has_scope else 'any'} {depth}"
                    marks = journal.get(step)
                    if marks is None:
                        marks = asdict(items.measure(intervention, scope, depth))
                        journal.record(step, marks)
                    curves.setdefault((intervention, scope), {})[depth] = _Marks(**marks)
                    advance(len(samples))
        document = {
            **_document(subject, items, curves, dataset=dataset, settings=settings),
            "samples": fingerprint_samples(samples),
        }
        if output is not None:
            artifacts.write_file(output, artifacts.canonical_bytes(document), overwrite=overwrite)
            journal.remove()
    return document


class _Items:
    """The samples, and how the whole model fares on them. `answered` and `scored` are indices of samples."""

    def __init__(
        self, subject: Subject, samples: Sequence[Sample], settings: ProbeSettings, journal: Journal, track: Track
    ) -> None:
        self.subject, self.settings = subject, settings
        self.samples = list(samples)
        self.answered = [index for index, sample in enumerate(samples) if sample.answer is not None]
        self.scored = [index for index, sample in enumerate(samples) if sample.answer is None]
        missing = [
            index
            for index, sample in enumerate(samples)
            if not sample.choices and (sample.answer is not None or sample.response is None)
        ]
        with track("answering", len(missing), "samples") as advance:
            found = generate_responses(
                subject.model,
                [replace(samples[index], response=None) for index in missing],
                max_new_tokens=settings.max_new_tokens,
                end_tokens=subject.ends,
                batch_size=settings.batch_size,
                journal=journal,
                on_progress=lambda num_samples, _num_tokens: advance(num_samples),
            )
        for index, sample in zip(missing, found, strict=True):
            self.samples[index] = sample
        longest: dict[str, int] = {}
        for sample in self.samples:
            longest[sample.group] = max(longest.get(sample.group, 0), len(sample.response or ()))
        self._limits = {group: min(settings.max_new_tokens, 2 * length) for group, length in longest.items()}
        self._donors = find_donations(samples)
        self._donations = {samples[index].prompt: donation for index, (_, donation) in self._donors.items()}
        whole = journal.get("whole")
        if whole is None:
            whole = asdict(self.measure(Intervention.FREEZE, Scope.PROMPT, subject.checkpoint.identity.num_layers))
            journal.record("whole", whole)
        self.whole = _Marks(**whole)
        for task, (indices, is_answered) in self.tasks.items():
            if is_answered and not any(self.whole.right[index] for index in indices):
                raise DatasetError(
                    f"the whole model gets no item of {task} right, so nothing can be lost",
                    hint="give items that it can answer, or longer responses: --max-new-tokens",
                )

    @property
    def tasks(self) -> dict[str, tuple[list[int], bool]]:
        """Of each task the positions among the answered or among the scored samples, and whether they are answered."""
        found: dict[str, tuple[list[int], bool]] = {}
        for indices, is_answered in ((self.answered, True), (self.scored, False)):
            for position, index in enumerate(indices):
                group = self.samples[index].group
                members, kind = found.setdefault(group, ([], is_answered))
                if kind != is_answered:
                    raise DatasetError(
                        f"items of {group} are of two kinds, with an answer and without",
                        hint='name two tasks in the field "task"',
                    )
                members.append(position)
        return found

    @property
    def donations(self) -> Mapping[tuple[int, ...], Donation]:
        return self._donations

    def donor_answer(self, index: int) -> str | None:
        return self.samples[self._donors[index][0]].answer if index in self._donors else None

    def num_tokens(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Response tokens of each scored sample."""
        return np.array([len(self.samples[index].response or ()) for index in self.scored], np.float64)

    def measure(self, intervention: Intervention, scope: Scope, depth: int) -> _Marks:
        probe = Probe(intervention, depth, scope, self.settings.seed, self._donations)
        right: dict[int, bool] = {}
        switched: dict[int, bool] = {}
        nll: dict[int, float] = {}
        with probed(self.subject.model, probe) as runner:
            chosen = [index for index in self.answered if self.samples[index].choices]
            for index, text in zip(chosen, self._choose(runner, chosen), strict=True):
                right[index] = text == self.samples[index].answer
                switched[index] = text == self.donor_answer(index)
            asked = [index for index in self.answered if not self.samples[index].choices]
            for index, response in self._answer(runner, asked):
                text = str(self.subject.tokenizer.decode(list(response), skip_special_tokens=True))
                donor = self.donor_answer(index)
                right[index] = is_answered(text, str(self.samples[index].answer), group=self.samples[index].group)
                switched[index] = donor is not None and is_answered(text, donor, group=self.samples[index].group)
            for batch in self._batches(self.scored):
                rows = [self.samples[index] for index in batch]
                scores = runner.score([row.prompt for row in rows], [row.response or () for row in rows])
                nll.update((index, -float(score.sum())) for index, score in zip(batch, scores, strict=True))
        if not all(map(math.isfinite, nll.values())):
            raise ModelError("the model gives logits that are not finite", hint="use a precision with more range: fp32")
        return _Marks(
            [right[index] for index in self.answered],
            [switched[index] for index in self.answered],
            [nll[index] for index in self.scored],
        )

    def _choose(self, runner: ProbedModel, indices: Sequence[int]) -> list[str]:
        """The likeliest choice of each sample."""
        pairs = [(index, choice) for index in indices for choice in self.samples[index].choices]
        totals: list[float] = []
        for start in range(0, len(pairs), self.settings.batch_size):
            some = pairs[start : start + self.settings.batch_size]
            scores = runner.score([self.samples[index].prompt for index, _ in some], [choice for _, choice in some])
            totals += [float(score.sum()) for score in scores]
        remaining = iter(totals)
        texts = []
        for index in indices:
            sample = self.samples[index]
            texts.append(sample.choice_texts[best_choice([next(remaining) for _ in sample.choices])])
        return texts

    def _answer(self, runner: ProbedModel, indices: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        """Greedy responses: the whole model's where it is still the most likely at every token, else a new one."""
        open_ones = list(indices)
        if not runner.reruns:  # there, judging takes as many passes as generating
            open_ones = []
            for batch in self._batches(indices):
                rows = [self.samples[index] for index in batch]
                judged = runner.judge([row.prompt for row in rows], [row.response or () for row in rows])
                for index, row, (_, is_greedy) in zip(batch, rows, judged, strict=True):
                    if is_greedy:
                        yield index, row.response or ()
                    else:
                        open_ones.append(index)
        for batch in self._batches(open_ones):
            limits = [self._limits[self.samples[index].group] for index in batch]
            answers = runner.generate(
                [self.samples[index].prompt for index in batch],
                max_new_tokens=max(limits),
                end_tokens=self.subject.ends,
            )
            for index, answer, limit in zip(batch, answers, limits, strict=True):
                yield index, answer[:limit]

    def _batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Samples of similar length together."""
        size = self.settings.batch_size
        lengths = {
            index: (len(self.samples[index].response or ()), len(self.samples[index].prompt)) for index in indices
        }
        order = sorted(indices, key=lambda index: lengths[index])
        for start in range(0, len(order), size):
            yield order[start : start + size]


def is_answered(response: str, answer: str, *, group: str) -> bool:
    """Whether a response gives an answer. Of capitals and SQuAD, whether its first line names it: the answer is free text."""
    if group not in ("capitals", "squad"):
        return answer_of(response) == answer
    first = (response.strip().splitlines() or [""])[0]
    return re.search(rf"\b{re.escape(_plain(answer))}\b", _plain(first)) is not None


def _plain(text: str) -> str:
    """Without accents."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _document(
    subject: Subject,
    items: _Items,
    curves: Mapping[tuple[Intervention, Scope], Mapping[int, _Marks]],
    *,
    dataset: str,
    settings: ProbeSettings,
) -> artifacts.Document:
    identity, tasks = subject.checkpoint.identity, items.tasks
    whole: dict[str, Any] = {}
    for task, (positions, is_answered_task) in tasks.items():
        share = sum(items.whole.right[place] for place in positions) / len(positions) if is_answered_task else None
        nll = None if is_answered_task else sum(items.whole.nll[place] for place in positions)
        whole[task] = {
            "num_items": len(positions),
            "accuracy": share,
            "perplexity": None if nll is None else math.exp(nll / items.num_tokens()[positions].sum()),
            "num_items_needed": None if share is None else num_items_needed(settings.margin * share),
        }
    results = []
    for (intervention, scope), points in curves.items():
        described = [
            {
                "depth": depth,
                "tasks": {task: _describe(items, task, points[depth], intervention, settings) for task in tasks},
            }
            for depth in sorted(points)
        ]
        results.append(
            {
                "intervention": str(intervention),
                "scope": str(scope) if intervention.has_scope else "any",
                "points": described,
                "harmless_from": _first_of_the_last(described, "holds"),
                "unharmed_from": _first_of_the_last(described, "unharmed"),
            }
        )
    return {
        "schema": artifacts.schema_key(KIND, VERSION),
        "model": identity.to_document(),
        "dataset": dataset,
        "settings": {
            "interventions": [str(one) for one in settings.interventions],
            "scopes": [str(one) for one in settings.scopes],
            "margin": settings.margin,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "dtype": subject.dtype,
        },
        "whole": whole,
        "results": results,
    }


def _describe(
    items: _Items, task: str, marks: _Marks, intervention: Intervention, settings: ProbeSettings
) -> artifacts.Document:
    """One task at one depth. `holds`: the upper end of the one-sided 95 % interval of the loss is within the margin; `unharmed`:
    the loss itself is."""
    positions, is_answered_task = items.tasks[task]
    if is_answered_task:
        right, before = (np.array(some)[positions] for some in (marks.right, items.whole.right))
        estimate = estimate_share(int(right.sum()), len(right))
        loss, bound = accuracy_loss(before, right), settings.margin * float(before.mean())
    else:
        nll, before = (np.array(some)[positions] for some in (marks.nll, items.whole.nll))
        num_tokens = items.num_tokens()[positions]
        estimate = exponential(estimate_ratio(nll - before, num_tokens))
        loss, bound = perplexity_loss(before, nll, num_tokens), settings.margin
    return {
        "accuracy" if is_answered_task else "perplexity_ratio": estimate.to_document(),
        **_loss_document(loss, bound),
        **(
            {"switched": float(np.array(marks.switched)[positions].mean())}
            if is_answered_task and intervention is Intervention.SWITCH
            else {}
        ),
    }


def _loss_document(loss: Loss, bound: float) -> artifacts.Document:
    return {
        "loss": loss.estimate,
        "loss_upper": loss.upper,
        "holds": bool(loss.upper <= bound),
        "unharmed": bool(loss.estimate <= bound),
    }


def _first_of_the_last(points: Sequence[Mapping[str, Any]], verdict: str) -> int | None:
    """The lowest depth from which on every depth that was tried has the verdict in every task; None where the last has not."""
    found = None
    for point in reversed(points):
        if not all(task[verdict] for task in point["tasks"].values()):
            break
        found = int(point["depth"])
    return found


def read_harmless_depths(path: Path) -> HarmlessDepths:
    """What `voidprune plan --from-probe` goes by. Freezing counts in the prompt alone. Raises ArtifactError."""
    document = artifacts.read_document(path, kind=KIND, version=VERSION)
    try:
        model = ModelIdentity.from_document(document["model"], place=str(path))
        margin = float(document["settings"]["margin"])
        found = {(one["intervention"], one["scope"]): one["harmless_from"] for one in document["results"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is not a whole {KIND}: {error!r}", hint="probe again") from error
    for depth in found.values():
        if depth is not None and (type(depth) is not int or not 0 <= depth < model.num_layers):
            raise ArtifactError(f"{path}: {depth!r} is no layer of {model.name}", hint="probe again")
    return HarmlessDepths(model, found.get(("freeze", "prompt")), found.get(("skip-attention", "any")), margin)
