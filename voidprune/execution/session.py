"""A bundle under onnxruntime: both phases over one copy of the weights, K/V buffers shared by both, generation.

Token ids in, logits and token ids out; texts are the business of the caller. Neither torch nor transformers is imported.

Both graphs read the same weights; how that is one copy in memory is told in `providers.py`, and the loop of generation stands in
`generation.py`. Past and present K/V are one buffer on the device of the sessions, so a step writes only what is new, and of a
step only what its head needs comes to the host; of greedy decoding on CUDA, a token (`device_bindings.py`). Rows whose prompts
differ in length are prefilled one by one, straight into their place in the buffers, and decoded together; nothing is ever padded.

Shapes: B rows, T new tokens, M positions of the buffers, N K/V heads, H head size, V vocabulary, X what the graphs give a token:
its logits, or its last hidden state (`heads.py`).
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from voidprune.errors import ContextLengthError, ModelError, RuntimeProviderError
from voidprune.execution.bindings import HostBinding, element_type, find_cache
from voidprune.execution.device_bindings import STRIDE, Binding, BindingKey, DeviceBuffers, DeviceHead, DevicePool
from voidprune.execution.generation import Responses, check_vocabulary
from voidprune.execution.heads import Head, Outputs, ScreenedHead, WholeHead
from voidprune.execution.integrity import check_files
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.execution.providers import open_sessions
from voidprune.execution.row_lengths import LENGTHS
from voidprune.execution.sampling import Sampling
from voidprune.schedule import Boundary, Phase

Array = np.ndarray[Any, Any]
LOGIT_VALUES = 2**24
"""Logits that one step of scoring makes at most: 64 MiB in float32, twice that while they are worked on in float64."""
SCORE_VALUES = 2**24
"""Attention scores of a layer that several tokens of decode make at most: 64 MiB in float32."""
_SPARE_POSITIONS = 32
"""Of K/V buffers, at least, when they are made; an eighth of what they hold where that is more."""
_HOST_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int8)": np.int8,
}


class BundleSession:
    """An exported bundle, loaded. `start` gives a conversation; `generate` and `score` are whole tasks.

    `weight_copies` and `device_bytes` are those of `providers.OpenSessions`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "cpu",
        prepack: bool = True,
        as_exported: bool = False,
        verify_hashes: bool = False,
    ) -> None:
        """Raises ModelError, CheckpointError and ArtifactError (files damaged), RuntimeProviderError (provider absent or unable).

        `prepack` and `as_exported` are those of `providers.open_sessions`: fast steps, or open at once; steps made faster, or what
        the files say. With `verify_hashes` every file is read and
        compared with its hash, not only sizes, headers and graphs.
        """
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        if not self.manifest.graphs:
            raise ModelError(f"{folder} holds no ONNX graphs", hint="export it with --format onnx")
        check_files(folder, self.manifest, verify_hashes=verify_hashes)
        self.provider = provider
        opened = open_sessions(folder, self.manifest, provider=provider, prepack=prepack, as_exported=as_exported)
        self.weight_copies, self.device_bytes = opened.weight_copies, opened.device_bytes
        self._weights = opened.weights
        self.sessions, self.choices, self.last_only = opened.by_phase, opened.choices, opened.last_only
        self.scored_heads = opened.scored_heads
        self.boundary = self.manifest.schedule.boundary
        result = self.sessions[Phase.DECODE].get_outputs()[0]
        if result.type not in _HOST_DTYPES:
            raise RuntimeProviderError(
                f"this runner has no host type for logits of {result.type}", hint="export with --precision fp16 or fp32"
            )
        self.head: Head = WholeHead(int(result.shape[-1])) if opened.head is None else ScreenedHead(folder, opened.head)
        self.vocab_size = self.head.vocab_size
        self.takes_lengths = LENGTHS in {value.name for value in self.sessions[Phase.DECODE].get_inputs()}
        self.dtype = np.dtype(_HOST_DTYPES[result.type])
        self.kv_shapes, held = find_cache(self.sessions.values())
        self.kv_dtype = np.dtype(_HOST_DTYPES[held]) if held else self.dtype
        self.pool: DevicePool | None = None
        if opened.weights is not None:
            self.head = DeviceHead(self.vocab_size)
            self.pool = DevicePool(self.kv_shapes, self.kv_dtype, device=provider, captures=opened.captures)

    def start(self, num_rows: int = 1, *, max_positions: int) -> Conversation:
        """K/V buffers for `num_rows` token sequences of at most `max_positions` tokens each. Raises ContextLengthError."""
        if max_positions < 1:
            raise ContextLengthError(f"{max_positions} positions hold no token", hint="ask for one or more")
        if max_positions > self.manifest.context_length:
            raise ContextLengthError(
                f"{max_positions} tokens are asked for; the model's context is {self.manifest.context_length}",
                hint="shorten the prompt or lower --max-new-tokens",
            )
        return Conversation(self, num_rows=num_rows, max_positions=max_positions)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Responses, each up to and including its end token; greedy without `sampling`. Rows are decoded together."""
        responses: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return responses
        for row, token in self.stream(prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens, sampling=sampling):
            responses[row].append(token)
        return responses

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> Responses:
        """The same, a token at a time. Raises ContextLengthError and ModelError before anything is run."""
        conversation = self.start(len(prompts), max_positions=max(map(len, prompts)) + max_new_tokens)
        return Responses(conversation, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens, sampling=sampling)

    def score(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Log-probability, in nats, of each response token, teacher-forced: prefill, then decode."""
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            pieces = []
            for tokens, logits_TV in self._response_logits(prompt, response):
                predicted_TV = _log_softmax(logits_TV.astype(np.float64))
                pieces.append(np.take_along_axis(predicted_TV, np.array(tokens)[:, np.newaxis], axis=-1)[:, 0])
            scores.append(np.concatenate(pieces))
        return scores

    def predict(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        """Log-probabilities, in nats, of the whole vocabulary where each response token is due: [T, V] an item, teacher-forced.

        The caller keeps the sum of T small enough for memory.
        """
        return [
            np.concatenate(
                [_log_softmax(logits_TV.astype(np.float32)) for _, logits_TV in self._response_logits(prompt, response)]
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _response_logits(self, prompt: Sequence[int], response: Sequence[int]) -> Iterator[tuple[Sequence[int], Array]]:
        """Pieces of a response, and the logits [T, V] where their tokens are due; at most LOGIT_VALUES logits a piece."""
        check_vocabulary(np.array(response, np.int64), self.vocab_size)
        conversation = self.start(max_positions=len(prompt) + len(response) - 1)  # the last token is never fed
        yield response[:1], conversation.prefill([prompt])
        size = max(1, LOGIT_VALUES // self.vocab_size)
        for start in range(0, len(response) - 1, size):
            tokens = response[start : min(start + size, len(response) - 1)]
            yield response[start + 1 : start + 1 + len(tokens)], conversation.decode(np.array([tokens]))[0]


class Conversation:
    """K/V buffers of some token sequences, and the `tokens` of each that are in them. Made by `BundleSession.start`.

    On the CPU the buffers are a little longer than what is in them, and at most of `max_positions`: they grow by copying, and get
    shorter when much is forgotten. Elsewhere they are made as long as they may get.
    """

    def __init__(self, session: BundleSession, *, num_rows: int, max_positions: int) -> None:
        self.session = session
        self.max_positions = max_positions
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.num_positions = 0
        self.buffers: dict[str, ort.OrtValue] = {}
        self._bindings: dict[BindingKey, Binding] = {}
        self._on_device: DeviceBuffers | None = None
        self._num_steps = 0
        if session.pool is not None:
            self.num_positions = min(-(-max_positions // STRIDE) * STRIDE, session.manifest.context_length)
            self._on_device = session.pool.take(num_rows, self.num_positions)
            giving_back = weakref.finalize(self, session.pool.keep, num_rows, self.num_positions, self._on_device)
            giving_back.atexit = False
        elif session.provider != "cpu":
            self._make_buffers(max_positions)

    def _fit_buffers(self, length: int) -> None:
        """On the CPU, to so many tokens a row, where they are too short for them or much too long."""
        if self._on_device is not None:
            return
        needed = min(self.max_positions, length + max(_SPARE_POSITIONS, length // 8))
        if self.session.provider == "cpu" and not length <= self.num_positions <= 2 * needed:
            self._make_buffers(needed)

    def _make_buffers(self, num_positions: int) -> None:
        """Of so many positions, with what was in those before. Whatever interrupts it, the conversation is as it was."""
        made: dict[str, ort.OrtValue] = {}
        common = min(num_positions, self.num_positions)
        # Zeros of any type are zero bytes, and numpy has no bfloat16 that onnxruntime takes.
        bits = np.dtype(f"u{self.session.kv_dtype.itemsize}")
        for name, (num_kv_heads, head_dim) in self.session.kv_shapes.items():
            content = np.zeros([len(self.tokens), num_kv_heads, num_positions, head_dim], bits)
            if name in self.buffers:
                content[:, :, :common] = self.buffers[name].numpy()[:, :, :common]
            made[name] = ort.OrtValue.ortvalue_from_numpy(content, self.session.provider)
        self._bindings.clear()
        self.buffers, self.num_positions = made, num_positions

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [len(row) for row in self.tokens]

    def rewind(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens of each row."""
        for row in self.tokens:
            del row[length:]
        if self.buffers:
            self._fit_buffers(max(self.lengths))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Process one prompt a row, behind what is there already. Returns the logits of the last tokens, [B, V].

        Raises ContextLengthError, and ModelError for more or fewer prompts than rows, an empty prompt, a token that the model has
        not, or a second turn under a single-turn schedule.
        """
        return self.session.head.logits(self._prefill(prompts))[:, -1]

    def prefill_greedily(self, prompts: Sequence[Sequence[int]]) -> Array:
        """The same, for the likeliest next tokens alone, [B]: often sooner."""
        return self.session.head.likeliest(self._prefill(prompts))[:, -1]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Outputs:
        """What the graphs give of the last tokens, [B, 1, X]."""
        if len(prompts) != len(self.lengths):
            raise ModelError(
                f"{len(prompts)} prompts are given to a conversation of {len(self.lengths)} rows",
                hint="start a conversation with a row for each prompt",
            )
        if not all(prompts):
            raise ModelError("a prompt has no tokens", hint="give at least one token")
        if self.session.manifest.schedule.single_turn and any(self.lengths):
            raise ModelError(
                "the schedule is single-turn: its decode writes no K/V for layers that only prefill runs",
                hint="start a new conversation, or plan without --single-turn",
            )
        fresh = not any(self.lengths)
        if fresh and len(set(map(len, prompts))) == 1:
            return self._prefill_rows(np.array(prompts, np.int64), slice(0, len(prompts)))
        self._check_room(lengths := [*map(operator.add, self.lengths, map(len, prompts))])
        self._fit_buffers(max(lengths))  # once for all rows
        rows = [
            self._prefill_rows(np.array([prompt], np.int64), slice(row, row + 1)) for row, prompt in enumerate(prompts)
        ]
        return self.session.head.join(rows, axis=0)

    def _prefill_rows(self, tokens_BT: Array, rows: slice) -> Outputs:
        is_decode_step = self.session.boundary is Boundary.DECODE and tokens_BT.shape[1] == 1
        phase = Phase.DECODE if is_decode_step else Phase.PREFILL
        size = tokens_BT.shape[1]
        if not self.session.last_only[phase]:  # one graph for both phases, which makes logits of every token
            size = max(1, LOGIT_VALUES // (len(tokens_BT) * self.session.vocab_size))
        for start in range(0, tokens_BT.shape[1], size):
            outputs_BTX = self._run(phase, tokens_BT[:, start : start + size], rows)
        return outputs_BTX[:, -1:]

    def decode(self, tokens_BT: Array) -> Array:
        """Process T generated tokens a row. Returns the logits after each, [B, T, V]. Raises ContextLengthError, ModelError."""
        return self.session.head.logits(self._decode(tokens_BT))

    def decode_greedily(self, tokens_BT: Array) -> Array:
        """The same, for the likeliest next tokens alone, [B, T]: often sooner."""
        return self.session.head.likeliest(self._decode(tokens_BT, reuse=True))

    def _decode(self, tokens_BT: Array, *, reuse: bool = False) -> Outputs:
        """What the graphs give of each token, [B, T, X]. With `reuse` it may be overwritten by the next step."""
        num_rows, num_tokens = tokens_BT.shape
        if num_tokens == 1:
            return self._run(Phase.DECODE, tokens_BT, slice(0, num_rows), reuse=reuse)
        self._check_room([length + num_tokens for length in self.lengths])
        check_vocabulary(tokens_BT, self.session.vocab_size)
        size = max(1, SCORE_VALUES // max(1, self.session.scored_heads * self.max_positions))
        rows = []
        for row in range(num_rows):
            pieces = [tokens_BT[row : row + 1, start : start + size] for start in range(0, num_tokens, size)]
            outputs = [self._run(Phase.DECODE, piece, slice(row, row + 1)) for piece in pieces]
            rows.append(self.session.head.join(outputs, axis=1))
        return self.session.head.join(rows, axis=0)

    def _run(self, phase: Phase, tokens_BT: Array, rows: slice, *, reuse: bool = False) -> Outputs:
        num_rows, num_tokens = tokens_BT.shape
        lengths = [length + num_tokens for length in self.lengths[rows]]
        self._check_room(lengths)
        check_vocabulary(tokens_BT, self.session.vocab_size)
        self._fit_buffers(max(*lengths, *self.lengths))
        head, num_outputs = self.session.head, 1 if self.session.last_only[phase] else num_tokens
        is_step = phase is Phase.DECODE and num_tokens == 1 and num_rows == len(self.tokens)
        binding = self._binding(phase, rows, repeats=is_step and self._num_steps > 0)
        self._num_steps += is_step
        binding.feed("input_ids", tokens_BT)
        if self.session.takes_lengths:
            binding.feed(LENGTHS, np.array(lengths))
        else:
            # Always as wide: steps of a shape that was seen before took half of the time (docs/results.md, On a GPU).
            is_wide = is_step and self._on_device is not None
            binding.feed_mask(lengths, self.num_positions if is_wide else max(lengths))
        shape = (num_rows, num_outputs, head.width)
        outputs_BTX = binding.bind_result(head.output, shape, self.session.dtype, reuse=reuse)
        binding.run()
        for row, tokens in zip(self.tokens[rows], tokens_BT.tolist(), strict=True):
            row += tokens
        return outputs_BTX

    def _check_room(self, lengths: Sequence[int]) -> None:
        """Raise ContextLengthError where rows of these lengths are too long."""
        if max(lengths) > self.max_positions:
            raise ContextLengthError(
                f"{max(lengths)} tokens do not fit into K/V buffers of {self.max_positions} positions",
                hint="start the conversation with more positions",
            )

    def _binding(self, phase: Phase, rows: slice, *, repeats: bool) -> Binding:
        """Past and present bound to the rows' part of the buffers: rows lie one behind the other.

        `repeats`: for steps of all rows behind the first, which are worth capturing.
        """
        bindings = self._bindings if self._on_device is None else self._on_device.bindings
        key = (phase, rows.start, rows.stop, repeats)
        if key not in bindings:
            binding, places, kv_dtype = self._make_binding(phase, repeats=repeats), self._places, self.session.kv_dtype
            for name, choice in self.session.choices[phase].items():
                binding.bound.bind_cpu_input(name, choice)
            for argument in self.session.sessions[phase].get_inputs():
                if argument.name in places:
                    address, (_, *shape) = places[argument.name]
                    row_bytes = kv_dtype.itemsize * math.prod(shape)
                    place = (
                        self.session.provider,
                        0,
                        element_type(kv_dtype),
                        [rows.stop - rows.start, *shape],
                        address + rows.start * row_bytes,
                    )
                    binding.bound.bind_input(argument.name, *place)
                    binding.bound.bind_output(argument.name.replace("past_key_values", "present"), *place)
            bindings[key] = binding
        return bindings[key]

    def _make_binding(self, phase: Phase, *, repeats: bool) -> Binding:
        session = self.session.sessions[phase]
        if self._on_device is None:
            return HostBinding(session, on_cpu=self.session.provider == "cpu")
        assert self.session.pool is not None, "it has given the buffers"
        return self.session.pool.bind(session, captures=repeats)

    @property
    def _places(self) -> dict[str, tuple[int, Sequence[int]]]:
        """Address and shape of each buffer."""
        if self._on_device is None:
            return {name: (buffer.data_ptr(), buffer.shape()) for name, buffer in self.buffers.items()}
        return {name: (tensor.data_ptr(), tensor.shape) for name, tensor in self._on_device.tensors.items()}


def remove_padding(tokens_BT: Array, attention_mask_BT: Array) -> list[list[int]]:
    """The prompts of a batch that was padded, on either side, as transformers' tokenizers do it: what `prefill` takes.

    `attention_mask_BT` is 0 where a token is padding. Nothing is ever padded here, so rows come out the same in any batch.
    """
    return [
        [int(token) for token in tokens_T[mask_T != 0]]
        for tokens_T, mask_T in zip(np.asarray(tokens_BT), np.asarray(attention_mask_BT), strict=True)
    ]


def _log_softmax(logits_TV: Array) -> Array:
    """In place, in the dtype of the logits."""
    logits_TV -= logits_TV.max(-1, keepdims=True)
    logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return logits_TV
