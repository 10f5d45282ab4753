"""What layers from a depth k up still need from earlier tokens: interventions on their states (arXiv 2409.03621).

"Attend First, Consolidate Later" (Ben-Artzy and Schwartz 2024; code github schwartz-lab-NLP/Attend-First-Consolidate-Later) changes
the states of earlier tokens as they enter layer k, and asks whether the token that is being predicted notices:

- random:          each becomes a Gaussian direction of the same norm, once, before layer k;
- shuffle:         its coordinates are permuted, once, before layer k;
- freeze:          the state that enters layer k is what every layer from k up sees of that token;
- skip-attention:  from k up nothing attends, neither earlier tokens nor the last; MLPs stay;
- switch:          before layer k one token's state becomes that of a token of another prompt.

k = number of layers is the whole model. In the published code a freeze at k starts from what entered layer k - 1.

Which tokens are "earlier" is the scope. `prompt`: all prompt tokens but the last; generated tokens run the whole model, and there
is a cache as ever (SwiftKV, POP). `published`: at every step all tokens but the last one, generated ones too. The published code
runs all tokens again for every new one; here the same comes from the cache: the newest token's entries are dropped and made again
as those of an earlier token, beside the next one. Skip-attention and switch are the same in both scopes.

What is drawn depends on the seed, the prompt and the position alone: not on the batch, on k, or on whether a response is generated
or scored. Padding is never touched. Shapes: B rows, T tokens of this pass, S tokens with the past, D hidden size, V vocabulary,
R tokens of a response.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from voidprune.models.families import find_family
from voidprune.models.pretrained import generate_greedily
from voidprune.profiling.calibration import Sample

LOGIT_VALUES = 2**26
"""Logits that one pass of scoring makes at most, unless a single response needs more: 256 MiB in float32."""

Prompt = tuple[int, ...]


class Intervention(StrEnum):
    RANDOM = "random"
    FREEZE = "freeze"
    SKIP_ATTENTION = "skip-attention"
    SWITCH = "switch"
    SHUFFLE = "shuffle"

    @property
    def has_scope(self) -> bool:
        """Whether the two scopes differ."""
        return self in (Intervention.RANDOM, Intervention.FREEZE, Intervention.SHUFFLE)


class Scope(StrEnum):
    PROMPT = "prompt"
    PUBLISHED = "published"


@dataclass(frozen=True)
class Donation:
    """The state at `position` of a prompt becomes the one at `donor_position` of the prompt `donor`."""

    position: int
    donor: Prompt
    donor_position: int


@dataclass(frozen=True)
class Probe:
    """An intervention at `depth`, the number of layers below it, which run as ever. Prompts without a donation are not switched."""

    intervention: Intervention
    depth: int
    scope: Scope = Scope.PROMPT
    seed: int = 0
    donations: Mapping[Prompt, Donation] = field(default_factory=dict)


def find_donations(samples: Sequence[Sample]) -> dict[int, tuple[int, Donation]]:
    """For each sample that can be given one: the index of its donor, the next sample of its group with another prompt, and where.

    Two prompts of a task usually end alike; the tokens before that end, the last in which they differ, change places: of "The
    capital of France is" that is France. The last token of a prompt never does. Keys are indices of samples.
    """
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    found = {}
    for members in groups.values():
        for place, index in enumerate(members):
            own = samples[index].prompt
            for donor in (*members[place + 1 :], *members[:place]):
                other = samples[donor].prompt
                if other != own and min(len(own), len(other)) > 1:
                    alike = _common_end(own, other)
                    found[index] = donor, Donation(len(own) - 1 - alike, other, len(other) - 1 - alike)
                    break
    return found


def _common_end(one: Prompt, other: Prompt) -> int:
    """Tokens in which both end, at least one and not all of either."""
    most = min(len(one), len(other)) - 1
    return max(1, next((number for number in range(most) if one[-1 - number] != other[-1 - number]), most))


class ProbedModel:
    """A stock model under an intervention; a `Runner` of quality/evaluation. Use through `probed`, which takes its hooks away."""

    def __init__(self, model: PreTrainedModel, probe: Probe, *, num_layers: int) -> None:
        self.model = model
        self.probe = probe
        self._acts = probe.depth < num_layers
        self._prompts: list[Prompt] = []
        self._num_positions = 0
        self._draws_BPD: Tensor | None = None
        self._frozen_BTD = torch.empty(0)
        self._changed_BT1 = torch.zeros(0, dtype=torch.bool)
        self._given_BT1 = torch.zeros(0, dtype=torch.bool)
        self._position_ids_BT = torch.zeros(0, dtype=torch.long)
        self._donated_BD: Tensor | None = None
        self._captured_BTD: Tensor | None = None
        self._captures = False

    @property
    def reruns(self) -> bool:
        """Whether generated tokens become earlier tokens that are changed, too."""
        return self._acts and self.probe.scope is Scope.PUBLISHED and self.probe.intervention.has_scope

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy responses, each up to and including its end token."""
        self._begin(prompts, max_new_tokens)
        last_B1: Tensor | None = None

        def advance(input_ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache) -> Tensor:
            nonlocal last_B1
            if last_B1 is None:
                logits_B1V = self._run_prompts(input_ids_BT, mask_BS, cache)
            else:
                logits_B1V = self._run_next(last_B1, input_ids_BT, mask_BS, cache)
            last_B1 = input_ids_BT[:, -1:]
            return logits_B1V

        return generate_greedily(advance, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Log-probability, in nats, of each response token, teacher-forced."""
        return [likelihoods for likelihoods, _ in self.judge(prompts, responses)]

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Log-probabilities, in nats, of the whole vocabulary where each response token is due: [R, V] an item, teacher-forced."""
        return [logits_RV.float().log_softmax(-1).cpu().numpy() for logits_RV in self._logits(prompts, responses)]

    def judge(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray[Any, np.dtype[np.float64]], bool]]:
        """What `score` gives, and whether every token is the most likely one, so that greedy decoding gives just this response."""
        judged = []
        for response, logits_RV in zip(responses, self._logits(prompts, responses), strict=True):
            targets_R = torch.tensor(list(response), device=logits_RV.device)
            chosen_R = logits_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1).double()
            likelihoods_R = (chosen_R - logits_RV.double().logsumexp(-1)).cpu().numpy()
            judged.append((likelihoods_R, bool((logits_RV.argmax(-1) == targets_R).all())))
        return judged

    def _logits(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits [R, V] where each response token is due, item by item; prompts end in the same column."""
        longest = max(map(len, responses))
        num_rows = max(1, LOGIT_VALUES // (longest * self.vocab_size))
        for start in range(0, len(prompts), num_rows):
            some = list(responses[start : start + num_rows])
            input_ids_BT, mask_BT = _pad_left(prompts[start : start + num_rows])
            self._begin(prompts[start : start + num_rows], max(map(len, some)))
            fed_BR = _pad_right([response[:-1] for response in some])
            run = self._score_by_steps if self.reruns else self._score_at_once
            for response, logits_RV in zip(some, run(input_ids_BT, mask_BT, fed_BR), strict=True):
                yield logits_RV[: len(response)]

    def _score_at_once(self, prompts_BT: Tensor, mask_BT: Tensor, fed_BR: Tensor) -> Tensor:
        """What is fed behind a shorter response comes after all that is read of its row, so it need not be masked."""
        num_fed = fed_BR.shape[1]
        flags = [True] * (prompts_BT.shape[1] - 1) + [False] * (1 + num_fed)
        return self._forward(
            torch.cat([prompts_BT, fed_BR], dim=1),
            torch.cat([mask_BT, mask_BT.new_ones(fed_BR.shape)], dim=1),
            flags,
            cache=None,
            num_logits=1 + num_fed,
        )

    def _score_by_steps(self, prompts_BT: Tensor, mask_BT: Tensor, fed_BR: Tensor) -> Tensor:
        cache = DynamicCache()
        logits = [self._run_prompts(prompts_BT, mask_BT, cache)]
        last_B1 = prompts_BT[:, -1:]
        for column in range(fed_BR.shape[1]):
            next_B1 = fed_BR[:, column : column + 1]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            logits.append(self._run_next(last_B1, next_B1, mask_BT, cache))
            last_B1 = next_B1
        return torch.cat(logits, dim=1)

    def _run_prompts(self, input_ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, 1, V] of the last token; all others are earlier ones."""
        flags = [True] * (input_ids_BT.shape[1] - 1) + [False]
        return self._forward(input_ids_BT, mask_BT, flags, cache=cache, num_logits=1)

    def _run_next(self, last_B1: Tensor, next_B1: Tensor, mask_BS: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, 1, V] of the next token, to which the one before it is an earlier token where the scope says so."""
        if not self.reruns:
            return self._forward(next_B1, mask_BS, [False], cache=cache, num_logits=1)
        cache.crop(-1)
        return self._forward(torch.cat([last_B1, next_B1], dim=1), mask_BS, [True, False], cache=cache, num_logits=1)

    def _begin(self, prompts: Sequence[Sequence[int]], num_responding: int) -> None:
        """What the next passes have in common: the rows, and room for what is drawn for each of their positions."""
        self._prompts = [tuple(prompt) for prompt in prompts]
        self._num_positions = max(map(len, prompts)) + num_responding
        self._draws_BPD = None
        self._donated_BD = None
        if self._acts and self.probe.intervention is Intervention.SWITCH:
            self._donated_BD = self._donor_states()

    def _donor_states(self) -> Tensor | None:
        """The donors' states as they enter layer k of the whole model, [B, D]; None where no row has a donor."""
        donations = [self.probe.donations.get(prompt) for prompt in self._prompts]
        if not any(donations):
            return None
        rows = [[0] if one is None else one.donor[: one.donor_position + 1] for one in donations]
        input_ids_BT, mask_BT = _pad_left(rows)
        self._captures = True
        try:
            with torch.inference_mode():
                self.model.base_model(
                    input_ids=input_ids_BT.to(self.model.device),
                    attention_mask=mask_BT.to(self.model.device),
                    position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0).to(self.model.device),
                    use_cache=False,
                )
        finally:
            self._captures = False
        assert self._captured_BTD is not None
        return self._captured_BTD[:, -1]

    def _forward(
        self,
        input_ids_BT: Tensor,
        mask_BS: Tensor,
        flags: Sequence[bool],
        *,
        cache: DynamicCache | None,
        num_logits: int,
    ) -> Tensor:
        """Logits of the last `num_logits` tokens; `flags` says of each token of the pass whether it is an earlier one."""
        device, width = self.model.device, input_ids_BT.shape[1]
        is_real_BT = mask_BS[:, -width:].bool()
        position_ids_BT = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        donations = (self.probe.donations.get(prompt) for prompt in self._prompts)
        given_at_B1 = torch.tensor([[-1 if one is None else one.position] for one in donations])
        self._changed_BT1 = (is_real_BT & torch.tensor(list(flags))).unsqueeze(-1).to(device)
        self._given_BT1 = (is_real_BT & (position_ids_BT == given_at_B1)).unsqueeze(-1).to(device)
        self._position_ids_BT = position_ids_BT.to(device)
        with torch.inference_mode():
            logits_BTV: Tensor = self.model(
                input_ids=input_ids_BT.to(device),
                attention_mask=mask_BS.to(device),
                position_ids=self._position_ids_BT,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=num_logits,
            ).logits
        return logits_BTV

    def _enter(self, states_BTD: Tensor, layer: int) -> Tensor | None:
        """What enters a layer in place of `states_BTD`; None for those themselves."""
        if self._captures:
            if layer == self.probe.depth:
                self._captured_BTD = states_BTD
            return None
        match self.probe.intervention:
            case Intervention.SWITCH:
                if self._donated_BD is None or not bool(self._given_BT1.any()):
                    return None
                return torch.where(self._given_BT1, self._donated_BD.unsqueeze(1), states_BTD)
            case Intervention.FREEZE if layer == self.probe.depth:
                self._frozen_BTD = states_BTD
                return None
            case Intervention.FREEZE:
                changed_BTD = self._frozen_BTD
            case Intervention.RANDOM:
                changed_BTD = with_norms_of(states_BTD, self._draws(states_BTD))
            case _:
                changed_BTD = states_BTD.gather(-1, self._draws(states_BTD))
        return torch.where(self._changed_BT1, changed_BTD, states_BTD)

    def _draws(self, states_BTD: Tensor) -> Tensor:
        """What was drawn for the tokens of this pass, [B, T, D]: Gaussian numbers, or permutations of the coordinates."""
        width = states_BTD.shape[-1]
        if self._draws_BPD is None:
            rows = []
            for prompt in self._prompts:
                seed = [self.probe.seed % 2**64, *self.probe.intervention.encode(), *prompt]
                dice, shape = np.random.default_rng(seed), (self._num_positions, width)
                is_random = self.probe.intervention is Intervention.RANDOM
                rows.append(dice.standard_normal(shape, np.float32) if is_random else dice.random(shape).argsort(-1))
            self._draws_BPD = torch.from_numpy(np.stack(rows)).to(states_BTD.device)
        return self._draws_BPD.gather(1, self._position_ids_BT.unsqueeze(-1).expand(-1, -1, width))


def with_norms_of(states_BTD: Tensor, directions_BTD: Tensor) -> Tensor:
    """The directions, each as long as the state in its place; lengths in float32."""
    lengths_BT1 = torch.linalg.vector_norm(states_BTD, dim=-1, keepdim=True, dtype=torch.float32)
    own_BT1 = torch.linalg.vector_norm(directions_BTD, dim=-1, keepdim=True)
    scaled_BTD: Tensor = directions_BTD * (lengths_BT1 / own_BT1)
    return scaled_BTD.to(states_BTD.dtype)


@contextmanager
def probed(model: PreTrainedModel, probe: Probe) -> Iterator[ProbedModel]:
    """Run a stock model under an intervention for the duration of the block."""
    modules = find_family(model.config.to_dict()).modules
    layers: Sequence[nn.Module] = operator.attrgetter(modules.layers)(model)
    assert 0 <= probe.depth <= len(layers)
    running = ProbedModel(model, probe, num_layers=len(layers))
    handles = []
    for number in range(probe.depth, len(layers)):
        if probe.intervention is Intervention.SKIP_ATTENTION:
            attention, _ = modules.branches(layers[number])
            handles.append(attention.register_forward_hook(_give_nothing))
        elif number == probe.depth or probe.intervention is Intervention.FREEZE:
            handles.append(layers[number].register_forward_pre_hook(_entering(running, number), with_kwargs=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _entering(running: ProbedModel, layer: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed_BTD = running._enter(args[0] if args else kwargs["hidden_states"], layer)
        if changed_BTD is None:
            return None
        return ((changed_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed_BTD})

    return hook


def _give_nothing(_module: nn.Module, _args: Any, output: Any) -> Any:
    """The attention's output, without what it would add to the residual stream."""
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T]."""
    width = max(map(len, rows))
    return (
        torch.tensor([[0] * (width - len(row)) + list(row) for row in rows]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    )


def _pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
