# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-genai test-optimum check docs bench bench-check bench-profile bench-export bench-memory bench-precision bench-device bench-runner install clean

demo: .venv/installed
	$(BIN)/voidprune demo --output out/demo --overwrite

test: .venv/installed
	$(BIN)/python -m pytest

# Bundles in runtimes that do not share our environment, unmodified, in environments of their own.
test-genai: .venv/installed .venv-genai/installed
	VOIDPRUNE_GENAI_PYTHON=$(CURDIR)/.venv-genai/bin/python $(BIN)/python -m pytest tests/export/test_genai.py

test-optimum: .venv/installed .venv-optimum/installed
	VOIDPRUNE_OPTIMUM_PYTHON=$(CURDIR)/.venv-optimum/bin/python $(BIN)/python -m pytest tests/export/test_bundle.py -k optimum

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/cli.md, from the help texts.
docs: .venv/installed
	$(BIN)/python -m voidprune.cli.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

# The runtimes that a user would pick instead, in turns with ours; makes an environment for each, under .venv-peers, and models
# of several gigabytes, which are removed again. BENCH='--layers 4 --peers "transformers eager"' for less.
bench: .venv/installed
	$(BIN)/python benchmarks/peers.py $(BENCH)

# Repeats the run of benchmarks/accepted.json, and fails where a ratio became worse. `make bench BENCH=--accept` accepts another one.
bench-check: .venv/installed
	$(BIN)/python benchmarks/peers.py --check $(BENCH)

bench-profile: .venv/installed
	$(BIN)/python benchmarks/profiling.py

# 15 GB of random weights are generated, and removed again; BENCH='--layers 4' for less.
bench-export: .venv/installed
	$(BIN)/python benchmarks/export.py $(BENCH)

# Memory of both sessions beside one; BENCH=--full for all of the shape of Qwen2.5-0.5B (2 GB, twice on disk).
bench-memory: .venv/installed
	$(BIN)/python benchmarks/memory.py $(BENCH)

bench-precision: .venv/installed
	$(BIN)/python benchmarks/precision.py $(BENCH)

# On CUDA: one copy of the weights, captured steps (BENCH="--model 7b --precision fp16").
bench-device: .venv/installed
	$(BIN)/python benchmarks/device.py $(BENCH)

# Bundles as they are exported and as our runner opens them; BENCH='--precision w8a8-int4' and the like.
bench-runner: .venv/installed
	$(BIN)/python benchmarks/runner.py $(BENCH)

install: .venv/installed

# torch goes first, pinned: see constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-genai/installed: constraints.txt
	$(PYTHON) -m venv .venv-genai
	.venv-genai/bin/python -m pip install --quiet --constraint constraints.txt onnxruntime-genai onnxruntime numpy
	touch $@

.venv-optimum/installed: constraints-optimum.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet --constraint constraints-optimum.txt torch
	.venv-optimum/bin/python -m pip install --quiet --constraint constraints-optimum.txt 'optimum-onnx[onnxruntime]'
	touch $@

clean:
	rm -rf .venv .venv-genai .venv-optimum .venv-peers out build dist
