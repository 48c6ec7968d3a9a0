# Needs make and Python 3.11 or newer, nothing else: every target makes what it needs in `.venv`.

VENV ?= .venv
PYTHON ?=
JOBS ?= auto
POINTS ?= 510
SEED ?= 1
SEEDS ?= 200
BROKER ?=
KAFKA ?= 4.3.1

BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Empty: where it is set, each of the hundreds of processes that tests start compiles all it imports anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo kafka up down logs test parity containers lint format bench torture races golden clean

# Docker's compose, or the older program of that name; both read COMPOSE_FILE, and docker/.env beside the first file.
COMPOSE = $(shell docker compose version > /dev/null 2>&1 && echo docker compose || echo docker-compose)
export COMPOSE_FILE ?= docker/compose.yaml

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN) ## a primary and two replicas ferry real blocks, and prove it: a minute (BROKER=kafka://... for Kafka)
	$(BIN)/stateferry demo $(if $(BROKER),--broker $(BROKER))

kafka: $(RUN) ## a Kafka broker on loopback to play with, until Ctrl-C (KAFKA=3.9.1; needs java and mvn)
	$(BIN)/python -m tests.kafka.server --version $(KAFKA)

up: ## the same without end, in containers: Kafka, a source, a primary, two replicas (needs docker and compose)
	$(COMPOSE) build
	$(COMPOSE) up -d --no-build
	@echo; echo 'It runs. To see it work, or to break it:'; echo
	@for words in 'exec replica-1 stateferry status' 'exec replica-2 stateferry root' 'exec primary stateferry snapshot' \
			'kill primary' 'ps'; do \
		echo "  $(COMPOSE) -f docker/compose.yaml $$words"; \
	done
	@echo; echo '  make up      starts again what was killed'; echo '  make logs'; echo '  make down'; echo

down: ## end the containers; their data stays (VOLUMES=1 removes it)
	$(COMPOSE) down $(if $(VOLUMES),--volumes)

logs: ## follow what the containers log, until Ctrl-C
	$(COMPOSE) logs --follow --tail 20

test: $(DEV) ## the whole suite, two processes a core (JOBS=2 for two in all)
	$(BIN)/pytest -n $(JOBS) --maxprocesses 8

parity: $(DEV) ## the tests that took turns between Kafka versions, each on the version whose turn it was not
	KAFKA_TURNS=left $(BIN)/pytest -n $(JOBS) --maxprocesses 8

containers: $(DEV) ## run the compose stack and kill what is in it (docker and compose, or root and Debian's docker.io)
	$(BIN)/pytest tests/docker -m containers -rs

lint: $(DEV) ## ruff, mypy and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV) ## measure this machine: the figures of the README (minutes; QUICK=--quick for seconds)
	@for name in wire apply reads pipeline restore; do $(BIN)/stateferry bench $$name $(QUICK) || exit; done

torture: $(DEV) ## disturb real processes and brokers at POINTS=510 seeded fail points, SEED=1
	$(BIN)/pytest tests/torture -m torture -n $(JOBS) --maxprocesses 8 --points $(POINTS) --seed $(SEED)
	STATEFERRY_CRASH_SEEDS=20 $(BIN)/pytest tests/test_crash_model.py -n $(JOBS) --maxprocesses 8

races: $(DEV) ## sweeps, publishers, squashers and restores on one object store, in 200 seeded orders (SEEDS=1000)
	STATEFERRY_RACE_SEEDS=$(SEEDS) $(BIN)/pytest -n $(JOBS) tests/test_sweep_races.py

golden: $(DEV) ## read the golden files of every format version (VERSION=v2 writes those of a new one first)
	$(if $(VERSION),cd tests && $(abspath $(BIN))/python golden/make.py $(VERSION))
	$(BIN)/pytest tests/test_golden.py

format: $(DEV) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove the demo's data, caches and builds; the virtual environment stays
	rm -rf demo-data build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find pipeline topology tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			echo "making $(VENV) with $$($$python --version)"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -f $(BIN)/python*; \
			echo "$$python cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; \
			exit 1; \
		fi; \
	done; \
	echo "stateferry needs Python 3.11 or newer: none of python3, python3.13, python3.12, python3.11 is." >&2; \
	echo "Name one with: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# Installed once, and again when pyproject.toml changes.
$(RUN): pyproject.toml | $(BIN)/python
	@echo "installing stateferry into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "installing stateferry and its development tools into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $(RUN) $@
