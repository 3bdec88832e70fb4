# `make demo` and `make test` need python3 (3.11-3.13) with venv, and g++; they set up the rest in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find bindings -type f)

.PHONY: help demo test test-targets test-oldest test-arm64 count-arm64 sanitize fuzz lint format bench gpu-check clean bench-link soak

help:  ## what there is
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

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

demo: $(VENV)/demo.stamp  ## train a network over slow links, six ways, and compare
	$(BIN)/gck demo

# Two workers with two threads each on two cores: those of OpenMP that wait would take the others' turns.
BESIDE_EACH_OTHER := OMP_WAIT_POLICY=PASSIVE

test: $(VENV)/dev.stamp  ## every test that this machine can run
	$(BESIDE_EACH_OTHER) $(BIN)/python -m pytest -n 2 --dist loadgroup tests

# Without the Triton that a torch of those days brings, as CPU builds of it are: gck's kernels want a later one, and tests
# that want these are skipped or left out. numpy 1.26 has no wheel for Python 3.13.
OLDEST := .venv-oldest
$(OLDEST)/test.stamp: constraints-oldest.txt $(SOURCES)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -C build-dir=build/oldest --editable ".[test]"
	$(OLDEST)/bin/python -m pip uninstall --quiet --yes triton
	@touch $@

test-oldest: $(OLDEST)/test.stamp  ## tests with the oldest packages gck runs with; Python 3.11 or 3.12; several GB
	$(BESIDE_EACH_OTHER) $(OLDEST)/bin/python -m pytest -n 2 --dist loadgroup tests -m "not gpu" -k "not interpreter" \
	  --ignore tests/test_packaging.py --ignore-glob "*/test_triton_*"

test-targets: $(VENV)/dev.stamp  ## all variants of the GPU kernels, compiled for every architecture
	GCK_AHEAD_OF_TIME=all $(BIN)/python -m pytest tests/kernels/test_ahead_of_time.py

# On another machine: compiled across, and run by QEMU's user mode with the libraries and the Python of a small Debian,
# for which it takes root, and Debian's debootstrap, qemu-user-static, binfmt-support and g++-aarch64-linux-gnu.
ARM64 := .arm64
ARM64_PYTHON := $(ARM64)/root/usr/bin/python3.11
ARM64_BUILD := build/arm64
$(ARM64)/root.stamp:
	mkdir -p $(ARM64)
	debootstrap --arch=arm64 --variant=minbase --include=python3.11-dev,libgomp1 bookworm $(ARM64)/root
	rm -r $(ARM64)/root/tmp  # QEMU would read from it what was written to this machine's
	@touch $@

# torch by itself: what its wheel depends on is said of ARM, and pip looks at this machine.
ARM64_PIP := $(BIN)/python -m pip install --quiet --upgrade --only-binary=:all: --python-version 3.11 \
  --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --target $(ARM64)/site
$(ARM64)/site.stamp: tests/arm64/requirements.txt $(VENV)/dev.stamp
	$(ARM64_PIP) --no-deps torch==2.10.0
	$(ARM64_PIP) -r tests/arm64/requirements.txt
	@touch $@

$(ARM64)/build.stamp: $(SOURCES) tests/arm64/toolchain.cmake $(ARM64)/root.stamp $(VENV)/dev.stamp
	$(BIN)/cmake -S . -B $(ARM64_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_TOOLCHAIN_FILE=tests/arm64/toolchain.cmake -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DPython_INCLUDE_DIR=$(abspath $(ARM64))/root/usr/include/python3.11 \
	  -DCMAKE_CXX_FLAGS="-isystem $(abspath $(ARM64))/root/usr/include"
	$(BIN)/cmake --build $(ARM64_BUILD)
	cp $(ARM64_BUILD)/_C.*.so gck/_C.cpython-311-aarch64-linux-gnu.so
	@touch $@

# Without what takes too long there, and what would run the same again.
ARM64_TESTS := tests/test_contract.py tests/message tests/kernels
test-arm64: $(ARM64)/site.stamp $(ARM64)/build.stamp  ## tests of the CPU's kernels and of messages on 64-bit ARM, emulated
	QEMU_LD_PREFIX=$(abspath $(ARM64))/root PYTHONPATH=$(ARM64)/site PYTHONDONTWRITEBYTECODE=1 $(BESIDE_EACH_OTHER) \
	  $(ARM64_PYTHON) -m pytest -n 2 --dist loadgroup --timeout 1800 -m "not gpu" $(ARM64_TESTS) \
	  -k "not interpreter and not any_bytes and not (test_cpu_instruction_sets and test_contract and neon)" \
	  --ignore tests/kernels/test_ahead_of_time.py --ignore-glob "*/test_triton_*"

count-arm64: $(ARM64)/site.stamp $(ARM64)/build.stamp  ## instructions that these kernels take there; needs qemu-user, too
	$(BIN)/python -m bench.arm64

# GCC's runtime goes in front of Python, and libstdc++ behind it, whose exceptions it intercepts. Leaks are not looked
# for: Python and torch never free much of what they have.
SANITIZED := build/sanitize
SANITIZED_ENV := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
SANITIZED_TESTS := tests/message tests/kernels/test_cpu_sparse.py tests/kernels/test_reduce.py tests/test_contract.py \
  tests/kernels/test_cpu_instruction_sets.py tests/test_makers.py tests/kernels/test_low_rank.py
SANITIZED_CHOICE := hostile or golden or nans_of or any_values or random_bits or laid_out_for_more \
  or (test_shards and cpu) or (one_by_one and not 2097169) or small_vectors or past_the_caches or makers or any_shape or orthonormal

sanitize: $(VENV)/dev.stamp  ## kernels on hostile bytes under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=Debug -DGCK_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build $(SANITIZED)
	$(SANITIZED_ENV) $(SANITIZED)/replay tests/fuzz/corpus/decoders/*
	$(SANITIZED_ENV) $(BESIDE_EACH_OTHER) GCK_SANITIZED=$(abspath $(SANITIZED)) \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -p tests.sanitized -n 2 -q $(SANITIZED_TESTS) -k "$(SANITIZED_CHOICE)"

# Seconds for each of the two fuzzers.
FUZZ_SECONDS ?= 300
CLANGXX ?= clang++

fuzz: $(VENV)/dev.stamp  ## fuzz from_bytes and the compiled decoders, each for FUZZ_SECONDS; needs clang
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/cmake -S tests/fuzz -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_CXX_COMPILER=$(CLANGXX)
	$(BIN)/cmake --build build/fuzz
	build/fuzz/decoders tests/fuzz/corpus/decoders -max_len=2048 -artifact_prefix=build/fuzz/ \
	  -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m tests.fuzz.messages tests/fuzz/corpus/messages tests/golden/v1 \
	  -max_len=1024 -artifact_prefix=build/fuzz/ -max_total_time=$(FUZZ_SECONDS)

lint: $(VENV)/dev.stamp  ## format, lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find bindings tests/nccl tests/fuzz -name '*.[ch]pp')
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find bindings tests/nccl tests/fuzz -name '*.[ch]pp')

bench: $(VENV)/dev.stamp  ## kernels against the memory floor and their peers
	$(BIN)/python -m bench

bench-link: $(VENV)/dev.stamp  ## whole all-reduces by 4 processes over slow links, beside PyTorch's
	$(BIN)/python -m bench.link

soak: $(VENV)/dev.stamp  ## 10,000 all-reduces with faults, compared with simulated ranks
	$(BIN)/python -m bench.soak

# No .venv: the machine with the GPU may have no package index, so this uses the python that has torch.
gpu-check:  ## on a machine with a GPU: build, GPU tests, benchmark, one JSON
	$(PYTHON) -m bench.gpu_check

clean:  ## remove everything that was built
	rm -rf $(VENV) $(OLDEST) $(ARM64) build dist results gck/_C.*.so
