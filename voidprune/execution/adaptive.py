"""LAC at run time: layers that count or do not count token by token, on a stock torch model. Nothing here is faster.

LAC (arXiv 2505.14467) asks of every layer and token whether the norm of the state grew by enough:

    d[l]      = |output of layer l| - |input of layer l|
    active[l] = d[l] >= alpha * (max(d[0..l-1]) - min(d[0..l-1]))     the threshold of layers 0 and 1 is 0

and its code (github manishemirani/void_in_language_models, lac.py) does not do what its words say. Hence two rules, never mixed up:

- `Readout`, as published. Every layer runs on the dense stream, keys and values are dense, and the final norm and head read, per
  token, the output of its *last active* layer (the embedding where none is active). No arithmetic is saved. Voids below the last
  active layer change nothing; a token whose last layer is active has the whole model's logits bit for bit.
- `Mask`, what the words say. A layer that is void for a token leaves the token's state as it was; the next layer, its keys and its
  values see that state. d[l] is measured on the stream as it runs: the layer's output, whether it is then used or thrown away, less
  the state that entered. As in the dense rule deltas go on after a void: the change that a void layer would have made counts in the
  range of those above it. (Published code says nothing about this rule; the choice is ours.)

Three controls: `Whole` is the stock model; `FixedReadout` reads every token out after the same number of layers; `RandomMask`
gives each token as many active layers as `Mask` would give the same token in the same text, but draws which. For that it runs
`Mask` first, with a cache of its own.

Unlike the published code no sample sees another one and padding is never counted: per token nothing depends on the batch, up to
rounding that batched arithmetic may turn at a threshold. The published code takes the range of layer 0 over the batch, so there
even the layer 0 of a batch of two differs. Shapes: L layers, B rows, T tokens of this pass, S tokens with the past, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from voidprune.execution.reference import decoder_layers
from voidprune.execution.sampling import Sampling, draw_scores, row_dice
from voidprune.models.families import find_family
from voidprune.models.pretrained import generate_greedily
from voidprune.profiling.profile import LacSettings
from voidprune.schedule import Phase


@dataclass(frozen=True)
class Whole:
    """The stock model."""


@dataclass(frozen=True)
class Readout:
    """LAC as published: per token, the head reads the output of the last active layer."""

    lac: LacSettings


@dataclass(frozen=True)
class Mask:
    """True adaptive skipping: per token, a void layer leaves the state as it was."""

    lac: LacSettings


@dataclass(frozen=True)
class FixedReadout:
    """Control: the head reads every token after `depth` layers; 0 is the embedding, L the whole model."""

    depth: int


@dataclass(frozen=True)
class RandomMask:
    """Control: per token as many active layers as under `Mask`, drawn at random."""

    lac: LacSettings
    seed: int = 0


Rule = Whole | Readout | Mask | FixedReadout | RandomMask


@dataclass(frozen=True)
class Usage:
    """Which layers counted for some tokens.

    `active[l]`: tokens for which layer l was active. `depths[k]`: tokens whose last active layer is the k-th, counted from 1; 0 are
    those with none. Under `FixedReadout` the layers below the readout are the active ones.
    """

    num_tokens: int
    active: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def mean_use(self) -> float:
        """Share of layers and tokens that are active."""
        return sum(self.active) / (self.num_tokens * len(self.active)) if self.num_tokens else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean number of layers up to the last active one."""
        return (
            sum(depth * count for depth, count in enumerate(self.depths)) / self.num_tokens if self.num_tokens else 0.0
        )

    @property
    def last_layer_share(self) -> float:
        """Share of tokens whose last layer is active: there `Readout` is the whole model."""
        return self.depths[-1] / self.num_tokens if self.num_tokens else 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.num_tokens + other.num_tokens,
            tuple(one + two for one, two in zip(self.active, other.active, strict=True)),
            tuple(one + two for one, two in zip(self.depths, other.depths, strict=True)),
        )


@dataclass(frozen=True)
class RunUsage:
    """Usage by prompt tokens (prefill), by response tokens that were fed back (decode), and by the tokens whose logits were used
    (the last prompt token and every response token that something followed): those whose readout has a consequence.

    A prompt that is scored with several responses is counted with each.
    """

    prefill: Usage
    decode: Usage
    read: Usage


class LacDecision:
    """LAC's rule, layer by layer as a pass goes up: the same as `profiling.tracing.lac_activity` where nothing is masked."""

    def __init__(self, lac: LacSettings, *, dtype: torch.dtype) -> None:
        self._alpha = lac.alpha
        self._dtype = torch.float32 if lac.arithmetic == "float32" else dtype
        self._highest_BT: Tensor | None = None
        self._lowest_BT: Tensor | None = None

    def decide(self, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
        """Whether the next layer is active, bool [B, T], from what entered it and what it made of that."""
        norms = [torch.linalg.vector_norm(state, dim=-1, dtype=self._dtype) for state in (before_BTD, after_BTD)]
        change_BT: Tensor = norms[1] - norms[0]
        if self._highest_BT is None or self._lowest_BT is None:
            self._highest_BT = self._lowest_BT = change_BT
            return change_BT >= 0
        active_BT: Tensor = change_BT >= self._alpha * (self._highest_BT - self._lowest_BT)
        self._highest_BT = torch.maximum(self._highest_BT, change_BT)
        self._lowest_BT = torch.minimum(self._lowest_BT, change_BT)
        return active_BT


class _Pass:
    """One pass through the layers. `after_layer` returns what leaves the layer instead of its output, or None."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.active: list[Tensor] = []

    def after_layer(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor | None:
        self.active.append(torch.ones_like(after_BTD[..., 0], dtype=torch.bool))
        return None


class _ReadoutPass(_Pass):
    def __init__(self, num_layers: int, decision: LacDecision) -> None:
        super().__init__(num_layers)
        self._decision = decision
        self._read_BTD = torch.empty(0)

    def after_layer(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor | None:
        self.active.append(self._decision.decide(before_BTD, after_BTD))
        last_BTD = before_BTD if layer == 0 else self._read_BTD
        self._read_BTD = torch.where(self.active[-1].unsqueeze(-1), after_BTD, last_BTD)
        return self._read_BTD if layer == self.num_layers - 1 else None


class _FixedReadoutPass(_Pass):
    def __init__(self, num_layers: int, depth: int) -> None:
        super().__init__(num_layers)
        self._depth = depth
        self._read_BTD = torch.empty(0)

    def after_layer(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor | None:
        self.active.append(torch.full_like(after_BTD[..., 0], layer < self._depth, dtype=torch.bool))
        if layer == 0 or layer < self._depth:
            self._read_BTD = after_BTD if layer < self._depth else before_BTD
        return self._read_BTD if layer == self.num_layers - 1 else None


class _MaskPass(_Pass):
    def __init__(self, num_layers: int, decision: LacDecision) -> None:
        super().__init__(num_layers)
        self._decision = decision

    def after_layer(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor | None:
        self.active.append(self._decision.decide(before_BTD, after_BTD))
        return torch.where(self.active[-1].unsqueeze(-1), after_BTD, before_BTD)


class _ChosenPass(_Pass):
    def __init__(self, num_layers: int, chosen_LBT: Tensor) -> None:
        super().__init__(num_layers)
        self.active = list(chosen_LBT)

    def after_layer(self, layer: int, before_BTD: Tensor, after_BTD: Tensor) -> Tensor | None:
        return torch.where(self.active[layer].unsqueeze(-1), after_BTD, before_BTD)


class AdaptiveModel:
    """A stock model under a rule; a `Runner` of quality/evaluation. Use through `adaptive`, which takes the hooks away again."""

    def __init__(self, model: PreTrainedModel, rule: Rule, sampling: Sampling | None, num_layers: int) -> None:
        self.model = model
        self.rule = rule
        self.sampling = sampling
        self.num_layers = num_layers
        self._pass = _Pass(num_layers)
        self._usage = self._no_usage()

    def take_usage(self) -> RunUsage:
        """What was counted since this was last asked."""
        usage, self._usage = self._usage, self._no_usage()
        return RunUsage(usage["prefill"], usage["decode"], usage["read"])

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int] = ()
    ) -> list[list[int]]:
        """Responses, each up to and including its end token: greedy, or sampled where the runner was given a sampling."""
        dice = self._dice(prompts, "layers")
        sampling_dice = (
            [] if self.sampling is None else [row_dice(self.sampling.seed, "tokens", row) for row in prompts]
        )
        shadow = DynamicCache()
        runs_B = torch.ones(len(prompts), dtype=torch.bool)

        def advance(input_ids_BT: Tensor, mask_BS: Tensor, cache: DynamicCache) -> Tensor:
            nonlocal runs_B
            width = input_ids_BT.shape[1]
            is_prompt = mask_BS.shape[1] == width
            if not is_prompt:  # a row that has ended is decoded on with the others; it no longer counts
                runs_B = runs_B & ~torch.isin(input_ids_BT[:, 0], torch.tensor(list(end_tokens), dtype=torch.long))
            counts_BT = mask_BS[:, -width:].bool() & runs_B[:, None]
            read_BT = torch.zeros_like(counts_BT)
            read_BT[:, -1] = runs_B
            logits_B1V = self._forward(input_ids_BT, mask_BS, cache=cache, shadow=shadow, dice=dice, num_logits=1)
            self._count("prefill" if is_prompt else "decode", counts_BT)
            self._count("read", read_BT)
            if self.sampling is None:
                return logits_B1V
            logits_BV = logits_B1V[:, -1].double().cpu().numpy()
            return torch.from_numpy(draw_scores(logits_BV, self.sampling, sampling_dice)).unsqueeze(1)

        return generate_greedily(advance, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Log-probability, in nats, of each response token, teacher-forced in one pass."""
        scores = []
        for response, logits_TV in zip(responses, self._response_logits(prompts, responses), strict=True):
            predicted_TV = logits_TV.double().log_softmax(-1)
            targets_T1 = torch.tensor(list(response), dtype=torch.long, device=predicted_TV.device).unsqueeze(-1)
            scores.append(predicted_TV.gather(-1, targets_T1).squeeze(-1).cpu().numpy())
        return scores

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Log-probabilities, in nats, of the whole vocabulary where each response token is due: [T, V] an item, teacher-forced."""
        return [
            logits_TV.float().log_softmax(-1).cpu().numpy() for logits_TV in self._response_logits(prompts, responses)
        ]

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]

    def _response_logits(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [T, V] where each response token is due, item by item, from one pass.

        The last response token is not fed: nothing follows it. Rows are padded on the left, so that the logits that are needed
        stand at the end.
        """
        rows = [[*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)]
        width, num_logits = max(map(len, rows)), max(1, *map(len, responses))
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        logits_BTV = self._forward(
            torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            mask_BT,
            cache=None,
            shadow=None,
            dice=self._dice(prompts, "layers"),
            num_logits=num_logits,
        )
        fed = torch.tensor([max(0, len(response) - 1) for response in responses])[:, None]
        due = torch.tensor([len(response) for response in responses])[:, None]
        from_end = torch.arange(width - 1, -1, -1)
        self._count("prefill", mask_BT.bool() & (from_end >= fed))
        self._count("decode", mask_BT.bool() & (from_end < fed))
        self._count("read", mask_BT.bool() & (from_end < due))
        return [
            logits_TV[len(logits_TV) - len(response) :]
            for response, logits_TV in zip(responses, logits_BTV, strict=True)
        ]

    def _forward(
        self,
        input_ids_BT: Tensor,
        mask_BS: Tensor,
        *,
        cache: DynamicCache | None,
        shadow: DynamicCache | None,
        dice: Sequence[np.random.Generator],
        num_logits: int,
    ) -> Tensor:
        """Logits of the last `num_logits` tokens of one pass; `shadow` is the cache of the run that counts for `RandomMask`."""
        device = self.model.device
        width = input_ids_BT.shape[1]
        position_ids_BT = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -width:].to(device)
        inputs = {
            "input_ids": input_ids_BT.to(device),
            "attention_mask": mask_BS.to(device),
            "position_ids": position_ids_BT,
        }
        with torch.inference_mode():
            if isinstance(self.rule, RandomMask):
                self._pass = self._lac_pass(Mask(self.rule.lac))
                self.model.base_model(**inputs, past_key_values=shadow, use_cache=shadow is not None)
                counts_BT = torch.stack(self._pass.active).sum(0)
                is_real_BT = mask_BS[:, -width:].bool()
                self._pass = _ChosenPass(self.num_layers, self._draw_layers(counts_BT, is_real_BT, dice))
            else:
                self._pass = self._lac_pass(self.rule)
            logits_BTV: Tensor = self.model(
                **inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=num_logits
            ).logits
        return logits_BTV

    def _lac_pass(self, rule: Rule) -> _Pass:
        match rule:
            case Readout(lac):
                return _ReadoutPass(self.num_layers, LacDecision(lac, dtype=self.model.dtype))
            case Mask(lac):
                return _MaskPass(self.num_layers, LacDecision(lac, dtype=self.model.dtype))
            case FixedReadout(depth):
                return _FixedReadoutPass(self.num_layers, depth)
        return _Pass(self.num_layers)

    def _draw_layers(self, counts_BT: Tensor, is_real_BT: Tensor, dice: Sequence[np.random.Generator]) -> Tensor:
        """`counts_BT` layers of each token, at random: bool [L, B, T]. Padding draws nothing, so that it shifts nothing."""
        ranks_BTL = torch.zeros((*counts_BT.shape, self.num_layers), dtype=torch.long)
        for row, generator in enumerate(dice):
            draws = generator.random((int(is_real_BT[row].sum()), self.num_layers))
            ranks_BTL[row, is_real_BT[row]] = torch.from_numpy(draws.argsort(-1).argsort(-1))
        return (ranks_BTL.to(counts_BT.device) < counts_BT.unsqueeze(-1)).permute(2, 0, 1)

    def _dice(self, prompts: Sequence[Sequence[int]], purpose: str) -> list[np.random.Generator]:
        if not isinstance(self.rule, RandomMask):
            return []
        return [row_dice(self.rule.seed, purpose, prompt) for prompt in prompts]

    def _no_usage(self) -> dict[str, Usage]:
        empty = Usage(0, (0,) * self.num_layers, (0,) * (self.num_layers + 1))
        return {**dict.fromkeys(map(str, Phase), empty), "read": empty}

    def _count(self, where: str, tokens_BT: Tensor) -> None:
        active_LN = torch.stack(self._pass.active)[:, tokens_BT.to(self._pass.active[0].device)]
        numbers_L1 = torch.arange(1, self.num_layers + 1, device=active_LN.device)[:, None]
        depths_N = (active_LN * numbers_L1).amax(0)
        self._usage[where] += Usage(
            active_LN.shape[1],
            tuple(active_LN.sum(1).tolist()),
            tuple(torch.bincount(depths_N, minlength=self.num_layers + 1).tolist()),
        )


@contextmanager
def adaptive(model: PreTrainedModel, rule: Rule, *, sampling: Sampling | None = None) -> Iterator[AdaptiveModel]:
    """Run a stock model under a rule for the duration of the block, greedily or with a sampling."""
    layers = decoder_layers(model, find_family(model.config.to_dict()).modules)
    assert not isinstance(rule, FixedReadout) or 0 <= rule.depth <= len(layers)
    running = AdaptiveModel(model, rule, sampling, len(layers))

    def hook_of(number: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before_BTD = args[0] if args else kwargs["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output  # transformers 4 returns a tuple in places
            changed_BTD = running._pass.after_layer(number, before_BTD, after_BTD)
            if changed_BTD is None:
                return None
            return (changed_BTD, *output[1:]) if isinstance(output, tuple) else changed_BTD

        return hook

    handles = [layer.register_forward_hook(hook_of(number), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()
