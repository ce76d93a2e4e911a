# `make demo` and `make test` set up all they need; a second run installs nothing.
# Also: lint, test-slow, bench. Only test-slow may install system packages.

PYTHON_VENV := .venv/bin/python

# The moment make started, in seconds since 1970: `minutes.total` of the demo counts the set-up too.
ifndef SYMBIOTIC_START_TIME
export SYMBIOTIC_START_TIME := $(shell date +%s)
endif

# Several processes share the cores, so one thread each, and idle threads don't spin.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-slow lint bench bench-router bench-data bench-convert

demo: setup
	$(PYTHON_VENV) examples/digits/recipe.py

test: setup
	$(PYTHON_VENV) -m pytest -m "not slow"

test-slow: setup
	sh scripts/install_test_programs.sh
	$(PYTHON_VENV) -m pytest -m slow

lint: setup
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .

bench: bench-router bench-data bench-convert

bench-router: setup
	$(PYTHON_VENV) -m benchmarks.bench_router

# Beside Megatron-LM's tool: MEGATRON_LM=FOLDER make bench-data, a checkout of Megatron-LM; and the extra gigatoken.
bench-data: setup
	$(PYTHON_VENV) -m benchmarks.bench_data

bench-convert: setup
	$(PYTHON_VENV) -m benchmarks.bench_convert

setup:
	@sh scripts/setup.sh
