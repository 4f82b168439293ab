# From a fresh checkout: `make demo`, `make test`. `make` alone lists what there is.
#
# The lists in requirements/ are installed layer by layer. Once pip is through with one, a stamp in $(VENV)/.stamps
# says so, and the layer is left alone until its list changes.

VENV ?= .venv
PYTHON ?= python3
# Where torch is taken from when plain pip brings the wrong build for this machine; empty: where pip takes all else.
TORCH_INDEX ?=
# An environment of its own for vLLM, so that serving's pins stay away from training; empty: $(VENV).
SERVE_VENV ?=
# Test processes side by side.
WORKERS ?= 2
# More words for `make chaos`, such as --seed 7 or --kills 500; see tests/chaos/__main__.py.
CHAOS ?=

# The driver decides and not nvidia-smi alone, which containers often lack.
ifndef ACCELERATOR
ACCELERATOR := $(shell { nvidia-smi -L || test -e /proc/driver/nvidia/version; } >/dev/null 2>&1 && echo cuda || echo cpu)
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
STAMPS := $(VENV)/.stamps
LAYER = $(PIP) --quiet --no-deps --requirement $<

.PHONY: help demo test lint bench chaos serve-env deepspeed eval cluster dev pins machine
.NOTPARALLEL:  # two pips in one environment undo each other's work

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s%s\n", $$1, $$2}' Makefile

demo: machine $(STAMPS)/llmkit  ## install what training needs, then run the demo: fine-tune a tiny model
	$(PY) -m llmkit.train

test: machine dev deepspeed eval cluster $(STAMPS)/serve-$(ACCELERATOR)  ## install everything, run all tests
	$(PY) -m pytest -n $(WORKERS) --dist loadscope tests

lint: machine dev  ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy llmkit  # the other code folders are in it, by symlink

bench: machine dev  ## run the measurements in tests/benchmarks
	@set -e; for bench in $(sort $(wildcard tests/benchmarks/bench_*.py)); do $(PY) $$bench; done

chaos: machine dev  ## kill runs over a thousand times and see that nothing is lost (up to an hour)
	$(PY) tests/chaos --cold $(CHAOS)

serve-env:  ## add vLLM to the environment (SERVE_VENV=DIR: to its own)
	@$(MAKE) --no-print-directory VENV=$(or $(SERVE_VENV),$(VENV)) machine $(or $(SERVE_VENV),$(VENV))/.stamps/serve-$(ACCELERATOR)

deepspeed: $(STAMPS)/deepspeed  ## add DeepSpeed

eval: $(STAMPS)/eval  ## add lm-evaluation-harness (llmkit evaluate tasks=...)

cluster: $(STAMPS)/cluster  ## add what launcher=slurm and launcher=ray need

dev: $(STAMPS)/dev  ## add what tests and lint need

pins: dev  ## rewrite the lists in requirements/ from what is installed now
	$(PY) requirements/refresh.py

machine:
	@echo "This machine: $(if $(filter cuda,$(ACCELERATOR)),an NVIDIA driver: packages for CUDA,no NVIDIA driver: packages for CPU) (ACCELERATOR=cpu|cuda overrides)"

$(STAMPS)/venv:
	@# A venv that failed half-way, as on Debian without python3-venv, has a python but no pip: make it again.
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmkit needs Python 3.11 or newer: PYTHON=python3.11 make ...")' && \
	  $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

# With its dependencies, because a CUDA build brings its libraries that way; a version that matches is kept.
$(STAMPS)/torch-$(ACCELERATOR): requirements/torch.txt $(STAMPS)/venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement $<
	$(PY) requirements/check_torch.py $(ACCELERATOR)
	@touch $@

# Without build isolation one old source package is built with the setuptools that is here, not with tomorrow's.
$(STAMPS)/train: requirements/train.txt $(STAMPS)/torch-$(ACCELERATOR)
	$(LAYER) --no-build-isolation
	@touch $@

$(STAMPS)/llmkit: pyproject.toml $(STAMPS)/train
	$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/llmkit
	$(LAYER)
	@touch $@

# DeepSpeed's own build imports torch, so it must not be isolated from it.
$(STAMPS)/deepspeed: requirements/deepspeed.txt $(STAMPS)/llmkit
	$(LAYER) --no-build-isolation
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) requirements/compile_deepspeed.py
	@touch $@

$(STAMPS)/eval: requirements/eval.txt $(STAMPS)/llmkit
	$(LAYER) --no-build-isolation
	@touch $@

$(STAMPS)/cluster: requirements/cluster.txt $(STAMPS)/llmkit
	$(LAYER)
	@touch $@

$(STAMPS)/serve-$(ACCELERATOR): requirements/serve-$(ACCELERATOR).txt $(STAMPS)/llmkit
	$(LAYER)
	@touch $@
