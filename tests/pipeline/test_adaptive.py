"""LAC at run time on the demo model: one document with the whole model, the modes and their controls, each what it says it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.tiny_models import TinyModel
from voidprune import artifacts
from voidprune.errors import DatasetError, ModelError
from voidprune.execution.sampling import Sampling
from voidprune.pipeline.adaptive import AdaptiveSettings, Mode, Subject, evaluate_adaptively, open_subject
from voidprune.pipeline.tasks import task_rows
from voidprune.profiling.calibration import Row
from voidprune.profiling.profile import LacSettings
from voidprune.profiling.tracing import trace_model
from voidprune.schedule import Phase
from voidprune.tables import adaptive_tables


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject("demo", device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return task_rows("yes-no", num_items=2) + task_rows("multiple-choice", num_items=2)


@pytest.fixture(scope="module")
def document(subject: Subject, rows: list[Row]) -> artifacts.Document:
    settings = AdaptiveSettings(alphas=(0.1, 0.6), static=True, max_new_tokens=16, batch_size=3)
    return evaluate_adaptively(subject, rows, dataset="two tasks", settings=settings)


def find(document: artifacts.Document, name: str, alpha: float | None) -> Any:
    (run,) = (run for run in document["runs"] if (run["name"], run["alpha"]) == (name, alpha))
    return run


def test_every_run_is_there_in_its_order(document: artifacts.Document) -> None:
    names = ["readout", "fixed readout", "static, as readout", "mask", "random layers", "static, as mask"]
    assert [(run["name"], run["alpha"]) for run in document["runs"]] == [
        ("whole model", None),
        *((name, 0.1) for name in names),
        *((name, 0.6) for name in names),
    ]


def test_the_document_is_canonical_json(document: artifacts.Document) -> None:
    content = artifacts.canonical_bytes(document)
    parsed = artifacts.parse_document(content, kind="adaptive-evaluation", version=1, place="here")
    assert artifacts.canonical_bytes(parsed) == content
    assert adaptive_tables(json.loads(content))[0].row_count == 13


def test_the_whole_model_knows_its_tasks(document: artifacts.Document) -> None:
    whole = document["runs"][0]
    assert all(result["num_right"] == result["num_items"] == 2 for result in whole["accuracy"].values())
    assert whole["same_as_whole"] == 4
    assert whole["perplexity"] < 1.01
    for part in ("scored", "generated"):
        for tokens in whole["usage"][part].values():
            assert tokens["mean_use"] == tokens["last_layer_share"] == 1
            assert tokens["mean_depth"] == document["num_layers"]


def test_readout_counts_are_those_of_the_profiler(
    subject: Subject, rows: list[Row], document: artifacts.Document
) -> None:
    samples = subject.encode(rows, max_new_tokens=16)
    for alpha in (0.1, 0.6):
        profile = trace_model(
            subject.model, subject.checkpoint, samples, responses="dataset", lac=LacSettings(alpha=alpha), batch_size=3
        )
        counted = find(document, "readout", alpha)["usage"]["scored"]
        for phase in Phase:
            statistics = profile.statistics(phase)
            assert counted[phase]["num_tokens"] == statistics.num_tokens
            assert counted[phase]["active"] == statistics.active


def test_the_fixed_readout_has_the_mean_depth_of_each_part(document: artifacts.Document) -> None:
    for alpha in (0.1, 0.6):
        usage = find(document, "readout", alpha)["usage"]
        control = find(document, "fixed readout", alpha)
        for part in ("scored", "generated"):
            depth = control["rules"][part]["depth"]
            assert abs(depth - usage[part]["read"]["mean_depth"]) <= 0.5
            assert control["usage"][part]["read"]["mean_depth"] == depth


def test_random_layers_are_as_many_where_the_tokens_are_the_same(document: artifacts.Document) -> None:
    for alpha in (0.1, 0.6):
        mask, control = (find(document, name, alpha)["usage"]["scored"] for name in ("mask", "random layers"))
        for phase in ("prefill", "decode", "read"):
            assert sum(control[phase]["active"]) == sum(mask[phase]["active"])
            assert control[phase]["active"] != mask[phase]["active"]


def test_the_static_schedule_runs_as_many_layers(document: artifacts.Document) -> None:
    for alpha in (0.1, 0.6):
        for mode in ("readout", "mask"):
            usage = find(document, mode, alpha)["usage"]
            static = find(document, f"static, as {mode}", alpha)
            for part, rule in static["rules"].items():
                for phase in Phase:
                    wanted = usage[part][phase]["mean_use"] * document["num_layers"]
                    assert abs(rule["executed"][phase] - wanted) <= 0.5 + 1e-4


def test_results_depend_on_neither_batch_nor_run(
    subject: Subject, rows: list[Row], document: artifacts.Document
) -> None:
    settings = AdaptiveSettings(alphas=(0.6,), max_new_tokens=16, batch_size=1)
    alone = evaluate_adaptively(subject, rows, dataset="two tasks", settings=settings)
    for run in alone["runs"]:
        other = find(document, run["name"], run["alpha"])
        for key in ("accuracy", "same_as_whole", "usage", "rules"):
            assert run[key] == other[key], (run["name"], key)
        assert run["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)


def test_a_model_that_uses_a_third_of_its_layers_needs_them_all(babyllama: TinyModel) -> None:
    """The headline of the paper on a trained model: few layers are active, the last one nearly always, so nothing was skipped."""
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends. One day, "
        "she saw a big red ball. She wanted to play with it, but it was too high. Her mom helped her to get it and they were happy."
    )
    settings = AdaptiveSettings(alphas=(0.2,), static=True)
    subject = open_subject(str(babyllama.folder), device="cpu")
    document = evaluate_adaptively(subject, [Row(place="here", text=story)], dataset="story", settings=settings)
    perplexity = {run["name"]: run["perplexity"] for run in document["runs"]}
    usage = find(document, "readout", 0.2)["usage"]["scored"]
    assert usage["decode"]["mean_use"] < 0.5
    assert usage["read"]["last_layer_share"] > 0.95
    assert perplexity["readout"] < 1.2 * perplexity["whole model"]
    assert perplexity["mask"] > 100 * perplexity["whole model"]
    assert perplexity["static, as readout"] > 100 * perplexity["whole model"]


def test_choices_are_answered_by_the_likeliest(subject: Subject) -> None:
    rows = [
        Row(
            place=row.place,
            messages=row.messages,
            answer=row.response,
            choices=tuple(dict.fromkeys((row.response or "", "Answer: no", "Answer: yes, it is"))),
            group="chosen",
        )
        for row in task_rows("yes-no", num_items=3)
    ]
    settings = AdaptiveSettings(modes=(Mode.READOUT,), alphas=(0.1,), batch_size=2)
    document = evaluate_adaptively(subject, rows, dataset="choices", settings=settings)
    whole = document["runs"][0]
    assert whole["accuracy"]["chosen"]["num_right"] == 3
    assert sum(whole["answers"]["chosen"].values()) == 3
    assert set(whole["usage"]) == {"scored"}
    assert whole["perplexity"] is None


def test_sampling_is_the_same_each_time_and_by_its_seed(subject: Subject, rows: list[Row]) -> None:
    def sample(seed: int) -> artifacts.Document:
        settings = AdaptiveSettings(
            modes=(Mode.READOUT,), alphas=(0.6,), max_new_tokens=8, sampling=Sampling(1.5, 0.99, seed)
        )
        questions = [Row(place=row.place, messages=row.messages, answer=row.answer, group="g") for row in rows]
        return evaluate_adaptively(subject, questions, dataset="d", settings=settings)

    first = sample(0)
    assert sample(0) == first
    assert [run["usage"] for run in sample(1)["runs"][1:]] != [run["usage"] for run in first["runs"][1:]]
    assert first["settings"]["sampling"] == {"temperature": 1.5, "top_p": 0.99, "top_k": None, "seed": 0}


def test_answers_are_read_by_the_function_that_is_given(subject: Subject) -> None:
    rows = [Row(place="here", messages=({"role": "user", "content": "Say."},), answer="B", group="letters")]
    settings = AdaptiveSettings(modes=(Mode.MASK,), alphas=(0.8,), max_new_tokens=4)
    document = evaluate_adaptively(subject, rows, dataset="d", settings=settings, find_answer=lambda _text: "B")
    assert [run["accuracy"]["letters"]["num_right"] for run in document["runs"]] == [1, 1, 1]
    assert document["runs"][0]["answers"] == {"letters": {"B": 1}}


def test_nothing_to_do_is_refused(subject: Subject) -> None:
    with pytest.raises(DatasetError, match="no sample has a response or an answer"):
        evaluate_adaptively(
            subject,
            [Row(place="here", messages=({"role": "user", "content": "Say."},))],
            dataset="d",
            settings=AdaptiveSettings(),
        )


def test_a_bundle_has_its_layers_already(tmp_path: Any) -> None:
    (tmp_path / "voidprune.json").write_text("{}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(open_subject("demo", device="cpu").checkpoint.folder / name)
    with pytest.raises(ModelError, match="is a bundle and has its layers already"):
        open_subject(str(tmp_path))


def test_the_model_is_left_as_it_was(subject: Subject, document: artifacts.Document) -> None:
    assert document["runs"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    assert subject.model.dtype is torch.float32
