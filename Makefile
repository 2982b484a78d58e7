# make demo       everything end to end on real data: needs Python 3.11+ and a package registry that pip can reach
# make demo-full  the same, trained and evaluated on all users
# make env        the environment that the tests use: extras dev, torch, tpu
# make test       the tests, but for those marked slow
# make test-all   all the tests
#
# PYTHON=...      the interpreter to make .venv from, in place of the first fitting one on the PATH
# VENV=...        another folder than .venv

SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL_INPUTS := pyproject.toml constraints/py311.txt constraints/py312.txt

# pyenv and the like put names on the PATH that fail when run, and Debian has a python3 without ensurepip: so each is tried.
FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
FIND_PYTHON = for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python); do \
	  if "$$python" -c '$(FITS)' >/dev/null 2>&1; then echo "$$python"; break; fi; done

# JAX with libtpu (or CUDA) installed looks for such a chip and, finding none, prints alarming lines before it uses the CPU.
# Where the machine shows no device file of an accelerator, and nobody has chosen a platform, choose the CPU.
ACCELERATOR := $(wildcard /dev/accel[0-9]* /dev/vfio/[0-9]* /dev/nvidia[0-9]* /dev/dxg /dev/kfd)
ifeq ($(strip $(ACCELERATOR)$(JAX_PLATFORMS)),)
export JAX_PLATFORMS := cpu
endif

.DEFAULT_GOAL := help
.PHONY: help env demo demo-full test test-all

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

env: $(VENV)/.installed-env

demo: $(VENV)/.installed
	@$(BIN)/allmrec demo

demo-full: $(VENV)/.installed
	@$(BIN)/allmrec demo --full

test: $(VENV)/.installed-env
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed-env
	@$(BIN)/python -m pytest

$(BIN)/python:
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer with venv and ensurepip found; install one, or say make PYTHON=/path/to/python" >&2; \
	  exit 1; fi; \
	echo "Making $(VENV) with $$("$$python" -V)"; \
	"$$python" -m venv $(VENV)

# pip says a line for each of a hundred packages; shown are the big downloads and the end, the rest is in install.log.
define install
	@python=$(BIN)/python; log=$(VENV)/install.log; \
	"$$python" -c '$(FITS)' || { echo "make: $(BIN)/python does not run or is older than 3.11; remove $(VENV) and say make again" >&2; exit 1; }; \
	"$$python" -m pip --version >/dev/null 2>&1 || "$$python" -m ensurepip >/dev/null; \
	constraints=$$("$$python" -c 'import sys; print("constraints/py31%d.txt" % min(sys.version_info[1] - 10, 2))'); \
	echo "Installing '$(1)' at the versions of $$constraints (details: $$log)"; \
	set -o pipefail; \
	PIP_DISABLE_PIP_VERSION_CHECK=1 "$$python" -m pip install --progress-bar off -e '$(1)' -c "$$constraints" 2>&1 | tee "$$log" \
	  | { grep --line-buffered -E '^ *Downloading .*\([0-9]{2,}(\.[0-9]+)? MB\)|^ERROR|^Installing' | sed -E 's/(-[0-9][^-]*)-.*\.whl/\1/; s/(packages):.*/\1/' || true; } \
	  || { tail -n 20 "$$log" >&2; echo "make: the installation failed; all that pip said is in $$log" >&2; exit 1; }; \
	touch $(2)
endef

$(VENV)/.installed: $(BIN)/python $(INSTALL_INPUTS)
	$(call install,.,$@)

$(VENV)/.installed-env: $(BIN)/python $(INSTALL_INPUTS)
	$(call install,.[dev$(,)torch$(,)tpu],$(VENV)/.installed $@)

, := ,
