"""The runtimes of `benchmarks/peers.py`, one class each, imported where it is installed (`peer_environments.py`).

`prepare` converts a checkpoint to what the runtime reads. An instance has it loaded. `prefill` starts from nothing and gives the
likeliest next token. `context` fills a cache that stays; `start` goes back to its end, and `step` takes a greedy token from there.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer_ours import Machine, Voidprune, VoidpruneLogits


class Transformers:
    compiled = False

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self.model.config
        if self.compiled:
            self.new_cache = lambda: StaticCache(config=config, max_cache_len=positions)
            self.run = torch.compile(self.model, dynamic=False)
        else:
            self.new_cache = lambda: DynamicCache(config=config)
            self.run = self.model

    def forward(self, tokens: list[int], cache: Any, start: int) -> int:
        places = self.torch.arange(start, start + len(tokens))
        logits = self.run(
            input_ids=self.torch.tensor([tokens]),
            position_ids=places[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return int(logits[0, -1].argmax())

    def prefill(self, tokens: list[int]) -> int:
        return self.forward(tokens, self.new_cache(), 0)

    def context(self, tokens: list[int]) -> None:
        self.cache, self.length = self.new_cache(), len(tokens)
        self.first = self.forward(tokens, self.cache, 0)

    def start(self) -> None:
        if self.cache.get_seq_length() > self.length:
            self.cache.crop(self.length - self.cache.get_seq_length())
        self.token, self.place = self.first, self.length

    def step(self) -> int:
        self.token = self.forward([self.token], self.cache, self.place)
        self.place += 1
        return self.token


class TransformersCompiled(Transformers):
    compiled = True

    def start(self) -> None:
        """A static cache forgets nothing by itself: what lies behind the context is written again."""
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                if isinstance(layer.cumulative_length, int):
                    layer.cumulative_length = self.length
                else:
                    layer.cumulative_length.fill_(self.length)
        self.token, self.place = self.first, self.length


class Genai:
    precision = "fp32"
    block_size = 32

    @classmethod
    def prepare(cls, source: Path, target: Path) -> None:
        options = ["prune_lm_head=true"]
        if cls.precision == "int4":
            options += [f"block_size={cls.block_size}", "accuracy_level=4"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target]
        command += ["-p", cls.precision, "-e", "cpu", "-c", target.parent / "cache", "--extra_options", *options]
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        import numpy as np
        import onnxruntime_genai as genai

        config = json.loads((folder / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        (folder / "genai_config.json").write_text(json.dumps(config))
        self.genai, self.np, self.positions = genai, np, positions
        self.model = genai.Model(str(folder))

    def generator(self) -> Any:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=self.positions, do_sample=False)
        return self.genai.Generator(self.model, params)

    def prefill(self, tokens: list[int]) -> int:
        generator = self.generator()
        generator.append_tokens(self.np.array([tokens], self.np.int32))
        return int(generator.get_logits().argmax())

    def context(self, tokens: list[int]) -> None:
        self.running, self.length = self.generator(), len(tokens)
        self.running.append_tokens(self.np.array([tokens], self.np.int32))
        self.first = int(self.running.get_logits().argmax())

    def start(self) -> None:
        self.running.rewind_to(self.length)
        self.token = self.first

    def step(self) -> int:
        self.running.append_tokens(self.np.array([[self.token]], self.np.int32))
        self.token = int(self.running.get_logits().argmax())
        return self.token


class GenaiInt4(Genai):
    precision = "int4"


class GenaiInt4In128(GenaiInt4):
    block_size = 128


class Optimum:
    @classmethod
    def prepare(cls, source: Path, target: Path) -> None:
        from optimum.exporters.onnx import main_export

        main_export(str(source), output=target, task="text-generation-with-past", do_validation=False)

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def forward(self, tokens: list[int], past: Any, start: int) -> tuple[int, Any]:
        torch = self.torch
        found = self.model(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, start + len(tokens), dtype=torch.int64),
            position_ids=torch.arange(start, start + len(tokens))[None],
            past_key_values=past,
            use_cache=True,
        )
        return int(found.logits[0, -1].argmax()), found.past_key_values

    def prefill(self, tokens: list[int]) -> int:
        return self.forward(tokens, None, 0)[0]

    def context(self, tokens: list[int]) -> None:
        self.first, self.kept = self.forward(tokens, None, 0)
        self.length = len(tokens)

    def start(self) -> None:
        self.token, self.past, self.place = self.first, self.kept, self.length

    def step(self) -> int:
        self.token, self.past = self.forward([self.token], self.past, self.place)
        self.place += 1
        return self.token


class Exporters:
    """transformers.exporters: a graph for prefill, which makes logits of every token, and one for decode, each with its weights."""

    @classmethod
    def prepare(cls, source: Path, target: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.exporters import OnnxConfig, OnnxExporter

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokens = torch.arange(3, 19)[None]
        sample = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        OnnxExporter().export_for_generation(model, sample, config=OnnxConfig(dynamic=True)).save_pretrained(target)

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        import onnxruntime
        import torch
        from transformers import DynamicCache
        from transformers.exporters import ExportedModel

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        torch.set_num_threads(threads)
        self.torch, self.new_cache = torch, DynamicCache
        self.runners = ExportedModel.from_pretrained(folder).to(session_options=options).runners

    def forward(self, graph: str, tokens: list[int], past: Any, start: int) -> tuple[int, Any]:
        found = self.runners[graph](
            input_ids=self.torch.tensor([tokens]),
            position_ids=self.torch.arange(start, start + len(tokens))[None],
            past_key_values=past,
        )
        return int(found.logits[0, -1].argmax()), found.past_key_values

    def prefill(self, tokens: list[int]) -> int:
        return self.forward("prefill", tokens, self.new_cache(), 0)[0]

    def context(self, tokens: list[int]) -> None:
        self.first, self.kept = self.forward("prefill", tokens, self.new_cache(), 0)
        self.length = len(tokens)

    def start(self) -> None:
        self.token, self.past, self.place = self.first, self.kept, self.length

    def step(self) -> int:
        self.token, self.past = self.forward("decode", [self.token], self.past, self.place)
        self.place += 1
        return self.token


class LlamaCpp:
    """llama.cpp through its own C interface, as llama-cpp-python declares it."""

    stored = "f32"

    @classmethod
    def prepare(cls, source: Path, target: Path) -> None:
        """By llama.cpp's own converter, which stands beside the environment; without a vocabulary, which it does not know."""
        target.mkdir(parents=True)
        tools = Path(os.environ["LLAMA_CPP_SOURCE"])
        sys.path[:0] = [str(tools), str(tools / "gguf-py")]
        from conversion import base

        outtype = "f16" if cls.stored == "f16" else "f32"
        plain = target / f"model.{outtype}.gguf"

        def write_size(model: Any) -> None:
            model._set_vocab_none()
            model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])
            model.gguf_writer.add_vocab_size = lambda _size: None  # some models write it once more

        for name in ("_set_vocab_gpt2", "_set_vocab_sentencepiece", "_set_vocab_llama_hf"):
            assert hasattr(base.TextModel, name), name
            setattr(base.TextModel, name, write_size)
        sys.argv = ["convert_hf_to_gguf.py", str(source), "--outfile", str(plain), "--outtype", outtype]
        try:
            runpy.run_path(str(tools / "convert_hf_to_gguf.py"), run_name="__main__")
        except SystemExit as done:
            if done.code:
                raise
        if cls.stored in ("q4_0", "q8_0"):
            import llama_cpp

            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{cls.stored.upper()}")
            packed = target / f"model.{cls.stored}.gguf"
            failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(packed).encode(), ctypes.byref(params))
            assert not failed, failed
            plain.unlink()

    def __init__(self, folder: Path, threads: int, positions: int) -> None:
        import llama_cpp
        import numpy as np

        self.api, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        (file,) = folder.glob("*.gguf")
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = positions
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.running = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.running)
        self.num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forward(self, tokens: list[int]) -> int:
        values = (self.api.llama_token * len(tokens))(*tokens)
        failed = self.api.llama_decode(self.running, self.api.llama_batch_get_one(values, len(tokens)))
        assert not failed, failed
        logits = self.api.llama_get_logits_ith(self.running, -1)
        return int(self.np.ctypeslib.as_array(logits, shape=(self.num_vocab,)).argmax())

    def prefill(self, tokens: list[int]) -> int:
        self.api.llama_memory_clear(self.memory, False)
        self.held = tokens
        return self.forward(tokens)

    def context(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.first = self.prefill(tokens)

    def start(self) -> None:
        if self.held is not self.tokens:  # a prefill came in between: there is one cache
            self.context(self.tokens)
        self.api.llama_memory_seq_rm(self.memory, 0, len(self.tokens), -1)
        self.token = self.first

    def step(self) -> int:
        self.token = self.forward([self.token])
        return self.token


class LlamaCppF16(LlamaCpp):
    stored = "f16"


class LlamaCppQ4(LlamaCpp):
    stored = "q4_0"


class LlamaCppQ8(LlamaCpp):
    stored = "q8_0"


PEERS: dict[str, Any] = {
    "machine": Machine,
    "voidprune fp32": Voidprune,
    "voidprune int4": Voidprune,
    "voidprune w8a8": Voidprune,
    "voidprune w8a8-int4": Voidprune,
    "voidprune int4 128": Voidprune,
    "voidprune w8a8-int4 128": Voidprune,
    "voidprune fp32 logits": VoidpruneLogits,
    "transformers eager": Transformers,
    "transformers compiled": TransformersCompiled,
    "genai fp32": Genai,
    "genai int4": GenaiInt4,
    "genai int4 128": GenaiInt4In128,
    "transformers.exporters": Exporters,
    "optimum-onnx": Optimum,
    "llama.cpp F32": LlamaCpp,
    "llama.cpp F16": LlamaCppF16,
    "llama.cpp Q4_0": LlamaCppQ4,
    "llama.cpp Q8_0": LlamaCppQ8,
}
