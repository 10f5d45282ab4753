"""`genai_config.json`: what onnxruntime-genai needs to run the graphs of a bundle, unmodified.

Two graphs are a "decoder-pipeline": several new tokens run `prefill.onnx`, a single one `decode.onnx`. One graph for both phases is
a plain "decoder". Layers of the config are cache slots, without gaps. Tested with onnxruntime-genai 0.18; what it cannot do is told
in `docs/onnxruntime-genai.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voidprune.artifacts import Document
from voidprune.execution.manifest import Graph, packs_weights
from voidprune.models.checkpoint import Checkpoint
from voidprune.schedule import Phase

FILE = "genai_config.json"


def describe_genai(
    checkpoint: Checkpoint, graphs: dict[Phase, Graph], *, num_slots: int, end_tokens: Sequence[int]
) -> Document:
    """The config of a bundle whose slim checkpoint is `checkpoint`; of the pipeline, unless both phases have the same graph."""
    packs = packs_weights(checkpoint.dtype, quantized=checkpoint.is_packed)
    architecture, config = checkpoint.architecture, checkpoint.config
    start, pad = config.get("bos_token_id"), config.get("pad_token_id")
    first_end = end_tokens[0] if end_tokens else None
    files = {graph.file for graph in graphs.values()}
    stages: Document
    if len(files) == 1:
        stages = {"filename": files.pop()}
    else:
        stages = {"pipeline": [{str(phase): _stage(graph, phase)} for phase, graph in graphs.items()]}
    return {
        "model": {
            "type": "decoder-pipeline" if "pipeline" in stages else "decoder",
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
                    **({} if packs else {"session.disable_prepacking": "1"}),
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
                **stages,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": architecture.context_length,
            "past_present_share_buffer": True,
        },
    }


def _stage(graph: Graph, phase: Phase) -> dict[str, Any]:
    parts = [f"{slot}.{part}" for slot in graph.slots for part in ("key", "value")]
    return {
        "filename": graph.file,
        "inputs": ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)],
        "outputs": ["logits", *(f"present.{part}" for part in parts)],
        "run_on_prompt": phase is Phase.PREFILL,
        "run_on_token_gen": phase is Phase.DECODE,
    }
