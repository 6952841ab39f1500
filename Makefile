# `make` alone lists the targets. Each of them makes .venv from requirements.txt when it is missing or out of date;
# once it is there, nothing but `make lock` needs the network.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP_INSTALL := -m pip install --disable-pip-version-check
# test processes; each computes on one thread
WORKERS ?= 2
# `make test ARGS="-k sampler"`
ARGS ?=
UPGRADE ?= nothing

# Prints the first interpreter in range that can make an environment. `make setup PYTHON=/path/to/python3.12` names one.
FIND_PYTHON = for python in $(or $(PYTHON),python3.11 python3.12 python3); do \
	if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	2>/dev/null; then echo "$$python"; exit 0; fi; done; \
	echo "Python 3.11 or 3.12 with its venv module is needed and was not found: install one, or name it with" \
	"PYTHON=/path/to/python." >&2; exit 1

.PHONY: help setup quickstart test test-all fuzz lint format lock clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with the pinned packages and this one, editable

$(STAMP): requirements.txt pyproject.toml
	@python=$$($(FIND_PYTHON)) || exit 1; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	$(BIN)/python $(PIP_INSTALL) -r requirements.txt
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# Repeated, it goes on with the run that is there, or scores it again.
quickstart: $(STAMP)  ## Train E-MMDiT from scratch on rendered shapes, show the pictures and score them
	$(BIN)/emmdit fit -c experiments/quickstart.yaml --ckpt_path last $(ARGS)
	rm -rf runs/quickstart/evaluation
	$(BIN)/emmdit evaluate --ckpt runs/quickstart -c experiments/evaluation/shapes_short.yaml --bounds

test: $(STAMP)  ## Run the tests that are not marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-all: $(STAMP)  ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

fuzz: $(STAMP)  ## Give the readers a million broken files (ARGS="--hours 1 --target tar")
	$(BIN)/python -m tests.fuzz.run --processes $(WORKERS) $(ARGS)

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Sort imports, mend what ruff can, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Present pins are kept; UPGRADE is a pattern of names to let go: make lock UPGRADE='torch|torchvision', UPGRADE='.*' for all.
# What torch brings for its platform (CUDA, ROCm, Triton) stays unpinned: torch's own metadata pins it, differently per platform.
lock:  ## Resolve pyproject.toml and write every pin to requirements.txt (UPGRADE=pattern lets pins go)
	@python=$$($(FIND_PYTHON)) || exit 1; "$$python" -m venv --clear .venv-lock
	sed -E '/^($(UPGRADE))==/d' requirements.txt > .venv-lock/constraints.txt
	.venv-lock/bin/python $(PIP_INSTALL) -c .venv-lock/constraints.txt -e '.[dev]'
	{ echo "# The tested set, resolved from pyproject.toml by \`make lock\`; do not edit by hand."; \
	  .venv-lock/bin/python -m pip freeze --all --exclude-editable \
	  | sed -E '/^(pip|wheel|nvidia-|cuda-|(pytorch-)?triton|rocm|amd-)/d; s/\+[a-z0-9.]+$$//'; } > .venv-lock/requirements.txt
	@! grep -n ' @ ' .venv-lock/requirements.txt || { echo "A pin is an address, not a version." >&2; exit 1; }
	mv .venv-lock/requirements.txt requirements.txt
	rm -rf .venv-lock

clean:  ## Remove caches and build leftovers (not .venv, not runs)
	rm -rf .venv-lock .pytest_cache .ruff_cache .hypothesis build dist ./*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
