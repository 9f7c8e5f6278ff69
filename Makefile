# Targets set up what they need in .venv; run `make` for the list.

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= torch,bench,cuda,arm,dev
JOBS   ?= auto

# A plain `pip install torch` on Linux brings gigabytes of CUDA libraries; this index has the same release without them.
# Where it cannot be reached, torch comes from the usual index.
TORCH       = torch>=2.9,<2.14
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN     = $(VENV)/bin
comma   = ,
STAMP   = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PYTEST  = $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-arm lint format bench compat clean

help:  ## this list
	@echo 'make TARGET, where TARGET is one of'
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1	\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'Settings: PYTHON=$(PYTHON) VENV=$(VENV) EXTRAS=$(EXTRAS) (without torch: EXTRAS=dev) JOBS=$(JOBS)'

setup: $(STAMP)  ## create .venv and install mmopt in it, as all other targets do when pyproject.toml has changed

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo 'mmopt needs Python 3.10 to 3.13; name one: make PYTHON=python3.12' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing mmopt[$(EXTRAS)] in $(VENV) (the first time this takes a few minutes) …'
ifneq (,$(findstring torch,$(subst $(comma), ,$(EXTRAS))))
	@test "$$(uname -s)" != Linux || $(BIN)/python -m pip install --quiet --no-deps --retries 0 --timeout 10 \
	  --index-url $(TORCH_INDEX) '$(TORCH)' || echo '$(TORCH_INDEX) cannot be used; trying the usual index' >&2
endif
	@$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP)  ## optimize a real model, check it, use it, and measure it
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)  ## the tests, without the slow ones
	$(PYTEST)

test-all: $(STAMP)  ## all tests
	$(PYTEST) -m ''

test-arm: $(STAMP)  ## code for Arm under an emulator (apt install qemu-user libstdc++6-arm64-cross; an hour of CPU time)
	$(BIN)/python -m pip install --quiet 'ziglang>=0.13'
	$(PYTEST) -m arm tests/arm

lint: $(STAMP)  ## style, types, and imports between layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code, and repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure the reference models against onnxruntime, OpenVINO and torch.compile (takes long)
	@mkdir -p out
	$(BIN)/python -m benchmarks.models --json out/models.json

compat: $(STAMP)  ## the operator conformance suite of ONNX, each model through the whole of mmopt (takes long)
	$(BIN)/python -m tests.compat

clean:  ## remove what tools and runs left behind; the environment stays
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
