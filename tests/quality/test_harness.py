"""The adapter for lm-evaluation-harness: what is prompt and what is response, likelihoods, stop strings, what does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'voidprune[eval]'")

from voidprune.errors import ContextLengthError, DatasetError
from voidprune.execution.reference import scheduled
from voidprune.models.pretrained import end_tokens, load_model, load_tokenizer
from voidprune.pipeline.models import demo_folder, open_model
from voidprune.quality.harness import PhasedLM
from voidprune.schedule import Boundary, dropped_schedule, full_schedule

TOKENIZER = load_tokenizer(demo_folder())
ENDS = end_tokens(demo_folder())


@dataclass
class Recorder:
    """A runner that remembers its prompts and responses, finds all tokens equally likely, and generates what it is given."""

    generated: list[int] = field(default_factory=list)
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    vocab_size: int = len(TOKENIZER)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        self.seen += [(tuple(prompt), ()) for prompt in prompts]
        return [self.generated[:max_new_tokens] for _ in prompts]

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Any]:
        raise AssertionError("not used")

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        self.seen += [(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        value = -math.log(self.vocab_size)
        return [np.full((len(response), self.vocab_size), value, np.float32) for response in responses]


def adapter(runner: Any, **arguments: Any) -> PhasedLM:
    return PhasedLM(runner, TOKENIZER, **{"end_tokens": ENDS, "context_length": 64, **arguments})


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def text_of(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens)))


def test_context_is_the_prompt_and_continuation_the_response() -> None:
    runner = Recorder()
    results = adapter(runner).loglikelihood(requests(("Ann likes", " tea"), ("", "Ann")), disable_tqdm=True)
    seen = dict(runner.seen)
    prompts = {text_of(prompt): text_of(response) for prompt, response in seen.items()}
    start = TOKENIZER.decode([adapter(runner).prefix_token_id])
    assert sorted(prompts.values()) == [" tea", "Ann"]
    assert start in prompts, "an empty context is the prefix token"
    for (likelihood, _), text in zip(results, (" tea", "Ann"), strict=True):
        num_tokens = next(len(response) for response in seen.values() if text_of(response) == text)
        assert likelihood == pytest.approx(-num_tokens * math.log(runner.vocab_size), rel=1e-5)


def test_a_context_with_a_start_token_gets_no_second_one() -> None:
    model = adapter(Recorder())
    templated = model.apply_chat_template([{"role": "user", "content": "Ann"}])
    assert model.tok_encode(templated) == TOKENIZER(templated, add_special_tokens=False)["input_ids"]
    assert model.tok_encode("Ann") == TOKENIZER("Ann")["input_ids"]


def test_rolling_predicts_every_token_once() -> None:
    text = "Ann likes tea. Ben visits Oslo. Carl plays chess. Dora wears green."
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    whole, pieces = Recorder(), Recorder()
    (at_once,) = adapter(whole).loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    model = adapter(pieces, context_length=5)
    (in_windows, empty) = model.loglikelihood_rolling(requests((text,), ("",)), disable_tqdm=True)
    assert whole.seen == [((model.prefix_token_id,), tuple(tokens))]
    assert sum(len(response) for _, response in pieces.seen) == len(tokens)
    assert max(len(prompt) + len(response) for prompt, response in pieces.seen) <= 6
    assert at_once == pytest.approx(in_windows)
    assert empty == 0.0


def test_what_does_not_fit_is_cut_and_counted_or_refused() -> None:
    runner = Recorder(generated=[*ENDS])
    model = adapter(runner, context_length=8)
    long = "Ann likes tea. Ben visits Oslo. Carl plays chess."
    model.loglikelihood(requests((long, " tea"), ("Ann", " tea")), disable_tqdm=True)
    assert model.num_cut == 1
    assert max(len(prompt) + len(response) for prompt, response in runner.seen) == 9, "the last is only predicted"
    model.generate_until(requests((long, {"max_gen_toks": 3})))
    assert model.num_cut == 2
    assert len(runner.seen[-1][0]) == 5
    with pytest.raises(ContextLengthError, match="cannot be scored in a context of 8"):
        model.loglikelihood(requests(("Ann", long)), disable_tqdm=True)
    with pytest.raises(ContextLengthError, match="asks for 8 new tokens"):
        model.generate_until(requests(("Ann", {"max_gen_toks": 8})))


def test_generation_stops_before_the_first_stop_string() -> None:
    runner = Recorder(generated=[*TOKENIZER("Fact: tea. Answer: yes", add_special_tokens=False)["input_ids"], *ENDS])
    model = adapter(runner, max_new_tokens=40)
    settings = [{"until": ["Answer", ":"]}, {"until": "nowhere"}, {}, {"max_gen_toks": 2, "until": []}]
    texts = model.generate_until(requests(*(("Ann", one) for one in settings)))
    assert texts[0] == "Fact"
    assert texts[1] == texts[2] == "Fact: tea. Answer: yes"
    assert texts[3] == TOKENIZER.decode(runner.generated[:2], skip_special_tokens=True)
    with pytest.raises(DatasetError, match="sampling"):
        model.generate_until(requests(("Ann", {"do_sample": True, "temperature": 0.7})))


@pytest.mark.parametrize("boundary", Boundary)
def test_likelihoods_are_those_of_the_schedule(boundary: Boundary) -> None:
    """Through the adapter or straight from the runner; greedy is what the runner would generate."""
    checkpoint = open_model("demo")
    model = load_model(checkpoint.folder)
    prompt, response = "Ann likes tea. Ben", " visits Oslo."
    tokens = [TOKENIZER(prompt)["input_ids"], TOKENIZER(response, add_special_tokens=False)["input_ids"]]
    schedules = (full_schedule(checkpoint.identity, boundary=boundary), dropped_schedule(checkpoint.identity, {3, 5}))
    found = []
    for schedule in schedules:
        with scheduled(model, schedule) as runner:
            lm = adapter(runner)
            (generated,) = runner.generate([tokens[0]], max_new_tokens=4)
            pairs = [(prompt, response), (prompt, text_of(generated))]
            (first, second) = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
            (score,) = runner.score([tokens[0]], [tokens[1]])
        assert first[0] == pytest.approx(score.sum(), abs=1e-4)
        assert second[1] is (lm._encode_pair(*pairs[1])[1] == generated)
        found.append(first[0])
    assert found[0] != pytest.approx(found[1], abs=0.01)


def test_contexts_are_shown_before_they_are_run() -> None:
    """As they are asked, before any is cut; those without words are not."""
    shown: list[str] = []
    runner = Recorder(generated=[*ENDS])
    model = adapter(runner, check_prompts=lambda prompts: shown.extend(map(text_of, prompts)))
    model.loglikelihood(requests(("Ann likes", " tea"), ("", "Ann")), disable_tqdm=True)
    model.loglikelihood_rolling(requests(("Ann likes tea.",)), disable_tqdm=True)
    model.generate_until(requests(("Ben", {"max_gen_toks": 2}), ("", {"max_gen_toks": 2})), disable_tqdm=True)
    assert [text.strip() for text in shown] == ["Ann likes", "Ben"]

    def refuse(_prompts: Sequence[Sequence[int]]) -> None:
        raise DatasetError("seen")

    untouched = Recorder()
    with pytest.raises(DatasetError, match="seen"):
        adapter(untouched, check_prompts=refuse).generate_until(requests(("Ben", {})), disable_tqdm=True)
    assert untouched.seen == []
