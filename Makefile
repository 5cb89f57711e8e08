# `make demo` and `make test` need Python 3.11 and make, and set up everything else themselves.
# What they cannot install (no root, no apt) they name in a line each, and go on without it.

SHELL := /bin/bash
BIN := .venv/bin
# What `make bench` measures beside the table.
MEASURES := campaigns large-campaign singles snapshot first-file messages memory growth
# Directories that hold Python.
SOURCES := worker tasks tests benchmarks

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test coverage test-deploy soak bench bench-quick lint format venv constraints clean

help: ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## the whole system on this machine: Redis, a worker, a guest directory, its fork
	@scripts/setup.sh packages demo
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/forkvm demo

test: ## ruff, mypy (strict) and every test
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory lint
	$(BIN)/pytest -n 3 --dist worksteal -m 'not alone'
	$(BIN)/pytest -m alone

coverage: ## line and branch coverage of worker/ and tasks/ by all tests, processes that they start included
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n 3 --dist worksteal --timeout 600 $(COVERAGE_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-deploy: ## the image and docker-compose.yml in real containers, with a dockerd of its own; as root
	@scripts/setup.sh packages deploy
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/python -m tests.deploy

soak: ## forks, workers and faults at random for five minutes, then the books; SOAK_ARGS='--seconds 1800 --seed 7'
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory --silent venv
	CI=true $(BIN)/python -m tests.soak $(SOAK_ARGS)

bench: ## forkvm beside its peers and the kernel's limit, and all else that has a target; takes some hours
	@scripts/setup.sh packages bench
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/python -m benchmarks --table $(MEASURES:%=--measure %) --json docs/benchmark.json --svg docs/benchmark.svg \
		$(BENCH_ARGS)

bench-quick: ## a part of it in under two minutes; BENCH_ARGS='--dir DIR' measures in a directory, also without root
	@scripts/setup.sh packages bench
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/python -m benchmarks --quick $(BENCH_ARGS)

lint: venv ## ruff and mypy only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(SOURCES)

format: venv ## rewrites the sources as ruff wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: .venv/.installed ## .venv with forkvm and the tools for its development

.venv/.installed: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh venv
	@touch $@

constraints: ## takes the newest allowed version of every dependency into constraints.txt
	@scripts/setup.sh constraints

clean: ## removes what the targets above made
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
