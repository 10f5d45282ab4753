"""Tasks of lm-evaluation-harness on a model or a bundle, with the whole model beside it, item by item."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import voidprune
from voidprune import artifacts
from voidprune.errors import DatasetError, MissingExtraError
from voidprune.healing.training_data import check_disjoint
from voidprune.models.pretrained import end_tokens, load_tokenizer
from voidprune.pipeline.evaluation import WHOLE, fitted_prompts, open_runners
from voidprune.pipeline.models import open_model, whole_identity
from voidprune.pipeline.progress import Track, untracked
from voidprune.quality.statistics import (
    Estimate,
    estimate_mean,
    estimate_share,
    estimate_share_difference,
    mcnemar_p_value,
)
from voidprune.schedule import Schedule, schedule_hash

MAIN_METRICS = ("acc", "exact_match")
"""What a gate looks at: the first of these that a task measures."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """One task on one runner. `metrics` are lm_eval's own figures by "metric,filter"; `items` what each item contributed, [N], for
    those that are means of numbers."""

    version: str
    num_items: int
    metrics: Mapping[str, float]
    items: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]

    def estimate(self, metric: str) -> Estimate | None:
        values = self.items.get(metric)
        if values is None:
            return None
        return estimate_share(int(values.sum()), len(values)) if _is_binary(values) else estimate_mean(values)


@dataclass(frozen=True)
class HarnessReport:
    """Results by runner and task, whole model first. `num_cut` requests of each had their context cut on the left to fit.

    `model_fingerprint` is that of the whole model: see `schedule.ModelIdentity`. `num_compared` of the tasks' prompts were looked
    for among those that weights were fitted to, and are not there, token for token; None where there are none.
    """

    model: str
    model_fingerprint: str
    schedule: Schedule | None
    settings: Mapping[str, Any]
    results: Mapping[str, Mapping[str, TaskResult]]
    num_cut: Mapping[str, int]
    harness_version: str
    num_compared: int | None = None

    @property
    def judged(self) -> str:
        return list(self.results)[-1]

    @property
    def scores(self) -> dict[str, float]:
        """What gates look at: of the judged runner, by task, the first of MAIN_METRICS."""
        scores = {}
        for task, result in self.results[self.judged].items():
            main = [value for name in MAIN_METRICS for metric, value in result.metrics.items() if _name(metric) == name]
            if main:
                scores[task] = main[0]
        return scores

    def to_document(self) -> artifacts.Document:
        return {
            "schema": artifacts.schema_key("harness", 1),
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "schedule_hash": None if self.schedule is None else schedule_hash(self.schedule),
            "settings": dict(self.settings),
            "num_compared_prompts": self.num_compared,
            "runners": [
                {
                    "name": name,
                    "num_cut_contexts": self.num_cut[name],
                    "tasks": {task: self._describe(name, task) for task in results},
                }
                for name, results in self.results.items()
            ],
            "written_by": f"voidprune {voidprune.__version__}, lm_eval {self.harness_version}",
        }

    def _describe(self, runner: str, task: str) -> artifacts.Document:
        result = self.results[runner][task]
        metrics = {}
        for metric, value in result.metrics.items():
            estimate = result.estimate(metric)
            whole = None if runner == WHOLE else self.results.get(WHOLE, {}).get(task)
            metrics[metric] = {
                "value": value,
                "interval": None if estimate is None else [estimate.low, estimate.high],
                "against_whole": None if whole is None else _compare(whole.items.get(metric), result.items.get(metric)),
            }
        return {"version": result.version, "num_items": result.num_items, "metrics": metrics}


def _compare(whole: Any, other: Any) -> artifacts.Document | None:
    if whole is None or other is None:
        return None
    if not (_is_binary(whole) and _is_binary(other)):
        difference = estimate_mean(other - whole)
        return {"difference": difference.value, "interval": [difference.low, difference.high], "p_value": None}
    lost, won = int((whole > other).sum()), int((other > whole).sum())
    difference = estimate_share_difference(lost, won, len(whole))
    return {
        "difference": difference.value,
        "interval": [difference.low, difference.high],
        "p_value": mcnemar_p_value(lost, won),
    }


def _is_binary(values: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _name(metric: str) -> str:
    return metric.partition(",")[0]


def run_harness(
    name: str,
    tasks: Sequence[str],
    *,
    schedule: Schedule | None = None,
    baseline: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    provider: str | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> HarnessReport:
    """Run tasks of lm_eval on everything that can be run of a bundle or model: `pipeline.evaluation.open_runners`.

    `include_path` is a folder with more tasks. Raises MissingExtraError, DatasetError (a task is unknown or its data cannot be
    read), HealingError where weights were fitted to a prompt of a task, token for token, and what `open_runners` raises.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise MissingExtraError(
            "lm-evaluation-harness is not installed", hint="pip install 'voidprune[eval]'"
        ) from error
    from voidprune.quality.harness import PhasedLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _find_tasks(TaskManager, tasks, include_path)
    names = manager.match_tasks(list(tasks))
    _load_tasks(manager, names, num_fewshot=num_fewshot, seed=seed)  # before a model is loaded
    checkpoint = open_model(name)
    tokenizer, ends = load_tokenizer(checkpoint.folder), end_tokens(checkpoint.folder)
    if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise DatasetError(f"{checkpoint.name} has no chat template", hint="leave --apply-chat-template out")
    runners, judged_schedule = open_runners(
        checkpoint, schedule=schedule, baseline=None if baseline is None else open_model(baseline), provider=provider
    )
    trained, compared = fitted_prompts(checkpoint), set[tuple[int, ...]]()

    def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
        if trained is not None:
            found = {tuple(prompt) for prompt in prompts}
            check_disjoint(trained, sorted(found), what=f"the lm_eval tasks {', '.join(names)}")
            compared.update(found)

    results: dict[str, dict[str, TaskResult]] = {}
    num_cut: dict[str, int] = {}
    for label, opened in runners.items():
        with track(label, None, "requests") as advance, opened() as runner:
            model = PhasedLM(
                runner,
                tokenizer,
                end_tokens=ends,
                context_length=checkpoint.architecture.context_length,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_progress=advance,
                check_prompts=check_prompts,
            )
            outcome = lm_eval.evaluate(
                model,
                _load_tasks(manager, names, num_fewshot=num_fewshot, seed=seed),
                limit=limit,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
                bootstrap_iters=0,
            )
        results[label] = _read_outcome(outcome)
        num_cut[label] = model.num_cut
    return HarnessReport(
        model=checkpoint.name,
        model_fingerprint=whole_identity(checkpoint).fingerprint,
        schedule=judged_schedule,
        settings={
            "tasks": list(tasks),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        results=results,
        num_cut=num_cut,
        harness_version=lm_eval.__version__,
        num_compared=None if trained is None else len(compared),
    )


def _find_tasks(make_manager: Any, tasks: Sequence[str], include_path: Path | None) -> Any:
    """A manager that knows the tasks, by name or pattern.

    Of `include_path` alone where that has them all, because lm_eval reads thousands of files to know its own.
    """
    if include_path is not None:
        if not include_path.is_dir():
            raise DatasetError(
                f"there is no folder {include_path}", hint="give the folder that holds the tasks' YAML files"
            )
        own = make_manager(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks) and _is_complete(own, tasks):
            return own
    manager = make_manager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise DatasetError(
                f"lm_eval knows no task {task}",
                hint="lm_eval ls tasks lists them; --include-path adds a folder of your own",
            )
    return manager


def _is_complete(manager: Any, tasks: Sequence[str]) -> bool:
    """Whether a manager knows all that the tasks consist of: a group of one's own may name tasks of lm_eval's."""
    try:
        manager.load(manager.match_tasks(list(tasks)))
    except (KeyError, ValueError):
        return False
    except OSError:  # the data: `_load_tasks` says so
        return True
    return True


def _load_tasks(manager: Any, tasks: Sequence[str], *, num_fewshot: int | None, seed: int) -> Any:
    """Fresh tasks, because a run leaves its requests in them.

    Does what `lm_eval.simple_evaluate` does, which also asks git who we are. A task that says it has no worked examples keeps to
    it, whatever `num_fewshot` says.
    """
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ValueError, KeyError, TypeError) as error:  # what datasets and yaml make of a bad task
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"lm_eval cannot load {', '.join(tasks)}: {reason}",
            hint="see its data_files; without a network its data have to be here",
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and num_fewshot is not None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _read_outcome(outcome: Mapping[str, Any]) -> dict[str, TaskResult]:
    """lm_eval's result, task by task. Groups have figures but no items of their own."""
    results = {}
    for task, figures in outcome["results"].items():
        samples: Sequence[Mapping[str, Any]] = outcome["samples"].get(task, [])
        metrics = {
            metric: float(value)
            for metric, value in figures.items()
            if "," in metric and isinstance(value, int | float) and not _name(metric).endswith("_stderr")
        }
        items = {}
        for metric, value in metrics.items():
            values = _item_values(samples, metric)
            if values is not None and np.isclose(values.mean(), value):
                items[metric] = values
        count = outcome.get("n-samples", {}).get(task, {}).get("effective", 0)
        results[task] = TaskResult(str(outcome["versions"].get(task)), int(count), metrics, items)
    return results


def _item_values(samples: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """What each item contributes to a metric, in the order of the items; None where that is no number."""
    name, _, chosen = metric.partition(",")
    found = {sample["doc_id"]: sample.get(name) for sample in samples if sample.get("filter", chosen) == chosen}
    values = [found[item] for item in sorted(found)]
    if not values or not all(isinstance(value, int | float | np.number) for value in values):
        return None
    return np.array(values, np.float64)
