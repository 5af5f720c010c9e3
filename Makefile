# make install: set up.   make demo: set up and train a small model.   make test: lint, types, architecture, quick tests.
.PHONY: install demo test lint types architecture tests slow trackers docs lowest faults site site-test clean help

PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its extensions when they are used, not when it is installed.
export DS_BUILD_OPS := 0

help:
	@echo "make install  set up .venv, and neither train nor test"
	@echo "make demo     set up .venv and train a small model on the Python library's own sources"
	@echo "make test     set up .venv and run lint, types, architecture rules and all tests but the slow ones"
	@echo "make slow     run the slow tests: every layout of ranks, traces, whole command lines; 20 minutes on two cores"
	@echo "make lowest   set up .venv-lowest with the lowest release declared of every dependency, and run the quick tests there"
	@echo "make docs     build the documentation site into build/docs, and fail at a broken link"
	@echo "make trackers install wandb, mlflow and trackio too, and test that runs are logged to them"
	@echo "make faults   kill, stop and starve real jobs of two ranks, and see that they resume"
	@echo "make site     build the planner as a page, in build/site; needs Node.js with npm; make site-test tests it in Chromium"

install: .venv/installed
	@echo "set up; for a start: $(BIN)/scalegpt plan, $(BIN)/scalegpt train --help"

demo: .venv/installed
	$(BIN)/python launch/demo.py

test: lint types architecture tests

faults: .venv/installed-dev
	$(BIN)/pytest tests/faults tests/launch/test_machines.py -m "faults or not faults"

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/pytest -q tests/docs/test_site.py
	@echo "built: build/docs/index.html"

.venv/installed-docs: .venv/installed-dev
	$(BIN)/pip install -q -e ".[deepspeed,hf,dev,docs]"
	touch $@

# The other trackers install more than all else together but torch, so only this target does.
trackers: .venv/installed-dev
	$(BIN)/pip install -q -e ".[deepspeed,hf,dev,track]"
	$(BIN)/pytest tests/training/test_trackers.py

# What leans on the dependencies, without what takes tens of seconds. Types are those of the newest releases.
lowest: $(LOWEST)/installed
	$(LOWEST)/bin/ruff check .
	$(LOWEST)/bin/lint-imports
	$(LOWEST)/bin/pytest -q -n 2 --dist loadgroup -m "not slow and not faults" tests/base tests/config tests/data tests/model \
	  tests/checkpoint tests/backends tests/optim tests/training tests/hardware/test_nvml.py tests/hardware/test_detect.py

# docs/planner_page/package.json has the version of Pyodide, which npm downloads. `scalegpt plan --ui` serves the page.
site: .venv/installed
	$(BIN)/python docs/planner_page/build.py

site-test: .venv/installed-dev site
	$(BIN)/pip install -q playwright
	$(BIN)/pytest -m site tests/plan_page

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

architecture: .venv/installed-dev
	$(BIN)/lint-imports

tests: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadgroup -m "not slow and not faults and not site"

slow: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadgroup -m "slow and not faults and not site"

# torch comes first and alone: DeepSpeed's own set-up looks for it, outside of a build environment.
# There is no build environment to constrain then, and pip from 26 on refuses to be given both.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'ScaleGPT needs Python 3.11 or newer; make install PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch numpy ninja setuptools wheel packaging
	env -u PIP_BUILD_CONSTRAINT $(BIN)/pip install -q --no-build-isolation deepspeed
	$(BIN)/pip install -q -e ".[deepspeed,hf]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -e ".[deepspeed,hf,dev,datatrove]"
	touch $@

$(LOWEST)/installed: pyproject.toml constraints.txt .ci/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install -q -c constraints.txt -c $(LOWEST)/constraints.txt torch numpy ninja setuptools wheel packaging
	env -u PIP_BUILD_CONSTRAINT $(LOWEST)/bin/pip install -q -c constraints.txt -c $(LOWEST)/constraints.txt --no-build-isolation deepspeed
	$(LOWEST)/bin/pip install -q -c constraints.txt -c $(LOWEST)/constraints.txt -e ".[deepspeed,hf,dev]"
	touch $@

clean:
	rm -rf .venv $(LOWEST) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
