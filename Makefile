# Every target installs what it needs; `make train ARGS="train.steps=50"` passes overrides on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# By itself and without a hash: which build of it is right (CUDA, ROCm, CPU) depends on the machine and its index.
TORCH := torch==2.13.0
ARGS ?=

.PHONY: install install-dev train test test-slow check format docs lock clean

install: $(VENV)/.train
install-dev: $(VENV)/.dev

$(VENV)/.train: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; osp needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --no-deps --require-hashes --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.train requirements-dev.lock
	$(PIP) install --no-deps --require-hashes --requirement requirements-dev.lock
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

# Resolve both locks again from pyproject.toml. torch comes first and pinned: a range resolves to another build. uv adds
# the hashes of all files of a version, so that the locks serve every platform.
FREEZE := build/lock/bin/pip freeze --all --exclude pip --exclude torch --exclude-editable | sed 's/ @ file:.*//'
HASHES := build/uv/bin/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --no-header
lock:
	rm -rf build/lock build/uv && $(PYTHON) -m venv build/lock && $(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	build/lock/bin/pip install --quiet $(TORCH) "setuptools>=77"
	build/lock/bin/pip install --quiet --editable .
	$(FREEZE) > build/lock/train.txt
	build/lock/bin/pip install --quiet --constraint build/lock/train.txt --editable ".[dev]"
	$(FREEZE) | grep --invert-match --line-regexp --fixed-strings --file build/lock/train.txt > build/lock/dev.txt
	{ echo "# Made by 'make lock': what training needs beside torch. 'make train' installs exactly this."; \
	  $(HASHES) build/lock/train.txt; } > requirements.lock
	{ echo "# Made by 'make lock': what development adds. 'make test' and 'make check' install both locks."; \
	  $(HASHES) build/lock/dev.txt; } > requirements-dev.lock
	rm -rf build/lock build/uv

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
