# One target a deed. The first one called makes .venv and installs requirements.txt; later ones install nothing.
# Flags go through ARGS: make q2 ARGS="-no_maxpool -seed 7"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help q2 q2-grid test lint bench clean

help:           ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ -/'

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	@touch $@

q2: $(READY)    ## question 2: train the network on OCTMNIST, or on phantoms where it cannot be had
	$(BIN)/python hw2-q2.py $(ARGS)

q2-grid: $(READY)  ## question 2, whole: three learning rates, the choice, no max-pool, three seeds
	$(BIN)/python hw2-q2.py -grid -seeds 42 43 44 -jobs 2 $(ARGS)

lint: $(READY)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint      ## lint and all tests
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY) ## our training loop against the plain one, in one process
	$(BIN)/python benchmarks/bench_q2.py $(ARGS)

clean:          ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__
