"""A bundle under onnxruntime: two sessions over one copy of the weights, K/V buffers shared by both, generation.

Token ids in, logits and token ids out; texts are the business of the caller. Neither torch nor transformers is imported.

Both graphs read their weights from the same safetensors files. On the CPU in float32 onnxruntime maps them, and with
packing switched off neither session makes a copy of its own. Past and present K/V are one buffer, so a step writes only what is
new. Rows whose prompts differ in length are prefilled one by one, straight into their place in the buffers, and decoded
together; nothing is ever padded.

Shapes: B rows, T new tokens, M positions of the buffers, N K/V heads, H head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from voidprune.errors import CheckpointError, ContextLengthError, ModelError, RuntimeProviderError
from voidprune.execution.manifest import Manifest, read_manifest
from voidprune.models.checkpoint import read_header, weights_hash
from voidprune.schedule import Boundary, Phase

Array = np.ndarray[Any, Any]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOGIT_VALUES = 2**24
"""Logits that one step of scoring makes at most: 64 MiB in float32, twice that while they are worked on in float64."""
_NUMPY_DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class BundleSession:
    """An exported bundle, loaded. `start` gives a conversation; `generate` and `score` are whole tasks."""

    def __init__(self, folder: Path, *, provider: str = "cpu") -> None:
        """Raises ModelError, CheckpointError (weights damaged), RuntimeProviderError (provider absent or unable)."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        if not self.manifest.graphs:
            raise ModelError(f"{folder} holds no ONNX graphs", hint="export it with --format onnx")
        _check_weights(folder, self.manifest)
        self.provider = provider
        self.sessions = {
            phase: _open_session(folder / graph.file, provider=provider, dtype=self.manifest.dtype)
            for phase, graph in self.manifest.graphs.items()
        }
        self.boundary = self.manifest.schedule.boundary
        decode = self.sessions[Phase.DECODE]
        if decode.get_outputs()[0].type not in _NUMPY_DTYPES:
            raise RuntimeProviderError(
                f"this runner has no host type for logits of {decode.get_outputs()[0].type}",
                hint="export with --precision fp16 or fp32, or run the folder in onnxruntime-genai",
            )
        self.vocab_size = int(decode.get_outputs()[0].shape[-1])
        self.dtype = _NUMPY_DTYPES[decode.get_outputs()[0].type]

    def start(self, num_rows: int = 1, *, max_positions: int) -> Conversation:
        """Empty K/V buffers for `num_rows` token sequences of at most `max_positions` tokens each."""
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
    ) -> list[list[int]]:
        """Greedy responses, each up to and including its end token. Rows are decoded together."""
        conversation = self.start(len(prompts), max_positions=max(map(len, prompts)) + max_new_tokens)
        responses: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        tokens_B = conversation.prefill(prompts).argmax(-1)
        for step in range(max_new_tokens):
            if step:
                tokens_B = conversation.decode(tokens_B[:, np.newaxis])[:, -1].argmax(-1)
            for row in sorted(running):
                responses[row].append(int(tokens_B[row]))
            running = {row for row in running if responses[row][-1] not in end_tokens}
            if not running:
                break
        return responses

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int, end_tokens: Sequence[int] = ()) -> Iterator[int]:
        """The greedy response to one prompt, token by token, up to and including its end token."""
        conversation = self.start(max_positions=len(prompt) + max_new_tokens)
        token = int(conversation.prefill([prompt])[0].argmax())
        for step in range(max_new_tokens):
            if step:
                token = int(conversation.decode(np.array([[token]]))[0, -1].argmax())
            yield token
            if token in end_tokens:
                return

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
        conversation = self.start(max_positions=len(prompt) + len(response) - 1)  # the last token is never fed
        yield response[:1], conversation.prefill([prompt])
        size = max(1, LOGIT_VALUES // self.vocab_size)
        for start in range(0, len(response) - 1, size):
            tokens = response[start : min(start + size, len(response) - 1)]
            yield response[start + 1 : start + 1 + len(tokens)], conversation.decode(np.array([tokens]))[0]


class Conversation:
    """K/V buffers of some token sequences, and how much of each is filled. Made by `BundleSession.start`."""

    def __init__(self, session: BundleSession, *, num_rows: int, max_positions: int) -> None:
        self.session = session
        self.max_positions = max_positions
        self.lengths = [0] * num_rows
        self.buffers: dict[str, ort.OrtValue] = {}
        for running in session.sessions.values():
            for argument in running.get_inputs():
                if argument.name.startswith("past_key_values.") and argument.name not in self.buffers:
                    _, num_kv_heads, _, head_dim = argument.shape
                    shape = [num_rows, num_kv_heads, max_positions, head_dim]
                    self.buffers[argument.name] = ort.OrtValue.ortvalue_from_numpy(
                        np.zeros(shape, session.dtype), session.provider
                    )
        self._bindings: dict[tuple[Phase, int, int], ort.IOBinding] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Process one prompt a row, behind what is there already. Returns the logits of the last tokens, [B, V].

        Raises ContextLengthError, and ModelError for an empty prompt or a second turn under a single-turn schedule.
        """
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
        rows = [
            self._prefill_rows(np.array([prompt], np.int64), slice(row, row + 1)) for row, prompt in enumerate(prompts)
        ]
        return np.concatenate(rows)

    def _prefill_rows(self, tokens_BT: Array, rows: slice) -> Array:
        is_decode_step = self.session.boundary is Boundary.DECODE and tokens_BT.shape[1] == 1
        phase = Phase.DECODE if is_decode_step else Phase.PREFILL
        return self._run(phase, tokens_BT, rows)[:, -1]

    def decode(self, tokens_BT: Array) -> Array:
        """Process T generated tokens a row. Returns the logits after each, [B, T, V]. Raises ContextLengthError."""
        if tokens_BT.shape[1] == 1 or len(self.lengths) == 1:
            return self._run(Phase.DECODE, tokens_BT, slice(0, len(tokens_BT)))
        rows = [self._run(Phase.DECODE, tokens_BT[row : row + 1], slice(row, row + 1)) for row in range(len(tokens_BT))]
        return np.concatenate(rows)

    def _run(self, phase: Phase, tokens_BT: Array, rows: slice) -> Array:
        num_rows, num_tokens = tokens_BT.shape
        lengths = [length + num_tokens for length in self.lengths[rows]]
        if max(lengths) > self.max_positions:
            raise ContextLengthError(
                f"{max(lengths)} tokens do not fit into K/V buffers of {self.max_positions} positions",
                hint="start the conversation with more positions",
            )
        mask_BS = (np.arange(max(lengths)) < np.array(lengths)[:, np.newaxis]).astype(np.int64)
        logits = np.empty(
            (num_rows, 1 if phase is Phase.PREFILL else num_tokens, self.session.vocab_size), self.session.dtype
        )
        binding = self._binding(phase, rows)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens_BT, np.int64))
        binding.bind_cpu_input("attention_mask", mask_BS)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self.session.sessions[phase].run_with_iobinding(binding)
        self.lengths[rows] = lengths
        return logits

    def _binding(self, phase: Phase, rows: slice) -> ort.IOBinding:
        """Past and present bound to the rows' part of the buffers: rows lie one behind the other."""
        key = (phase, rows.start, rows.stop)
        if key not in self._bindings:
            session = self.session.sessions[phase]
            binding = session.io_binding()
            for argument in session.get_inputs():
                if argument.name not in self.buffers:
                    continue
                buffer = self.buffers[argument.name]
                shape = [rows.stop - rows.start, *buffer.shape()[1:]]
                row_bytes = buffer.tensor_size_in_bytes() // buffer.shape()[0]
                place = (
                    self.session.provider,
                    0,
                    self.session.dtype,
                    shape,
                    buffer.data_ptr() + rows.start * row_bytes,
                )
                binding.bind_input(argument.name, *place)
                binding.bind_output(argument.name.replace("past_key_values", "present"), *place)
            self._bindings[key] = binding
        return self._bindings[key]


def _log_softmax(logits_TV: Array) -> Array:
    """In place, in the dtype of the logits."""
    logits_TV -= logits_TV.max(-1, keepdims=True)
    logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return logits_TV


def size_thread_pool(threads: int) -> None:
    """Set how many threads all sessions of this process share; by default onnxruntime takes one a core.

    Two sessions with pools of their own would fight for the cores, because a pool that waits for work spins. Raises
    RuntimeProviderError once a session was opened: then the pool is there.
    """
    try:
        ort.set_global_thread_pool_sizes(threads, 1)
    except Fail as error:
        raise RuntimeProviderError(
            "onnxruntime has its threads already", hint="set their number before the first session is opened"
        ) from error


def _check_weights(folder: Path, manifest: Manifest) -> None:
    for name in manifest.weight_files:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}", hint="export the model again")
        read_header(folder / name)
    if weights_hash(folder) != manifest.weights_header:
        raise CheckpointError(
            f"the header of the weights in {folder} is not the one that the graphs were written for",
            hint="export the model again",
        )


def _open_session(path: Path, *, provider: str, dtype: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with contextlib.suppress(Fail):  # the process has its pool already
        ort.set_global_thread_pool_sizes(0, 1)
    options.use_per_session_threads = False
    if provider == "cpu" and dtype == "F32":
        # Packing copies every matrix, once a session; without it both sessions use the mapped file.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if provider == "cuda":
        ort.preload_dlls()
    wanted = PROVIDERS[provider]
    providers = [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no narrower public base class
        reason = str(error).strip().splitlines()[0]
        raise RuntimeProviderError(
            f"onnxruntime cannot load {path.name} on {provider}: {reason}",
            hint="onnxruntime has no bf16 kernels for the CPU: export with --precision fp32, or use --provider cuda",
        ) from error
    if session.get_providers()[0] != wanted:  # onnxruntime falls back to the CPU with a log line only
        raise RuntimeProviderError(
            f"onnxruntime has no working {wanted} here", hint="pip install 'voidprune[cuda]', or use --provider cpu"
        )
    return session
