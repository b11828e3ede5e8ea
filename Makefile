# Every target installs what it needs; `make train ARGS="train.steps=50"` passes overrides on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
ARGS ?=

.PHONY: install install-dev train test test-slow check format docs lock clean

install: $(VENV)/.train
install-dev: $(VENV)/.dev

$(VENV)/.train: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; osp needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.train requirements-dev.lock
	$(PIP) install --requirement requirements.lock --requirement requirements-dev.lock
	@touch $@

train: install
	$(BIN)/python scripts/train.py +experiment=quickstart $(ARGS)

# One process per core of a two-core machine, one thread each. The tests of a file share its fixtures, so a file stays
# in one process; tests/conftest.py orders the files.
test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: install-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site in docs/ as build/site, which opens without a server. A broken link fails.
docs: install-dev
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html in a browser"

# Resolve both locks again from pyproject.toml. torch comes first and pinned: a range resolves to another build.
FREEZE := build/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu//; s/ @ file:.*//'
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 "setuptools>=77"
	build/lock/bin/pip install --quiet --editable .
	{ echo "# Made by 'make lock': what training needs. 'make train' installs exactly this."; $(FREEZE); } > requirements.lock
	build/lock/bin/pip install --quiet --constraint requirements.lock --editable ".[dev]"
	{ echo "# Made by 'make lock': what development adds. 'make test' and 'make check' install both locks."; \
	  $(FREEZE) | grep --invert-match --line-regexp --fixed-strings --file requirements.lock; } > requirements-dev.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
