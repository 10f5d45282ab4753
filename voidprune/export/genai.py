"""`genai_config.json`: what onnxruntime-genai needs to run the two graphs of a bundle, unmodified.

Model type "decoder-pipeline": the prompt runs `prefill.onnx`, each further token `decode.onnx`, chosen by the number of new
tokens. Layers of its config are cache slots, without gaps. Tried with onnxruntime-genai 0.18.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voidprune.artifacts import Document
from voidprune.execution.manifest import Graph
from voidprune.models.checkpoint import Checkpoint
from voidprune.schedule import Phase

FILE = "genai_config.json"


def describe_genai(
    checkpoint: Checkpoint, graphs: dict[Phase, Graph], *, num_slots: int, end_tokens: Sequence[int]
) -> Document:
    """The config of a bundle whose slim checkpoint is `checkpoint`."""
    # Packed matrices are far slower in their stored order; dense ones are used as they are mapped.
    prepacking = {} if checkpoint.is_packed else {"session.disable_prepacking": "1"}
    architecture, config = checkpoint.architecture, checkpoint.config
    start, pad = config.get("bos_token_id"), config.get("pad_token_id")
    first_end = end_tokens[0] if end_tokens else None
    return {
        "model": {
            "type": "decoder-pipeline",
            "bos_token_id": first_end if start is None else start,
            "eos_token_id": list(end_tokens) if len(end_tokens) > 1 else first_end,
            "pad_token_id": first_end if pad is None else pad,
            "vocab_size": architecture.vocab_size,
            "context_length": architecture.context_length,
            "decoder": {
                "head_size": architecture.head_dim,
                "hidden_size": architecture.hidden_size,
                "num_attention_heads": architecture.num_heads,
                "num_key_value_heads": architecture.num_kv_heads,
                "num_hidden_layers": num_slots,
                "session_options": {
                    "log_id": "voidprune",
                    "intra_op_num_threads": 0,  # all cores; left out, onnxruntime-genai 0.18 takes about one
                    **prepacking,
                    "provider_options": [],
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "pipeline": [
                    {str(phase): _stage(graph, on_prompt=phase is Phase.PREFILL)} for phase, graph in graphs.items()
                ],
            },
        },
        "search": {
            "do_sample": False,
            "max_length": architecture.context_length,
            "past_present_share_buffer": True,
        },
    }


def _stage(graph: Graph, *, on_prompt: bool) -> dict[str, Any]:
    parts = [f"{slot}.{part}" for slot in graph.slots for part in ("key", "value")]
    return {
        "filename": graph.file,
        "inputs": ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)],
        "outputs": ["logits", *(f"present.{part}" for part in parts)],
        "run_on_prompt": on_prompt,
        "run_on_token_gen": not on_prompt,
    }
