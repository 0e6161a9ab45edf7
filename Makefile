# Two commands on a fresh machine: `make demo` trains on real pictures, `make test` runs the suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all

demo: .venv/installed
	$(BIN)/python -m clipx.train experiment=demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-all: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m ""

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
