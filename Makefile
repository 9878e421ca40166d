# Two commands matter: `make chat` and `make test`. Both work in a fresh clone with nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
# Tests that run at once: half of the time goes into compiling and into waiting for commands, on one core each.
WORKERS ?= 2
# What is installed for tests: dev, or dev,browser to test the page in a real one (apt-get install chromium).
EXTRAS ?= dev
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: chat test fast lint clean

chat: $(VENV)/installed
	$(BIN)/m2lite chat

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

fast: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "m2lite needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/installed-$(EXTRAS): pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
