# make demo: set up and segment the bundled scan.   make test: set up and pass the tests.
# Needs Python 3.10 to 3.13 and make. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= $(shell scripts/find-python)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output
# For gpu-check: the environment that was set up as docs/gpu.md says, the active one first.
GPU_PYTHON ?= $(or $(VIRTUAL_ENV),$(VENV))/bin/python

.PHONY: demo test check bundle gpu-check gpu-layers lowest clean help

help:
	@echo "make demo   set up and segment the bundled scan"
	@echo "make test   set up and run the tests"
	@echo "make check  set up and run format, lint and type checks"
	@echo "make gpu-check  on a machine with a GPU, set up as docs/gpu.md says: measure and test all"
	@echo "make gpu-layers  without a GPU: PyCUDA and TensorRT's bindings, tested on stand-ins"
	@echo "make lowest  the tests with the oldest dependencies that are admitted"
	@echo "make bundle one archive that installs on a machine without a network"
	@echo "make clean  remove environments and build results (not imported weights)"

demo: $(VENV)/.build
	@$(BIN)/trtseg engines build --models demo
	@$(BIN)/trtseg segment trtseg/demo/phantom_23w.nii.gz --models demo -o $(OUT)
	@echo "results are in $(OUT)/"

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

# Which library is there, and for which CUDA, is the user's choice: nothing that holds one is
# installed here, and nothing at all where pytest is there.
gpu-check:
	@$(GPU_PYTHON) -c 'import sys; del sys.path[0]; import trtseg' 2>/dev/null || { \
	    echo "trtseg is not installed for $(GPU_PYTHON): set up an environment as docs/gpu.md" \
	        "says, or name its interpreter: make gpu-check GPU_PYTHON=..." >&2; exit 2; }
	@$(GPU_PYTHON) -c 'import pytest' 2>/dev/null || $(GPU_PYTHON) -m pip install --quiet \
	    --disable-pip-version-check --editable '.[test-core]'
	$(GPU_PYTHON) bench/gpu_check.py

gpu-layers: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" scripts/gpu-layers

lowest:
	scripts/lowest

bundle: $(VENV)/.build
	$(BIN)/python scripts/bundle

# One stamp per extra: an environment is set up again only when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 was found; install one, or name it: make PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) engines/demo
