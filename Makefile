# Two commands on a fresh machine: `make demo` trains on real pictures, `make test` runs the suite.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all

demo: .venv/installed
	$(BIN)/python -m clipx.train experiment=demo

test: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-all: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m ""

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: some GB, most of it PyTorch; this takes minutes."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
