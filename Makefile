# make demo   installs fastproj into .venv and runs TRAK on real data
# make test   the same environment plus the checkers: format, lint, types, tests
# Variables: PYTHON (used to create the environment), VENV (where it lies), JOBS (test processes), PYTEST_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
PYTEST_ARGS ?=
# Test processes: auto is one a core, 0 is this one only (for --pdb). A file's tests stay together: some share a build.
JOBS ?= auto
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_FILES = $(wildcard csrc/*.hpp csrc/cpu/*.hpp csrc/cpu/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.hpp \
    csrc/cuda/*.cpp tests/csrc/*.cpp tests/csrc/*.hpp tests/cuda/*.cpp tests/cuda/*.hpp)
BUILD_INPUTS = setup.py build_native.py build_cuda.py $(wildcard csrc/*.hpp csrc/cpu/* csrc/cuda/*)

.PHONY: help demo test lint unit test-all compat sanitize bench gpu format clean

help:
	@echo "make demo      install into $(VENV) and run TRAK on real data, from training to an HTML report"
	@echo "make test      lint, types, format and the essential tests (what CI runs)"
	@echo "make test-all  the same plus the slow and packaging tests on every Python found"
	@echo "make compat    tests against traker, dattri, quanda and bergson, in an environment of their own"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make bench     time the projection against torch and TRAK; writes bench/results/"
	@echo "make gpu       tests that need a CUDA GPU"
	@echo "make format    rewrite sources in the project's format"
	@echo "make clean     remove builds and caches ($(VENV) stays)"

# pip is quiet, so each step says what it is about to do.
$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or newer was found; install one or set PYTHON=" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

# Build tools first, so that the package is built in this environment: pinned, and incremental from run to run.
$(VENV)/.tools: constraints.txt | $(BIN)/python
	@echo "== installing the build tools into $(VENV)"
	@$(PIP) install -q -c constraints.txt setuptools wheel pybind11 ninja
	@touch $@

$(VENV)/.demo: $(VENV)/.tools pyproject.toml $(BUILD_INPUTS)
	@echo "== installing fastproj[trak,report] into $(VENV) and compiling its kernels: a minute or two"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trak,report]"
	@touch $@

$(VENV)/.test: $(VENV)/.tools pyproject.toml $(BUILD_INPUTS)
	@echo "== installing fastproj[test] into $(VENV) and compiling its kernels: a minute or two"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.demo
	@echo "== installing fastproj[trak,bench] into $(VENV) and compiling its kernels: a minute or two"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trak,bench]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/fastproj demo $(DEMO_ARGS)

test: lint unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES))

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile -m "not slow and not gpu" $(PYTEST_ARGS)

# The slow ones come one at a time: some need many gigabytes.
test-all: test
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# Many packages that nothing else here needs: they stay out of $(VENV). Two go without their dependencies, see pyproject.toml.
COMPAT_VENV ?= .venv-compat
compat:
	$(MAKE) VENV=$(COMPAT_VENV) $(COMPAT_VENV)/.compat
	$(COMPAT_VENV)/bin/python -m pytest -m "not gpu" tests/compat $(PYTEST_ARGS)

$(VENV)/.compat: $(VENV)/.test
	@echo "== installing the packages that fastproj.compat stands in for into $(VENV)"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test,compat-test]"
	@$(PIP) install -q -c constraints.txt --no-deps quanda captum bergson bitsandbytes
	@touch $@

# The sanitized package lies in its own folder and shadows the installed one. The interpreter itself is not
# instrumented, so its allocations at exit are no leaks of ours.
SANITIZED := build/sanitize/lib
SANITIZE_TESTS ?= $(wildcard tests/backends/test_cpu*.py) tests/test_ops.py
sanitize: $(VENV)/.test
	FASTPROJ_SANITIZE=1 FASTPROJ_CPU=1 FASTPROJ_CUDA=0 $(BIN)/python setup.py -q build \
	    --build-base build/sanitize --build-lib $(SANITIZED)
	cxx=$${CXX:-c++}; \
	LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so) \
	    $$($$cxx -print-file-name=libstdc++.so)"; \
	ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1; \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$$PWD/$(SANITIZED)" PYTHONSAFEPATH=1; \
	export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONPATH PYTHONSAFEPATH; \
	$(BIN)/python -c 'import sys, fastproj._cpu as m; sys.exit("sanitize" not in m.__file__)'; \
	$(BIN)/pytest -p no:cacheprovider --capture=sys -m "not slow and not gpu" $(SANITIZE_TESTS) $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python bench/project.py $(BENCH_ARGS)

gpu: $(VENV)/.test
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and \
	    "make gpu: this torch finds no GPU here; nothing was tested")'
	@echo "== compiling fastproj._cuda: minutes"
	@FASTPROJ_CUDA=1 $(PIP) install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastproj/*.so fastproj/_build_info.py $(VENV)/.demo $(VENV)/.test $(VENV)/.bench
	find fastproj kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
