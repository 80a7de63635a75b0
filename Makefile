# Every target makes what it needs: type `make demo` or `make test` in a fresh clone.
#
#   PYTHON   the interpreter that makes the virtual environment (3.10 or newer)
#   TORCH    the build of PyTorch; by default the CPU build where there is no NVIDIA GPU
#   ARGS     more arguments for `demo` and `test`, such as: make test ARGS='-k plan -x'
#   ENGINE   what `demo` updates: embedded (small engines of this package) or vllm (its server, on CPU)
#   VENV_CACHE   where the engines' environments are kept, which take gigabytes and minutes to make

PYTHON ?= python3
ARGS ?=
ENGINE ?= embedded
VENV_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ckpt-engine/venvs
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)$(if $(shell command -v nvidia-smi),,+cpu)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults test-gpu test-vllm check lock clean

help:  ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

demo: $(if $(filter vllm,$(ENGINE)),.venv-vllm/.stamp,$(STAMP))  ## Updates two engine processes from a checkpoint on disk, and verifies every byte
	@$(if $(filter vllm,$(ENGINE)),.venv-vllm/bin,$(BIN))/ckpt-engine demo --engine $(ENGINE) $(ARGS)

test: $(STAMP)  ## Runs all tests
	$(BIN)/python -m pytest $(ARGS)

test-faults: $(STAMP)  ## Runs the tests that kill, stop and starve ranks and workers
	$(BIN)/python -m pytest -q tests/faults $(ARGS)

test-gpu: $(STAMP)  ## Runs the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

test-vllm: .venv-vllm/.stamp  ## Runs the tests on real vLLM (CPU)
	.venv-vllm/bin/python -m pytest -m vllm tests/engines/vllm $(ARGS)

check: $(STAMP)  ## Checks format, lint and types, and runs the unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: PYTHON=$(PYTHON) is not Python 3.10 or newer. Name one that is: make PYTHON=python3.11 ..." >&2; \
	  exit 1; }
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) ..."
	@$(PIP) install '$(TORCH)' -c constraints.txt || { $(TORCH_HELP); exit 1; }
	@echo "Installing ckpt-engine and its tools, at the versions of constraints.txt ..."
	@$(PIP) install hatchling -c constraints.txt
	@$(PIP) install --no-build-isolation -e '.[dev]' -c constraints.txt
	@touch $@

# An engine's packages lie in VENV_CACHE, under the hash of their lock, for every clone to use. A clone's own
# environment is small: a path to those, and this package in place.
VLLM_LOCK := integrations/vllm/constraints.txt
VLLM_PACKAGES = $(VENV_CACHE)/vllm-$(shell sha256sum $(VLLM_LOCK) | cut -c1-16)

.venv-vllm/.stamp: $(VLLM_LOCK) pyproject.toml Makefile
	@mkdir -p $(VENV_CACHE)
	@flock $(VLLM_PACKAGES).lock $(MAKE) --no-print-directory $(VLLM_PACKAGES)/.stamp
	@echo "Making .venv-vllm ..."
	@rm -rf .venv-vllm
	@$(VLLM_PACKAGES)/bin/python -m venv --without-pip .venv-vllm
	@ls -d $(VLLM_PACKAGES)/lib/python*/site-packages > $$(ls -d .venv-vllm/lib/python*/site-packages)/packages.pth
	@$(VLLM_PACKAGES)/bin/python -m pip -qq --disable-pip-version-check --python .venv-vllm/bin/python \
	  install --no-build-isolation --no-deps -e .
	@touch $@

$(VLLM_PACKAGES)/.stamp:
	@echo "Making $(VLLM_PACKAGES), which takes minutes and 3.5 GB, once ..."
	@rm -rf $(VLLM_PACKAGES)
	@$(PYTHON) -m venv $(VLLM_PACKAGES)
	@$(VLLM_PACKAGES)/bin/python -m pip -qq --disable-pip-version-check install --no-deps -r $(VLLM_LOCK) || \
	  { $(subst $(TORCH),an engine's packages,$(TORCH_HELP)); exit 1; }
	@touch $@

# Never another build in its place: the default one of the package index brings gigabytes of CUDA.
define TORCH_HELP
  echo "make: pip could not install $(TORCH); what it said is above." >&2; \
  echo "  If it was not the network, its index has no such build. Set PIP_EXTRA_INDEX_URL to PyTorch's" >&2; \
  echo "  wheel index for this build (CPU), or PIP_FIND_LINKS to a folder that holds the wheel." >&2; \
  echo "  To choose another build: make TORCH=torch==VERSION ..." >&2
endef

lock: $(STAMP)  ## Writes constraints.txt from what is installed in .venv
	@{ sed -n '/^#/p;/^#/!q' constraints.txt; $(BIN)/python -c "$$LOCK"; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(STAMP)

# A package whose pinned version needs a newer Python than ours is pinned from that Python on only.
define LOCK
from importlib.metadata import distribution
from subprocess import check_output
import re, sys
freeze = check_output([sys.executable, "-m", "pip", "freeze", "--exclude-editable"], text=True)
for name in sorted((line.split("==")[0].split(" @ ")[0] for line in freeze.splitlines()), key=str.lower):
    if name == "ckpt-engine": continue
    found = distribution(name)
    least = re.search(r">=\s*3\.(\d+)", found.metadata.get("Requires-Python") or "")
    marker = f"; python_version >= '3.{least[1]}'" if least and int(least[1]) > 10 else ""
    print(f"{name}=={found.version.split('+')[0]}{marker}")
endef
export LOCK

clean:  ## Removes the virtual environment, caches and build products
	rm -rf $(VENV) .venv-vllm build dist .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
