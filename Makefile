# `make` lists the targets. Everything runs from $(VENV), which is made on first use and again
# when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv serve test lint format-check types ci clean

help:  ## list the targets
	@awk -F ':.*##  *' '/^[a-z-]+:.*##/ {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## make or refresh the environment, from the pinned set
	@:

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (the first time takes minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@

serve: venv  ## serve serve_config.yaml in the foreground; Ctrl-C ends it
	@$(BIN)/serve run serve_config.yaml

# A Ray cluster has the machine to itself; the other tests share its cores, a file at a time.
test: venv  ## the default test run; with PYTEST_ARGS="-m slow" and the like that run instead
ifdef PYTEST_ARGS
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not ray and not gpu and not slow"
	@$(BIN)/python -m pytest -m "ray and not gpu and not slow"
endif

lint: venv  ## ruff check
	@$(BIN)/ruff check .

format-check: venv  ## ruff format, looking only
	@$(BIN)/ruff format --check .

types: venv  ## mypy, strict on xc_ray
	@$(BIN)/mypy

ci:  ## the gate, in a fresh environment
	@.ci/run

clean:  ## remove the environment and every cache
	@rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +
