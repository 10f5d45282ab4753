"""LAC at run time beside the whole model, beside controls of the same cost, and beside the schedule that it leads to.

Four things that are easily taken for one another stand in rows of their own: `readout` (LAC as published), `mask` (true adaptive
skipping), their controls (a fixed readout at the same mean depth; random layers at the same count), and `static` (the schedule of
LAC's activation frequency, at the same mean number of layers in each phase: the only one that is smaller and faster).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import voidprune
from voidprune import artifacts
from voidprune.errors import DatasetError, ModelError
from voidprune.execution.adaptive import (
    AdaptiveModel,
    FixedReadout,
    Mask,
    RandomMask,
    Readout,
    Rule,
    RunUsage,
    Whole,
    adaptive,
)
from voidprune.execution.manifest import is_bundle
from voidprune.execution.reference import scheduled
from voidprune.execution.sampling import Sampling
from voidprune.models.checkpoint import Checkpoint
from voidprune.models.pretrained import default_device, end_tokens, load_model, load_tokenizer
from voidprune.pipeline.models import open_model
from voidprune.pipeline.progress import Track, untracked
from voidprune.planning.budgets import Budget
from voidprune.planning.planner import plan_schedule
from voidprune.profiling.calibration import Row, Sample, encode_rows, fingerprint_samples
from voidprune.profiling.profile import LacSettings, Profile
from voidprune.profiling.tracing import generate_responses, trace_model
from voidprune.quality.evaluation import Accuracy, Runner
from voidprune.quality.metrics import answer_of
from voidprune.schedule import Phase, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "adaptive-evaluation"
FindAnswer = Callable[[str], str | None]
"""From the text of a response to what it answers, to be compared with the answer of the item."""


class Mode(StrEnum):
    READOUT = "readout"
    MASK = "mask"


@dataclass(frozen=True)
class AdaptiveSettings:
    """What is run: each mode at each alpha, with its control, and with `static` the schedule of the same mean use.

    `arithmetic` is LAC's: "float32", or "model" for the model's dtype, as published. Without a `sampling` generation is greedy.
    `seed` is that of the random layers.
    """

    modes: tuple[Mode, ...] = (Mode.READOUT, Mode.MASK)
    alphas: tuple[float, ...] = (0.8,)
    arithmetic: str = "float32"
    static: bool = False
    sampling: Sampling | None = None
    max_new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        assert not (self.static and self.sampling), "a schedule answers greedily; the caller refuses both"
        assert self.modes
        assert self.alphas


@dataclass(frozen=True)
class Subject:
    """A model that is loaded, and what goes with it."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    tokenizer: Any
    ends: tuple[int, ...]
    dtype: str

    def encode(self, rows: Sequence[Row], *, max_new_tokens: int) -> list[Sample]:
        context = self.checkpoint.architecture.context_length
        return encode_rows(
            rows, self.tokenizer, end_tokens=self.ends, max_length=context, max_new_tokens=max_new_tokens
        )


def open_subject(name: str, *, dtype: str = "fp32", device: str | None = None) -> Subject:
    """Raises ModelError, also for a bundle, whose layers are chosen already."""
    checkpoint = open_model(name)
    if is_bundle(checkpoint.folder):
        raise ModelError(f"{name} is a bundle and has its layers already", hint="give the whole model")
    return Subject(
        checkpoint,
        load_model(checkpoint.folder, dtype=dtype, device=device or default_device()),
        load_tokenizer(checkpoint.folder),
        end_tokens(checkpoint.folder),
        dtype,
    )


@dataclass(frozen=True)
class _Rules:
    """What runs while given texts and choices are scored, and while answers are generated.

    The two differ in controls alone: each is given the mean depth, or the mean use, of its own part. Generation that has gone
    astray is long, and would otherwise decide for both.
    """

    scored: Rule | Schedule
    generated: Rule | Schedule

    def to_document(self) -> artifacts.Document:
        return {"scored": _rule_document(self.scored), "generated": _rule_document(self.generated)}


@dataclass(frozen=True)
class _Outcome:
    """What one runner did. `outcomes` has an entry an item that was answered: the response, or the index of the choice.

    Usage is that of scoring and that of generating, apart; None where nothing of the kind was done, and under a schedule.
    """

    log_likelihood: float
    num_scored: int
    right: dict[str, list[bool]]
    answers: dict[str, Counter[str]]
    outcomes: tuple[tuple[int, ...], ...]
    scored: RunUsage | None
    generated: RunUsage | None

    def to_document(self, whole: _Outcome) -> artifacts.Document:
        results = {task: Accuracy(sum(marks), len(marks)) for task, marks in self.right.items()}
        usages = {"scored": self.scored, "generated": self.generated}
        return {
            "perplexity": math.exp(-self.log_likelihood / self.num_scored) if self.num_scored else None,
            "num_scored": self.num_scored,
            "accuracy": {
                task: {
                    "num_right": result.num_right,
                    "num_items": result.num_items,
                    "share": result.share,
                    "interval": list(result.interval),
                }
                for task, result in results.items()
            },
            "answers": {task: dict(counts) for task, counts in self.answers.items()},
            "same_as_whole": sum(one == two for one, two in zip(self.outcomes, whole.outcomes, strict=True)),
            "usage": {name: _usage_document(usage) for name, usage in usages.items() if usage is not None},
        }


def _usage_document(usage: RunUsage) -> artifacts.Document:
    return {
        name: {
            **asdict(tokens),
            "mean_use": tokens.mean_use,
            "mean_depth": tokens.mean_depth,
            "last_layer_share": tokens.last_layer_share,
        }
        for name, tokens in (("prefill", usage.prefill), ("decode", usage.decode), ("read", usage.read))
    }


def evaluate_adaptively(
    subject: Subject,
    rows: Sequence[Row],
    *,
    dataset: str,
    settings: AdaptiveSettings,
    find_answer: FindAnswer = answer_of,
    track: Track = untracked,
) -> artifacts.Document:
    """Run the whole model, each mode at each alpha, and their controls on the same items; a `voidprune.adaptive-evaluation/1`.

    Items with choices are answered by the likeliest choice, other items with an answer by generation, whose answer `find_answer`
    reads; given responses are scored. Raises DatasetError.
    """
    samples = subject.encode(rows, max_new_tokens=settings.max_new_tokens)
    if not any(sample.response is not None or sample.answer is not None for sample in samples):
        raise DatasetError("no sample has a response or an answer", hint='give items with "response" or "answer"')
    runs: list[artifacts.Document] = []
    outcomes: list[_Outcome] = []

    def run(name: str, alpha: float | None, rules: _Rules) -> _Outcome:
        with track(name, _num_steps(samples), "items") as advance:
            outcome = _measure(subject, rules, samples, settings, find_answer, advance)
        outcomes.append(outcome)
        runs.append({"name": name, "alpha": alpha, "rules": rules.to_document(), **outcome.to_document(outcomes[0])})
        return outcome

    def run_same(name: str, alpha: float | None, rule: Rule) -> _Outcome:
        return run(name, alpha, _Rules(rule, rule))

    run_same("whole model", None, Whole())
    for alpha in settings.alphas:
        lac = LacSettings(alpha=alpha, arithmetic=settings.arithmetic)
        profile = _profile_items(subject, samples, lac, settings) if settings.static else None
        for mode in settings.modes:
            outcome = run_same(mode.value, alpha, Readout(lac) if mode is Mode.READOUT else Mask(lac))
            if mode is Mode.READOUT:
                run("fixed readout", alpha, _Rules(_same_depth(outcome.scored), _same_depth(outcome.generated)))
            else:
                run_same("random layers", alpha, RandomMask(lac, settings.seed))
            if profile is not None:
                plans = (_same_use(subject.checkpoint, profile, used) for used in (outcome.scored, outcome.generated))
                run(f"static, as {mode.value}", alpha, _Rules(*plans))
    return {
        "schema": artifacts.schema_key(KIND, 1),
        "model": subject.checkpoint.name,
        "model_fingerprint": subject.checkpoint.identity.fingerprint,
        "num_layers": subject.checkpoint.identity.num_layers,
        "dtype": subject.dtype,
        "dataset": dataset,
        "num_samples": len(samples),
        "samples": fingerprint_samples(samples),
        "settings": asdict(settings),
        "runs": runs,
        "written_by": f"voidprune {voidprune.__version__}",
    }


def _running(model: PreTrainedModel, rule: Rule | Schedule, settings: AdaptiveSettings) -> Any:
    return scheduled(model, rule) if isinstance(rule, Schedule) else adaptive(model, rule, sampling=settings.sampling)


def _rule_document(rule: Rule | Schedule) -> artifacts.Document:
    """Alpha and arithmetic stand elsewhere in the document."""
    match rule:
        case FixedReadout(depth):
            return {"kind": "fixed-readout", "depth": depth}
        case RandomMask(_, seed):
            return {"kind": "random-mask", "seed": seed}
        case Schedule():
            layers = {str(phase): [str(action) for action in rule.actions(phase)] for phase in Phase}
            return {"kind": "static", "executed": {str(phase): rule.num_executed(phase) for phase in Phase}, **layers}
    return {"kind": type(rule).__name__.lower()}


def _num_steps(samples: Sequence[Sample]) -> int:
    return sum((sample.response is not None) + (sample.answer is not None) for sample in samples)


def _measure(
    subject: Subject,
    rules: _Rules,
    samples: Sequence[Sample],
    settings: AdaptiveSettings,
    find_answer: FindAnswer,
    advance: Callable[[int], None],
) -> _Outcome:
    log_likelihood, num_scored = 0.0, 0
    right: dict[str, dict[int, bool]] = {}
    answers: dict[str, Counter[str]] = {}
    outcomes: dict[int, tuple[int, ...]] = {}

    def mark(index: int, answer: str | None, outcome: tuple[int, ...]) -> None:
        sample = samples[index]
        outcomes[index] = outcome
        right.setdefault(sample.group, {})[index] = answer == sample.answer

    given = [index for index, sample in enumerate(samples) if sample.response is not None]
    # Each choice is a row; the choices of an item have the same prompt, so they mostly share a batch.
    pairs = [(index, choice) for index, sample in enumerate(samples) for choice in range(len(sample.choices))]
    found: dict[int, dict[int, float]] = {}
    with _running(subject.model, rules.scored, settings) as runner:
        for batch in _batches(given, [len(samples[index].prompt) for index in given], settings.batch_size):
            scores = runner.score([samples[i].prompt for i in batch], [samples[i].response or () for i in batch])
            log_likelihood += sum(float(score.sum()) for score in scores)
            num_scored += sum(map(len, scores))
            advance(len(batch))
        for batch in _batches(pairs, [len(samples[index].prompt) for index, _ in pairs], settings.batch_size):
            scores = runner.score([samples[i].prompt for i, _ in batch], [samples[i].choices[c] for i, c in batch])
            for (index, choice), score in zip(batch, scores, strict=True):
                found.setdefault(index, {})[choice] = float(score.sum())
            advance(sum(choice == 0 for _, choice in batch))
        scored = _take_usage(runner) if given or pairs else None
    for index in sorted(found):
        best = max(sorted(found[index]), key=lambda choice: found[index][choice])  # of equals the first
        text = samples[index].choice_texts[best]
        answers.setdefault(samples[index].group, Counter())[text] += 1
        mark(index, text, (best,))

    asked = [index for index, sample in enumerate(samples) if sample.answer is not None and not sample.choices]
    with _running(subject.model, rules.generated, settings) as runner:
        for batch in _batches(asked, [len(samples[index].prompt) for index in asked], settings.batch_size):
            responses = runner.generate(
                [samples[index].prompt for index in batch],
                max_new_tokens=settings.max_new_tokens,
                end_tokens=subject.ends,
            )
            for index, response in zip(batch, responses, strict=True):
                answer = find_answer(str(subject.tokenizer.decode(list(response), skip_special_tokens=True)))
                if find_answer is not answer_of:  # labels, so there are few of them
                    answers.setdefault(samples[index].group, Counter())[answer or "none"] += 1
                mark(index, answer, tuple(response))
            advance(len(batch))
        generated = _take_usage(runner) if asked else None
    return _Outcome(
        log_likelihood=log_likelihood,
        num_scored=num_scored,
        right={task: list(marks.values()) for task, marks in sorted(right.items())},
        answers=answers,
        outcomes=tuple(outcomes[index] for index in sorted(outcomes)),
        scored=scored,
        generated=generated,
    )


def _take_usage(runner: Runner) -> RunUsage | None:
    """None under a schedule, which says itself what runs."""
    return runner.take_usage() if isinstance(runner, AdaptiveModel) else None


def _batches(items: Sequence[Any], lengths: Sequence[int], size: int) -> Iterator[list[Any]]:
    """Items of similar length together, so that little is padded."""
    order = sorted(range(len(items)), key=lambda position: lengths[position])
    for start in range(0, len(order), size):
        yield [items[position] for position in order[start : start + size]]


def _profile_items(
    subject: Subject, samples: Sequence[Sample], lac: LacSettings, settings: AdaptiveSettings
) -> Profile:
    """LAC's activation frequency on the evaluated items themselves: the best case of a static schedule."""
    missing = [sample for sample in samples if sample.response is None]
    answered = [sample for sample in samples if sample.response is not None]
    if missing:
        answered += generate_responses(
            subject.model,
            missing,
            max_new_tokens=settings.max_new_tokens,
            end_tokens=subject.ends,
            batch_size=settings.batch_size,
        )
    return trace_model(
        subject.model,
        subject.checkpoint,
        answered,
        responses="dataset",
        lac=lac,
        batch_size=settings.batch_size,
    )


def _same_depth(usage: RunUsage | None) -> FixedReadout | Whole:
    """The fixed readout after as many layers as the tokens whose logits were used had on average; half rounds up."""
    return Whole() if usage is None else FixedReadout(math.floor(usage.read.mean_depth + 0.5))


def _same_use(checkpoint: Checkpoint, profile: Profile, usage: RunUsage | None) -> Schedule | Whole:
    """The layers that LAC calls active most often, as many a phase as the adaptive run used on average."""
    if usage is None:
        return Whole()
    used = {phase: usage.prefill if phase is Phase.PREFILL else usage.decode for phase in Phase}
    lowest = 1 / checkpoint.identity.num_layers
    keep = {phase: max(lowest, round(use.mean_use, 6)) if use.num_tokens else 1.0 for phase, use in used.items()}
    budget = Budget(keep_prefill=keep[Phase.PREFILL], keep_decode=keep[Phase.DECODE])
    return plan_schedule(checkpoint.identity, profile, criterion="lac", budget=budget)
