# The five commands that people use. They need make and Python 3.11 or newer, and nothing else.

PYTHON ?= python3
MODEL ?=
ARGS ?=

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test lint bench clean

## serve: serve the bundled demo model (or MODEL=folder-or-hub-id) on port 8000
serve: .venv/installed
	@exec $(BIN)/pyllm serve $(MODEL) $(ARGS)

## test: run the tests
test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

## lint: style, types, and the direction of imports
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## bench: throughput of the server with 1, 8 and 32 clients
bench: .venv/installed-dev
	$(BIN)/python benchmarks/serving.py $(ARGS)

## clean: remove the environment and every cache
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PyLLM needs Python 3.11 or newer: name one with 'make PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: .venv/bin/python pyproject.toml constraints.txt model/kernels.cpp
	@echo "Installing PyLLM into .venv (a few minutes the first time) ..."
	$(PIP_INSTALL) --editable ".[client]"
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@
