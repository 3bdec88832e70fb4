# `make demo` and `make test` need python3 (3.11-3.13) with venv, and g++; they set up the rest in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find bindings -type f)

.PHONY: help demo test lint format bench gpu-check clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"

# torch first and alone, at the version that constraints.txt pins: whatever needs it is then content.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@touch $@

$(VENV)/demo.stamp: $(SOURCES) $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/dev.stamp: $(SOURCES) $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp  ## train a network over slow links, five ways, and compare
	$(BIN)/gck demo

test: $(VENV)/dev.stamp  ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

lint: $(VENV)/dev.stamp  ## format, lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find bindings tests/nccl -name '*.[ch]pp')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find bindings tests/nccl -name '*.[ch]pp')

bench: $(VENV)/dev.stamp  ## kernels against the memory floor and their peers
	$(BIN)/python -m bench

# No .venv: the machine with the GPU may have no package index, so this uses the python that has torch.
gpu-check:  ## on a machine with a GPU: build, GPU tests, benchmark, one JSON
	$(PYTHON) -m bench.gpu_check

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist results gck/_C.*.so
