"""lm-evaluation-harness runs a schedule or a bundle, with the phases kept apart: context is prefill, continuation is decode.

- `loglikelihood`: the context is the prompt, the continuation the response, with the boundary rule of the schedule in between.
- `loglikelihood_rolling`: plain text has no prompt. The first window's prompt is the prefix token alone, so the text runs the
  decode schedule; where a text needs several windows, what a later one repeats of the text before it is prompt, and runs the
  prefill schedule. The start token comes once, as prefix; lm_eval's own model for transformers may also predict it.
- `generate_until`: greedy; a response ends at an end token, the longest length, or before the first stop string.

Needs the extra `eval`. Only this module and `pipeline.harness` know lm_eval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from voidprune.errors import ContextLengthError, DatasetError
from voidprune.quality.agreement import PREDICTED_VALUES, batches
from voidprune.quality.evaluation import Runner, chunks

Tokens = Sequence[int]


class PhasedLM(TemplateLM):  # type: ignore[misc]
    """A runner as lm_eval wants a model. `num_cut` counts the requests whose context was cut on the left to fit."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        end_tokens: Sequence[int],
        context_length: int,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        on_progress: Callable[[int], None] = lambda _requests: None,
        check_prompts: Callable[[Sequence[Tokens]], None] = lambda _prompts: None,
    ) -> None:
        """`max_new_tokens` is for tasks that name no length of their own. `check_prompts` sees contexts, whole, before they are
        run, and may raise. Plain text, which has none, and empty contexts are not among them.
        """
        super().__init__()
        self.runner = runner
        self.tokenizer = tokenizer
        self.end_tokens = tuple(end_tokens)
        self.max_length = context_length
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.check_prompts = check_prompts
        self.num_cut = 0

    @property
    def eot_token_id(self) -> int:
        own = self.tokenizer.eos_token_id
        return int(own if own in self.end_tokens or not self.end_tokens else self.end_tokens[0])

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of: the start token, or for want of one the end token."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: there is no template
            raise DatasetError(
                f"the model's chat template refuses the task: {str(error).splitlines()[0]}",
                hint="leave --apply-chat-template out",
            ) from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens are added unless the text begins with the start token already."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        self.check_prompts([context for _, context, _ in requests if context not in ([], [self.prefix_token_id])])
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Tokens, Tokens]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for pair in pairs:
                windows.append(make_disjoint_window(pair))
                owners.append(number)
        totals = np.zeros(len(requests))
        for owner, (likelihood, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += likelihood
        return [float(total) for total in totals]

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give."""
        results: dict[int, tuple[float, bool]] = {}
        fitting = [self._fit(context, continuation) for context, continuation in pairs]
        lengths = [len(continuation) for _, continuation in fitting]
        most = max(1, PREDICTED_VALUES // self.runner.vocab_size)
        for indices in batches(lengths, batch_size=self.batch_size, max_tokens=most):
            predictions = self.runner.predict([fitting[i][0] for i in indices], [fitting[i][1] for i in indices])
            for index, predicted_TV in zip(indices, predictions, strict=True):
                targets_T = np.array(fitting[index][1])
                chosen_T = predicted_TV[np.arange(len(targets_T)), targets_T]
                is_greedy = bool((predicted_TV.argmax(-1) == targets_T).all())
                results[index] = (float(chosen_T.sum(dtype=np.float64)), is_greedy)
            self.on_progress(len(indices))
        return [results[index] for index in range(len(pairs))]

    def _fit(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The last token is only predicted, so one more than the context of the model fits."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            raise ContextLengthError(
                f"a continuation of {len(continuation)} tokens cannot be scored in a context of {self.max_length}",
                hint="choose another task",
            )
        self.num_cut += len(context) > room
        return context[-room:], continuation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        results: dict[int, str] = {}
        settings = [self._generation_settings(request.args[1]) for request in requests]
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        self.check_prompts([prompt for prompt in prompts if prompt != [self.prefix_token_id]])
        for length in sorted({longest for _, longest in settings}):
            if length >= self.max_length:
                raise ContextLengthError(
                    f"the task asks for {length} new tokens; the model's context is {self.max_length}",
                    hint="lower --max-new-tokens, or choose another task",
                )
            order = sorted(
                (index for index, (_, longest) in enumerate(settings) if longest == length),
                key=lambda index: len(prompts[index]),
            )
            for indices in chunks(order, self.batch_size):
                room = self.max_length - length
                self.num_cut += sum(len(prompts[index]) > room for index in indices)
                responses = self.runner.generate(
                    [prompts[index][-room:] for index in indices], max_new_tokens=length, end_tokens=self.end_tokens
                )
                for index, response in zip(indices, responses, strict=True):
                    text = str(self.tokenizer.decode(response, skip_special_tokens=True))
                    for stop in settings[index][0]:
                        text = text.partition(stop)[0]
                    results[index] = text
                self.on_progress(len(indices))
        return [results[index] for index in range(len(requests))]

    def _generation_settings(self, arguments: dict[str, Any]) -> tuple[list[str], int]:
        """Stop strings and the longest length. Raises DatasetError for sampling: what is measured here is greedy."""
        if arguments.get("do_sample") and arguments.get("temperature") != 0:
            raise DatasetError(
                "the task asks for sampling; generation is greedy here", hint="set do_sample: false in it"
            )
        until = arguments.get("until") or []
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        longest = next((arguments[name] for name in names if arguments.get(name) is not None), self.max_new_tokens)
        return [stop for stop in ([until] if isinstance(until, str) else until) if stop], int(longest)
