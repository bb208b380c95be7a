# Short names for the commands below; nothing here that cannot be typed. `make -n <target>` shows one.
PYTHON ?= python3
BIN := $(or $(VITLINEAR_VENV),.venv)/bin

.PHONY: help venv test quick nightly newest oldest peer lint format types imports gpu-cache demo ci clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

venv:  ## make .venv with everything the tests need
	$(PYTHON) tools/run_tests.py --version

test:  ## run the whole suite; ARGS="-k name -x" goes to pytest
	$(PYTHON) tools/run_tests.py $(ARGS)

quick:  ## run a few tests of every room
	$(PYTHON) tools/run_tests.py --quick $(ARGS)

nightly:  ## run the whole suite, and all combinations of options of which it runs pairs
	$(PYTHON) tools/run_tests.py --nightly $(ARGS)

newest:  ## run the whole suite with the newest versions, in .venv-newest
	$(PYTHON) tools/run_tests.py --newest $(ARGS)

oldest:  ## run the whole suite with the oldest versions that we allow, in .venv-oldest
	$(PYTHON) tools/run_tests.py --oldest $(ARGS)

peer:  ## run timm's own suite on our models; VITLINEAR_PEER_MODELS=all for every size
	$(PYTHON) tools/run_tests.py tests/peer $(ARGS)

lint: venv  ## ruff's rules and formatting, checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## ruff's fixes and formatting, applied
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv  ## mypy on the rooms and files that pyproject.toml lists
	$(BIN)/mypy

imports: venv  ## which room may import which: the contracts of pyproject.toml
	$(BIN)/lint-imports --no-cache

gpu-cache:  ## compile the kernels for a GPU that is not there; PYTHON is that of its machine (3.12)
	$(PYTHON) tools/gpu_cache.py make output/gpu_cache.tar.xz $(ARGS)

demo:  ## train, evaluate and predict on digits
	$(PYTHON) tools/quickstart.py

ci:  ## what continuous integration runs
	.ci/run

clean:  ## remove builds and caches; the environment and output/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/peer/.suite
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
