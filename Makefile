# `make demo` and `make test` need Python 3.11 and make, and install everything else. They print a line
# for each package that they cannot install (without root or apt-get), and continue without it.

SHELL := /bin/bash
# The tests start thousands of processes. Without files of bytecode each compiles the program again, for 0.3 s.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
# What `make bench` measures in addition to the table.
MEASURES := campaigns large-campaign singles load metrics snapshot first-file messages memory growth neighbour
# Directories with Python sources.
SOURCES := worker tasks tests benchmarks

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test coverage test-deploy test-observe screenshots test-clients soak bench bench-quick lint format venv constraints clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## show the whole system on this machine: Redis, a worker, a guest directory and its fork
	@scripts/setup.sh packages demo
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/forkvm demo

test: ## run ruff, mypy (strict) and all tests
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory lint
	$(BIN)/pytest -n 4 --dist worksteal

coverage: ## line and branch coverage of worker/ and tasks/ by all tests, processes that they start included
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n 4 --dist worksteal --timeout 600 $(COVERAGE_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test-deploy: ## test the image and docker-compose.yml in containers, with its own dockerd; needs root
	@scripts/setup.sh packages deploy
	@$(MAKE) --no-print-directory --silent venv
	@scripts/setup.sh venv deploy
	$(BIN)/python -m tests.deploy

test-observe: ## test the dashboard, an alert and Flower with a real Prometheus, a real Flower and real workers
	@scripts/setup.sh packages observe
	@$(MAKE) --no-print-directory --silent venv
	CI=true $(BIN)/pytest -s tests/observe/monitoring.py tests/observe/grafana_schema.py tests/observe/flower.py

screenshots: ## make docs/pictures again, from a real terminal and a real browser; needs root
	@scripts/setup.sh packages screenshots
	@$(MAKE) --no-print-directory --silent venv
	CI=true $(BIN)/pytest -s tests/observe/screenshots.py

test-clients: ## test clients with each version of Celery since 5.2, which it installs
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory --silent venv
	CI=true $(BIN)/pytest tests/clients/celery_versions.py

soak: ## run random forks and faults for five minutes, then check all results; SOAK_ARGS='--seconds 1800 --seed 7'
	@scripts/setup.sh packages test
	@$(MAKE) --no-print-directory --silent venv
	CI=true $(BIN)/python -m tests.soak $(SOAK_ARGS)

bench: ## compare forkvm with other tools and with the kernel's limit, and check all targets; takes hours
	@scripts/setup.sh packages bench
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/python -m benchmarks --table $(MEASURES:%=--measure %) --json docs/benchmark.json --svg docs/benchmark.svg \
		$(BENCH_ARGS)

bench-quick: ## run a part of it in under two minutes; BENCH_ARGS='--dir DIR' uses a directory, without root
	@scripts/setup.sh packages bench
	@$(MAKE) --no-print-directory --silent venv
	$(BIN)/python -m benchmarks --quick $(BENCH_ARGS)

lint: venv ## run ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(SOURCES)

format: venv ## format the sources with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: .venv/.installed ## make .venv with forkvm and its development tools

.venv/.installed: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh venv
	@touch $@

constraints: ## write the newest allowed version of each dependency to constraints.txt
	@scripts/setup.sh constraints

clean: ## remove everything that these targets made
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
