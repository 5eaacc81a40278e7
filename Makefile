# Every target installs what it needs into .venv first.
#   make demo MODEL=path    serve another checkpoint
#   make demo FORMAT=fp8    store the small checkpoint's experts as fp8, w4a16 or mxfp4
#   make test JOBS=1        run the tests one after the other
#   make PYTHON=python3.12  build .venv with another interpreter

PYTHON ?= python3
MODEL ?=
FORMAT ?=
# Files of tests that run at once. On a GPU one at a time: an engine takes most of its memory.
JOBS ?= $(if $(shell nvidia-smi 2>/dev/null),1,2)
BIN := .venv/bin
INSTALLED := .venv/.installed
export PYTHON

# The root holds a folder `kernels`, which would hide a package of that name that transformers
# imports; with this Python does not look for packages here.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Create .venv with vLLM (CUDA if nvidia-smi answers, else CPU) and this package

demo: $(INSTALLED) ## Serve a small model with and without offloading, and compare the answers
	@$(BIN)/vllm-moe-offload demo $(if $(MODEL),'$(MODEL)') $(if $(FORMAT),--format '$(FORMAT)')

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile

lint: $(INSTALLED) ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## Write docs/options.md anew from the options' descriptions
	$(BIN)/python docs/generate_options.py

$(INSTALLED): pyproject.toml .ci/install .ci/cpu-overrides.txt
	@.ci/install
	@touch $@
