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

SITE := build/site
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_FILES = $(wildcard csrc/*.hpp csrc/cpu/*.hpp csrc/cpu/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.hpp \
    csrc/cuda/*.cpp tests/csrc/*.cpp tests/csrc/*.hpp tests/cuda/*.cpp tests/cuda/*.hpp)
BUILD_INPUTS = setup.py build_native.py build_cuda.py $(wildcard csrc/*.hpp csrc/cpu/* csrc/cuda/*)

.PHONY: help demo test lint unit test-all compat sanitize bench gpu docs docs-links format clean

help:
	@echo "make demo      install into $(VENV) and run TRAK on real data, from training to an HTML report"
	@echo "make test      lint, types, format and the essential tests (what CI runs)"
	@echo "make test-all  the same plus the slow and packaging tests on every Python found"
	@echo "make compat    tests against traker, dattri, quanda and bergson, in an environment of their own"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make bench     time the projection against torch and TRAK; writes bench/results/"
	@echo "make gpu       all that needs a GPU: build, tests, sanitizers, benchmark; VENV= PYTHON=python3 installs nothing"
	@echo "make docs      build the pages and the API reference into $(SITE); docs-links also asks other sites"
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

# The demo runs on the CPU: it doesn't wait for CUDA kernels.
$(VENV)/.demo: $(VENV)/.tools pyproject.toml $(BUILD_INPUTS)
	@echo "== installing fastproj[trak,report] into $(VENV) and compiling its kernels: a minute or two"
	@FASTPROJ_CUDA=$${FASTPROJ_CUDA-0} $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trak,report]"
	@touch $@

# Where there is an nvcc, the CUDA kernels are compiled here, for every architecture (82 s on two cores), and the
# tests read what this made; FASTPROJ_CUDA=0 leaves that to the tests of the compiled code.
$(VENV)/.test: $(VENV)/.tools pyproject.toml $(BUILD_INPUTS)
	@echo "== installing fastproj[test] into $(VENV) and compiling its kernels: a minute or two, twice that with CUDA"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.demo
	@echo "== installing fastproj[trak,bench] into $(VENV) and compiling its kernels: a minute or two"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trak,bench]"
	@touch $@

# The site's generator, beside the package that it documents.
$(VENV)/.docs: $(VENV)/.demo constraints.txt
	@echo "== installing Sphinx into $(VENV)"
	@$(PIP) install -q -c constraints.txt sphinx myst-parser furo
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
	$(BIN)/python -m bench.project $(BENCH_ARGS)

# A warning, such as of a link that leads nowhere, is an error.
SPHINX = $(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees
docs: $(VENV)/.docs
	$(SPHINX) . $(SITE)
	$(BIN)/python docs/check_links.py $(SITE)
	@echo "open $(SITE)/index.html"

docs-links: $(VENV)/.docs
	$(SPHINX) -b linkcheck . build/links

# Everything that needs a GPU, in one command and under 15 minutes: a build for this GPU in a folder of its own, tests,
# sanitizers, benchmark. With `VENV=` it uses $(PYTHON) as it is and installs nothing: `make gpu VENV= PYTHON=python3`.
# A step that fails, or that a hanging kernel stops, is named at the end; the later ones still run.
GPU_PYTHON = $(if $(VENV),$(BIN)/python,$(PYTHON))
GPU_LIB := build/gpu/lib
GPU_LOGS := build/gpu/logs
# Where CUDA's installer puts nvcc and compute-sanitizer, and PATH often doesn't say so.
gpu-build sanitize-gpu: export PATH := $(PATH):/usr/local/cuda/bin
# The build comes first, then the root for bench and tests.
GPU_RUN = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/$(GPU_LIB):$(CURDIR)" PYTHONUNBUFFERED=1
GPU_PYTEST = $(GPU_RUN) timeout -k 10 $(1) $(2) $(GPU_PYTHON) -m pytest -q -p no:cacheprovider \
    --continue-on-collection-errors -o faulthandler_timeout=100 -m gpu
# Several processes where pytest-xdist is there: compiling for Triton and NumPy's truth take longer than the GPU does.
# Eight at most, for the GPU's memory.
GPU_JOBS = $$($(GPU_PYTHON) -c 'import importlib.util as u, os; \
    print(f"-n{min(8, max(1, len(os.sched_getaffinity(0)) // 2))}" if u.find_spec("xdist") else "")')
GPU_STEPS := gpu-build gpu-test-cuda gpu-test-triton gpu-test-rest sanitize-gpu gpu-bench
GPU_BENCH_ARGS ?= --budget 130
.PHONY: gpu-check $(GPU_STEPS)

gpu: gpu-check
	@mkdir -p $(GPU_LOGS); failed=""; \
	for step in $(GPU_STEPS); do \
	    echo "== $$step"; start=$$SECONDS; verdict=passed; \
	    $(MAKE) --no-print-directory $$step 2>&1 | tee $(GPU_LOGS)/$$step.log || { verdict=FAILED; failed="$$failed $$step"; }; \
	    echo "== $$step $$verdict after $$((SECONDS - start)) s; its output is in $(GPU_LOGS)/$$step.log"; \
	done; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi; \
	echo "make gpu: everything passed"

gpu-check: $(if $(VENV),$(VENV)/.test)
	@$(GPU_PYTHON) -c 'import importlib.util as u, sys; \
	    missing = [n for n in "torch pytest hypothesis numpy scipy sklearn safetensors tqdm setuptools pybind11".split() \
	        if u.find_spec(n) is None]; \
	    missing and sys.exit("make gpu: $(GPU_PYTHON) lacks " + ", ".join(missing)); \
	    import torch; \
	    torch.cuda.is_available() or sys.exit("make gpu: this torch finds no GPU here; nothing was tested")'

# For this GPU alone: half a minute instead of several.
gpu-build:
	@arch=$${FASTPROJ_CUDA_ARCHS:-$$($(GPU_PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}; \
	FASTPROJ_CUDA=1 FASTPROJ_CUDA_ARCHS="$$arch" $(GPU_PYTHON) setup.py -q build --build-base build/gpu --build-lib $(GPU_LIB)
	@$(GPU_RUN) $(GPU_PYTHON) -m fastproj info
	@$(GPU_RUN) $(GPU_PYTHON) -c 'import sys, fastproj._cuda as m; sys.exit("$(GPU_LIB)" not in m.__file__)'

gpu-test-cuda:
	$(call GPU_PYTEST,180,) $(GPU_JOBS) tests/cuda $(PYTEST_ARGS)

gpu-test-triton:
	$(call GPU_PYTEST,180,) $(GPU_JOBS) tests/kernels $(PYTEST_ARGS)

gpu-test-rest:
	$(call GPU_PYTEST,120,) $(GPU_JOBS) --ignore tests/cuda --ignore tests/kernels tests $(PYTEST_ARGS)

# Without torch's memory cache every tensor has its own allocation, so an access beyond it shows. Calls that fail are
# Python exceptions in the tests; the sanitizer would also count those by which CUDA and torch only look what is there.
SANITIZER ?= compute-sanitizer
sanitize-gpu: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize-gpu:
	@failed=""; for tool in memcheck racecheck synccheck; do echo "== compute-sanitizer --tool $$tool"; \
	    only=""; if [ $$tool = memcheck ]; then only="--report-api-errors no"; fi; \
	    $(call GPU_PYTEST,60,$(SANITIZER) --tool $$tool $$only --error-exitcode 9) \
	        tests/cuda/test_sanitize.py $(PYTEST_ARGS) || failed="$$failed $$tool"; \
	done; if [ -n "$$failed" ]; then echo "sanitize-gpu: failed:$$failed" >&2; exit 1; fi

# The targets first, then other sizes while the budget lasts; then the families of CUDA kernels. In a copy of the sources
# without the repository, FASTPROJ_COMMIT names the commit in the results.
gpu-bench:
	@failed=0; $(GPU_RUN) timeout -k 10 180 $(GPU_PYTHON) -m bench.project --device cuda $(GPU_BENCH_ARGS) || failed=1; \
	$(GPU_RUN) timeout -k 10 60 $(GPU_PYTHON) -m bench.project --device cuda --ladder --repeats 5 --max-seconds 1 || failed=1; \
	exit $$failed

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastproj/*.so fastproj/_build_info.py $(VENV)/.demo $(VENV)/.test $(VENV)/.bench
	find fastproj kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
