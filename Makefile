# `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FACTOR ?= 100
# Large pages for the buffers that XLA's CPU back end takes anew in each step: fewer page faults (glibc >= 2.35).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

# This environment has libtpu for its compiler (`rynnvla aot`); without the choice JAX would look for a TPU first.
export JAX_PLATFORMS := cpu

.PHONY: demo test test-slow hostile wheel drill drill-bucket injection soak docs lint clean

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/rynnvla demo --out runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -rs -m slow tests
	$(MAKE) hostile

# A hundred times as many damaged files for every reader as `make test` tries, with a limit on memory (in KB).
hostile: $(VENV)/.ready
	ulimit -v 24000000; RYNNVLA_HOSTILE=$(FACTOR) $(BIN)/python -m pytest -q $(wildcard tests/test_hostile*.py tests/*/test_hostile*.py)

# Builds the wheels, installs ours in a new environment and uses it from there.
wheel: $(VENV)/.ready
	$(BIN)/python -m pytest -q -rs -m slow tests/repository/test_wheel.py

# Thirty kills of two-process runs of each kind of model; minutes, so not part of the tests.
drill: $(VENV)/.ready
	$(BIN)/python -m tests.drill

# The same with work dirs in a bucket that fails; hours.
drill-bucket: $(VENV)/.ready
	$(BIN)/python -m tests.drill --bucket

# Ten minutes of the robot's server among hostile clients.
soak: $(VENV)/.ready
	$(BIN)/python -m tests.soak

# Kills of single commands at their system calls; most of an hour. Needs Linux and strace.
injection: $(VENV)/.ready
	$(BIN)/python -m tests.injection

docs: $(VENV)/.ready
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist site *.egg-info
