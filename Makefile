# Targets are the README's commands. `make test` and `make demo` work from a fresh clone.
#
#   PYTHON       interpreter that makes the virtual environment (python3)
#   VENV         where it goes (.venv)
#   TORCH        what is installed as torch when VENV has none (torch==2.13.0)
#   TORCH_INDEX  index to take torch from, and torch alone; pip's own configuration otherwise
#   TIME_LIMIT   seconds for one slice of `make gpu*` and `make reproduce-medium`; the next call resumes
#   *_ARGS       passed on: TEST_ARGS to pytest, DEMO_ARGS, REPRODUCE_ARGS, BENCH_ARGS, QUALITY_ARGS and GPU_ARGS to their programs

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
TIME_LIMIT  ?=
JOBS        ?= 2
TEST_ARGS   ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
QUALITY_ARGS ?=
GPU_ARGS    ?=
REPRODUCE_ARGS ?=

PY := $(VENV)/bin/python
CSRC := $(shell find csrc -type f 2>/dev/null)
BUILD_SCRIPTS := setup.py tools/build_support.py
# Idle OpenMP threads sleep instead of spinning: test processes share the cores.
QUIET_THREADS := OMP_WAIT_POLICY=PASSIVE

.PHONY: help build test demo reproduce reproduce-medium bench side-by-side quality exactness stopped codebooks tables gpu gpu-side-by-side gpu-large gpu-offload env lint format typecheck clean
.DEFAULT_GOAL := help

help:
	@echo 'make test | demo | reproduce | reproduce-medium | bench | side-by-side | quality | exactness | stopped | codebooks | gpu | gpu-side-by-side | gpu-large | gpu-offload | env | tables | lint | format | typecheck | build | clean'

# The last file that `python -m venv` writes: an environment without it is unfinished.
$(VENV)/bin/activate:
	@sh tools/preflight.sh "$(PYTHON)" "$(dir $(abspath $(VENV)))"
	$(PYTHON) -m venv "$(VENV)"

# A torch that is already there stays. --no-deps, and once more for what torch itself needs, from
# pip's own index: TORCH_INDEX serves torch alone.
$(VENV)/.torch: $(VENV)/bin/activate
	@$(PY) -c 'import torch' 2>/dev/null || { \
	  set -ex; \
	  $(if $(TORCH_INDEX),$(PY) -m pip install --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)";) \
	  $(PY) -m pip install "$(TORCH)"; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install --quiet 'setuptools>=77' wheel ninja
	$(PY) -m pip install --no-build-isolation --editable '.[test]'
	@touch $@

# Incremental: objects are kept under build/.
$(VENV)/.built: $(VENV)/.installed $(BUILD_SCRIPTS) $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

build: $(VENV)/.built

test: build
	$(PY) -m ruff check .
	$(QUIET_THREADS) $(PY) -m pytest -q -n $(JOBS) --dist worksteal --timeout=600 $(TEST_ARGS)

demo: build
	$(VENV)/bin/epi-kernels demo $(DEMO_ARGS)

# Both papers' tables at the smallest size: at most 15 minutes on two cores; goes on where it was stopped.
reproduce: build
	$(VENV)/bin/epi-kernels reproduce --preset small $(REPRODUCE_ARGS)

env: build
	@$(VENV)/bin/epi-kernels env

bench: build
	$(PY) -m bench.run $(BENCH_ARGS)

# Beside torch's optimizers, EPI as published and whichever peers are installed.
side-by-side: build
	$(PY) -m bench.side_by_side $(BENCH_ARGS)

# Low precision against float32 in training runs: ten to twenty minutes on two cores.
quality: build
	$(PY) -m bench.quality $(QUALITY_ARGS)

# Instructions that exactness costs, counted without a GPU; when elements whose gradient stops leave the mask; what code books
# of 8 bits cost.
exactness stopped codebooks: build
	$(PY) -m bench.$@

# The README's tables and plots, from the rows under bench/results/.
tables: build
	$(PY) -m bench.report

# Needs no network and makes no environment: the interpreter of a GPU machine brings its own torch.
# VENV's python serves where PYTHON has no torch.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || echo $(PY))
GPU_TARGETS := gpu gpu-side-by-side gpu-large gpu-offload reproduce-medium
SLICE = $(if $(TIME_LIMIT),--time-limit $(TIME_LIMIT))
$(GPU_TARGETS): export PYTHONPATH := .
$(GPU_TARGETS): export EPI_KERNELS_CUDA_ARCHS ?= native
.PHONY: gpu-build
gpu-build:
	@$(GPU_PYTHON) -c 'import torch' || \
	  { echo "make $(MAKECMDGOALS): neither $(PYTHON) nor $(PY) can import torch; set PYTHON" >&2; exit 1; }
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-side-by-side: gpu-build
	$(GPU_PYTHON) -m bench.side_by_side --device cuda $(strip $(SLICE) $(GPU_ARGS))

gpu gpu-large gpu-offload: gpu-build
	$(GPU_PYTHON) -m bench.$(subst -,_,$@) $(strip $(SLICE) $(GPU_ARGS))

# Both papers' tables on one GPU: 25 minutes at most, TIME_LIMIT=540 for slices of 9; the same command goes on.
# With REPRODUCE_ARGS it is not the whole preset, whose results are committed.
MEDIUM := reproduce_out/medium
reproduce-medium: gpu-build
	$(GPU_PYTHON) -m epi_kernels reproduce --preset medium --device cuda --out $(MEDIUM) $(strip $(SLICE) $(REPRODUCE_ARGS))
	@if [ -z "$(REPRODUCE_ARGS)" ] && [ -f $(MEDIUM)/results.json ]; then cp $(MEDIUM)/results.json bench/results/reproduce-medium.json; fi

CLANG_FORMAT := $(VENV)/bin/clang-format
CXX_FILES := $(filter %.h %.cuh %.cpp %.cu,$(CSRC))

$(VENV)/.dev: $(VENV)/.built
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[test,dev]'
	@touch $@

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

typecheck: $(VENV)/.dev
	$(PY) -m pyright

clean:
	rm -rf build dist *.egg-info epi_kernels/*.so epi_kernels/_build_info.json "$(VENV)/.built"
