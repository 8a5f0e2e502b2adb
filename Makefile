# `make demo` and `make test` need Python 3.11 or later and nothing else; the first run installs into .venv.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo docs test test-all test-lower torture format clean

demo: .venv/installed
	$(BIN)/python -m experiments.demo

test: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: test
	$(BIN)/python -m pytest -n 2 -m slow

# With the oldest releases that setup.cfg allows.
test-lower: .venv-lower/installed
	.venv-lower/bin/python -m pytest -n 2 --dist worksteal

torture: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m torture -rP tests/test_torture.py

docs: .venv/installed-docs
	$(BIN)/mkdocs build

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiling all files of all packages takes as long as installing them. Python compiles the files that
# it imports, once if it may keep the result.
export PYTHONDONTWRITEBYTECODE =

# The tests' installation holds the demo's: what is resolved once need not be again.
.venv/installed: EXTRA = [experiments]
.venv/installed-test: EXTRA = [test]
.venv/installed-docs: EXTRA = [docs]
.venv/installed .venv/installed-test .venv/installed-docs: setup.cfg setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ant-jax needs Python 3.11 or later; try make PYTHON=python3.12")'
	@echo "installing '.$(EXTRA)' into .venv; half a minute, or more if the connection is slow ..."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-compile --editable '.$(EXTRA)'
	touch .venv/installed $@

.venv-lower/installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv --clear .venv-lower
	.venv-lower/bin/pip install --quiet uv
	.venv-lower/bin/uv pip install --quiet --python .venv-lower --resolution lowest-direct --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-lower runs site
