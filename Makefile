# Everything a developer runs. `make help` says what each target does.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# certificates of the system, so that a private certificate authority works;
# uv insists on a cache: who has no home to keep one in (`nobody`, a container's bare user id) goes without
NO_CACHE := $(shell [ -n "$$UV_CACHE_DIR$$XDG_CACHE_HOME" ] || [ -w "$$HOME/.cache" ] || [ -w "$$HOME" ] || echo UV_NO_CACHE=1)
UV := UV_SYSTEM_CERTS=1 $(NO_CACHE) VIRTUAL_ENV=$(VENV) $(BIN)/uv
COMPILE := pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links -q \
	--extra embedded --custom-compile-command "make lock" pyproject.toml
COMPILE_TEST := $(COMPILE) --extra test -c dev/locks/run.txt
# what holds for a file holds only once it exists; each is somebody's work
CHECK_TESTS := $(wildcard tests/test_architecture.py tests/test_chart.py)

.PHONY: help setup setup-test run fmt check types floors locked test chaos bench docs lock chart-tools s3-tools clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(if $(wildcard $(VENV)/.test),$(VENV)/.test,$(VENV)/.run) ## a locked environment in .venv, and the broker's jars
	@$(BIN)/python -m dev

setup-test: $(VENV)/.test
	@$(BIN)/python -m dev

run: setup ## the demo: broker, worker, far sides, sample tenants and a live table, until Ctrl-C
	@$(BIN)/headgate demo

fmt: $(VENV)/.test ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/.test locked ## lint, format, types, import floors, locks, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m docs.generate --check
	$(if $(CHECK_TESTS),$(BIN)/pytest $(CHECK_TESTS))

# Compiled again with the lock as its starting point: differs only if pyproject.toml asks for something else.
locked: $(VENV)/.test
	@if grep -nE 'https?:|://|index-url|find-links' dev/locks/*.txt dev/kafka-jars.lock; then \
		echo "dev/locks: an address of an index has got into a lock file" >&2; exit 1; fi
	@now=$$(mktemp -d) && trap 'rm -rf "$$now"' EXIT && cp dev/locks/run.txt dev/locks/test.txt "$$now" \
		&& $(UV) $(COMPILE) -o "$$now/run.txt" && $(UV) $(COMPILE_TEST) -o "$$now/test.txt" \
		&& for name in run test; do diff -u dev/locks/$$name.txt "$$now/$$name.txt" \
			|| { echo "dev/locks/$$name.txt is not what pyproject.toml asks for: make lock" >&2; exit 1; }; done

# Most of a test is waiting for a worker or a timer: processes share the cores well. Each has a stack of its own.
# In the order of the names, since the longest come first then: xdist would leave those of few tests to the end.
TEST_PROCESSES ?= 3

test: setup-test ## all tests on a real Kafka and Redis, but the full-size ones
	@$(BIN)/pytest -m "not chaos" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Hours: one of them is R18's. `make chaos ONLY=rolling` runs, and writes anew, the rows whose tests are named so.
chaos: setup-test ## the full-size tests: kills, stalls, floods, an hour; their report goes to docs/benchmarks.md
	@$(BIN)/pytest -m "chaos or scoreboard" --timeout 3600 --report $(if $(ONLY),-k "$(ONLY)")

bench: setup-test ## deliveries per CPU-second beside two baselines, latency, memory
	@$(BIN)/python -m bench

docs: $(VENV)/.test ## write the generated pages anew: commands, metrics, connectors
	@$(BIN)/python -m docs.generate

lock: $(VENV)/.uv ## resolve pyproject.toml into dev/locks (keeps what is pinned; UPGRADE=1 takes the newest)
	$(UV) $(COMPILE) $(if $(UPGRADE),--upgrade) -o dev/locks/run.txt
	$(UV) $(COMPILE_TEST) $(if $(UPGRADE),--upgrade) -o dev/locks/test.txt

chart-tools: ## build helm for the chart's tests (minutes; needs Go)
	GOBIN=$(CURDIR)/.headgate-cache/bin go install helm.sh/helm/v3/cmd/helm@v3.18.6

s3-tools: ## build versitygw for the S3 tests (minutes; needs Go)
	GOBIN=$(CURDIR)/.headgate-cache/bin go install github.com/versity/versitygw/cmd/versitygw@v1.8.0

clean: ## end the stack in .headgate; remove the environment and everything made here
	@if [ -d .headgate ] && [ -x $(BIN)/headgate ]; then HEADGATE_DEV_DIR=.headgate $(BIN)/headgate dev down; fi
	rm -rf $(VENV) .headgate-cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in steps that run again only when what they are made from has changed.
$(VENV)/.uv: dev/locks/uv.txt
	@dev/venv.sh $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r dev/locks/uv.txt
	@touch $@

# The project itself is installed without its dependencies (the lock has them) and without a build environment of its own
# (setuptools is in the lock).
$(VENV)/.run: dev/locks/run.txt pyproject.toml $(VENV)/.uv
	@$(UV) pip sync --require-hashes dev/locks/run.txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: dev/locks/test.txt pyproject.toml $(VENV)/.uv
	@$(UV) pip sync --require-hashes dev/locks/test.txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.run
