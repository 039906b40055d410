# Every command of the project. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PYTEST_ARGS ?=
# Processes of the pure tests.
JOBS ?= auto
DRILL ?=
# Extra words for pip, such as the index of a torch build for your hardware.
PIP_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
LINT_STAMP := .venv/.lint-installed

# Extra words for `make up`, `make down` and `make ui`, such as --mlflow-port 5001.
UP_ARGS ?=

# Ray pastes the interpreter's path into a shell line, without quotes. Not CURDIR: make would split it into words.
ifneq ($(shell [[ "$$(pwd -P)" != *[[:space:]\|\&\;\<\>\(\)\$$\`\\\"\'\*\?]* ]] || echo bad),)
$(error the path of this clone must hold no spaces and no characters of the shell, got '$(CURDIR)': Ray's workers would never start; move the clone)
endif

export RAY_AUTH_MODE := token
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup check format test test-all newest test-nodes drill bench demo up down ui clean lock

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv with the pinned packages; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	@'$(PYTHON)' -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || { echo "set-up: making .venv with $(PYTHON)"; '$(PYTHON)' -m venv .venv || { rm -rf .venv; exit 1; }; }
	@echo "set-up: installing the packages pinned in constraints.txt (the first time takes minutes)"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "set-up: done"

# Apart from the set-up, which the demo needs too: training needs no linter.
$(LINT_STAMP): $(STAMP) pyproject.toml constraints.txt
	@echo "set-up: installing what checks manifests, scripts and images"
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev,lint]'
	@touch $@

check: setup $(LINT_STAMP) ## lint, format, types, floors; manifests, scripts and images
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m infra.lint

format: setup ## rewrite the code in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

test: setup ## run the quick tests: all pure ones, and a few of real training; PYTEST_ARGS="-k crops" narrows them
	$(BIN)/python -m pytest -n $(JOBS) -m 'not process and not cluster and not nodes' $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m essential $(PYTEST_ARGS)

test-all: setup ## run the tests that `make test` leaves out: of processes and local clusters (20 minutes)
	$(BIN)/python -m pytest -m '(process or cluster) and not essential' $(PYTEST_ARGS)

newest: ## run the quick tests with the newest packages that pyproject.toml allows, in a virtual environment of their own
	@rm -rf .venv-newest && '$(PYTHON)' -m venv .venv-newest
	@.venv-newest/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[dev]'
	@.venv-newest/bin/python -m pip freeze --exclude-editable | grep -i -E '^(ray|torch|mlflow|webdataset|s3fs|pytest)=='
	.venv-newest/bin/python -m pytest -n $(JOBS) -m 'not process and not cluster and not nodes' $(PYTEST_ARGS)
	.venv-newest/bin/python -m pytest -m essential $(PYTEST_ARGS)

test-nodes: setup ## the tests that need several nodes: Ray clusters in network namespaces (root, iproute2, util-linux)
	$(BIN)/python -m pytest -m nodes tests/nodes $(PYTEST_ARGS)

drill: setup ## break real runs in every way that is claimed to be survived (half an hour); DRILL="random" narrows it
	@$(BIN)/python -m tests.drills $(DRILL)

bench: setup ## measure against goals, peers and limits (make bench-step, -data, -s3, ...: one; all of it takes more than an hour)
	@$(BIN)/python -m benchmarks

bench-%: setup
	@$(BIN)/python -m benchmarks $*

demo: setup ## the whole main job on this machine: real data, local cluster
	@env -u RAY_ADDRESS ORCHESTRATOR_RUNS='$(CURDIR)/runs' $(BIN)/python jobs/train_ensemble.py
	@echo "look at it: make ui"

up: setup ## start Ray and MLflow on loopback; UP_ARGS="--mlflow-port 5001" and the like
	$(BIN)/python cluster/local.py up $(UP_ARGS)

down: setup ## stop them
	$(BIN)/python cluster/local.py down $(UP_ARGS)

ui: setup ## the MLflow page over the runs of this clone
	$(BIN)/python cluster/local.py ui $(UP_ARGS)

clean: ## remove caches of builds and tools; never runs/ or data
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . \( -path ./.venv -o -path ./.git -o -path ./runs -o -path ./data \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The comment at the head of constraints.txt is kept; a build's local tag (as in 2.13.0+cpu) is dropped.
lock: $(LINT_STAMP) ## write the versions in .venv to constraints.txt
	@{ grep '^#' constraints.txt; \
	   $(BIN)/python -m pip freeze --all --exclude-editable \
	   | grep -v -i -E '^(pip|googlenet-orchestrator)(==| @)' | sed -E 's/^([^#]+==[^+ ]+)\+.*/\1/' | LC_ALL=C sort -f; \
	} > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@echo "lock: $$(grep -c == constraints.txt) packages in constraints.txt"
