# make demo · make test · make lint · make lock
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Python 3.12 or 3.11, whichever is found first and works; uv can bring one.
PYTHON := $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; raise SystemExit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	2>/dev/null && command -v $$p && break; done)
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
STAMP := .venv/.installed

DURATION ?= 60
RATE ?= 500

.PHONY: help
help: ## show this
	@grep -hE '^[a-z][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): requirements.lock
ifneq ($(PYTHON),)
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
else ifneq ($(UV),)
	$(UV) venv --quiet --clear --python 3.12 .venv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
else
	@echo "Python 3.12 or 3.11 (with venv) is needed and was not found." >&2
	@echo "Install one (Debian: apt install python3 python3-venv; macOS: brew install python@3.12)," >&2
	@echo "or install uv, which brings its own." >&2
	@exit 1
endif
	@touch $@

.PHONY: install
install: $(STAMP) ## create .venv from the hashed lock

.PHONY: demo
demo: $(STAMP) ## from nothing to scored transactions on screen (RATE=events/s DURATION=s)
	@RATE=$(RATE) DURATION=$(DURATION) $(BIN)/python -m dataflows.demo

.PHONY: chaos
chaos: $(STAMP) ## the whole kill matrix on Apache Kafka, half an hour (CHAOS_SEED=… repeats); rewrites its page
	$(BIN)/python -m pytest -q -s tests/chaos/full.py

.PHONY: drill
drill: $(STAMP) ## lose the flow's state on Apache Kafka, restore a backup, then rebuild it without one; two minutes
	$(BIN)/python -m tests.chaos.drill

.PHONY: bench bench-peers
bench: $(STAMP) ## rates, latencies, stages and live state on Apache Kafka, 40 minutes; rewrites its page
	$(BIN)/python -m benchmarks
bench-peers: $(STAMP) ## the same job by us and by our peers, 15 minutes; rewrites its page
	$(BIN)/python -m benchmarks.peers

.PHONY: bench-overload bench-metrics soak
bench-overload: $(STAMP) ## a rush of three times the usual rate, by overload policy, 12 minutes; rewrites its page
	$(BIN)/python -m benchmarks.overload
bench-metrics: $(STAMP) ## what being observed costs, 5 minutes; rewrites its page
	$(BIN)/python -m benchmarks.metrics
soak: $(STAMP) ## half an hour with a hot card, an outage and a burst: does anything grow? rewrites its page
	$(BIN)/python -m benchmarks.soak

.PHONY: bench-guard
bench-guard: $(STAMP) ## the flow's rate over a bare loop's, against a stored band (two minutes; CI runs it)
	$(BIN)/python -m benchmarks.guard

.PHONY: bench-delivery
bench-delivery: $(STAMP) ## what exactly-once costs, on Apache Kafka; rewrites its page
	$(BIN)/python -m benchmarks.delivery

.PHONY: kafka kafka-3
kafka: $(STAMP) ## Apache Kafka until Ctrl-C, its address on screen (Java 17+, Maven)
	@$(BIN)/python -m tests.kafka.cluster
kafka-3: $(STAMP) ## the same with three brokers
	@$(BIN)/python -m tests.kafka.cluster --brokers 3

.PHONY: test
test: $(STAMP) ## the whole test suite; starts what it needs
	$(BIN)/python -m pytest

.PHONY: lint
lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: lock
lock: COMPILE := uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --quiet
lock: ## rewrite the locks: all, the image's part of it, and of the tools apart (needs uv)
	$(COMPILE) --upgrade --all-extras pyproject.toml -o requirements.lock
	$(COMPILE) --constraint requirements.lock pyproject.toml -o requirements-runtime.lock
	$(COMPILE) --upgrade .ci/sbom.in -o .ci/sbom.lock
	$(COMPILE) --upgrade tests/deploy/tools.in -o tests/deploy/tools.lock

.PHONY: docs
docs: $(STAMP) ## rewrite the README's generated tables
	$(BIN)/python docs/readme_tables.py

.PHONY: clean
clean: ## remove everything generated, .venv included
	rm -rf .venv .demo .cache .kafka .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
