# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench-profile bench-export bench-memory install clean

demo: .venv/installed
	$(BIN)/voidprune demo --output out/demo --overwrite

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-profile: .venv/installed
	$(BIN)/python benchmarks/profiling.py

# 15 GB of random weights are generated, and removed again; BENCH='--layers 4' for less.
bench-export: .venv/installed
	$(BIN)/python benchmarks/export.py $(BENCH)

# Memory of both sessions beside one; BENCH=--full for all of the shape of Qwen2.5-0.5B (2 GB, twice on disk).
bench-memory: .venv/installed
	$(BIN)/python benchmarks/memory.py $(BENCH)

install: .venv/installed

# torch goes first, pinned: see constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist
