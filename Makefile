# make install: set up.   make demo: set up and train a small model.   make test: lint, types, architecture, tests.
.PHONY: install demo test lint types architecture tests faults clean help

PYTHON ?= python3
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its extensions when they are used, not when it is installed.
export DS_BUILD_OPS := 0

help:
	@echo "make install  set up .venv, and neither train nor test"
	@echo "make demo     set up .venv and train a small model on the Python library's own sources"
	@echo "make test     set up .venv and run lint, types, architecture rules and all tests"
	@echo "make faults   kill, stop and starve real jobs of two ranks, and see that they resume"

install: .venv/installed
	@echo "set up; for a start: $(BIN)/scalegpt plan, $(BIN)/scalegpt train --help"

demo: .venv/installed
	$(BIN)/python launch/demo.py

test: lint types architecture tests

faults: .venv/installed-dev
	$(BIN)/pytest tests/faults -m "faults or not faults"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

architecture: .venv/installed-dev
	$(BIN)/lint-imports

tests: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadgroup

# torch comes first and alone: DeepSpeed's own set-up looks for it, outside of a build environment.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ScaleGPT needs Python 3.11 or newer; make install PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch numpy ninja setuptools wheel packaging
	$(BIN)/pip install -q --no-build-isolation deepspeed
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
