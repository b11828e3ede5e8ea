# Every target sets up what it needs; `make train ARGS="train.steps=50"` passes overrides on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install train test test-slow check format lock clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; osp needs Python 3.11 or later: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

train: install
	$(BIN)/python scripts/train.py +experiment=quickstart $(ARGS)

# A process for each of two cores, with one thread each, or they get in each other's way. A file's tests stay in one
# process, for they share what its fixtures made; files go in the order of tests/conftest.py.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolve anew what pyproject.toml asks for. torch first and by its exact version: a range fetches another build.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet --editable ".[dev]"
	{ echo "# Made by 'make lock'; 'make install' installs exactly this."; \
	  build/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu//; s/ @ file:.*//' ; } > requirements.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
