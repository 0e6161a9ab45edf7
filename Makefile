# Two commands on a fresh machine with Python and make: `make demo` trains on real pictures, `make test` runs the suite.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/python -m uv
LOCK := requirements.lock

# Containers often set it; without bytecode every process compiles all of torch's modules anew, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all test-lowest test-newest lint types lock

demo: .venv/installed
	$(BIN)/python -m clipx.train experiment=demo

test: .venv/tested lint
	$(BIN)/python -m pytest --numprocesses auto

test-all: .venv/tested lint types
	$(BIN)/python -m pytest --numprocesses auto -m ""

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/tested
	$(BIN)/mypy

# The ends of the ranges in setup.cfg; the lock lies between them.  Old releases warn of what newer neighbours deprecate.
test-lowest: .venv-lowest/tested
	.venv-lowest/bin/python -m pytest --numprocesses auto -W ignore::DeprecationWarning

test-newest: .venv-newest/tested
	.venv-newest/bin/python -m pytest --numprocesses auto

# The versions of development, for every Python and platform that clipx supports.
lock: .venv/uv
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras setup.cfg \
		--custom-compile-command "make lock" --output-file $(LOCK)

.venv/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clipx needs Python 3.10 to 3.13, and this is " \
		+ sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

.venv/installed: .venv/uv setup.cfg pyproject.toml $(LOCK)
	@echo "Installing clipx into .venv: PyTorch and 87 packages; on Linux a download of 3 GB, and 6 GB on disk."
	$(UV) pip install --python $(BIN)/python --constraints $(LOCK) --editable .
	touch $@

.venv/tested: .venv/installed
	@echo "Installing what the tests need: 100 more packages, a download of 0.3 GB."
	$(UV) pip install --python $(BIN)/python --constraints $(LOCK) --editable '.[test]'
	touch $@

.venv-lowest/tested: .venv/uv setup.cfg pyproject.toml
	$(UV) venv --clear --python $(BIN)/python .venv-lowest
	$(UV) pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	touch $@

.venv-newest/tested: .venv/uv setup.cfg pyproject.toml
	$(UV) venv --clear --python $(BIN)/python .venv-newest
	$(UV) pip install --python .venv-newest/bin/python --upgrade --editable '.[test]'
	touch $@
