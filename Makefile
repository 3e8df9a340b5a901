# Concord: a command for a newcomer to each package (first-run, first-align, first-merge), the tests, and a few more for
# those who work on it (make help).
#
# Everything happens in one virtual environment, $(VENV), which is made once and brought up to date only when
# pyproject.toml changes. Variables: the interpreter (`make PYTHON=python3.12 test`), the torch to install
# (`TORCH=torch==2.13.0`; by default pip's choice), processes that run tests, of one thread each (`WORKERS=2`; 0 for this
# one alone), and arguments for pytest (`PYTEST_ARGS="tests/freeact -k packing"`).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
PYTEST_ARGS ?=
WORKERS ?= 2
# files are compiled when they are first imported, which most are not: that saves a good part of the installation
PIP_INSTALL = $(VENV)/bin/python -m pip install -qq --no-compile
# ... and kept: without the compiled files every new process pays for compiling its imports again
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help first-run first-align first-merge journey docs package test quality format results clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

first-run: $(VENV)/.installed-run ## install, fetch a small real model, quantize it, talk to it
	@echo "Fetching the model (once) ..."
	$(VENV)/bin/python tools/assets.py smollm2
	$(VENV)/bin/python examples/quantize_and_chat.py

first-align: $(VENV)/.installed-align ## teach a small model in English, see it in four other languages (minutes)
	@echo "Fetching the model and the words (once) ..."
	$(VENV)/bin/python tools/assets.py smollm2 concepts
	$(VENV)/bin/python -W ignore examples/mlc_dpo.py

first-merge: $(VENV)/.installed-merge ## merge a widened fine-tune back into its small target, beside controls (minutes)
	@echo "Fetching the model and a text (once), making a donor of it ..."
	$(VENV)/bin/python -W ignore examples/merge/prepare.py relative
	$(VENV)/bin/mergekit-ot run --quiet examples/merge/relative.yml examples/merge/work/relative-merge
	$(VENV)/bin/mergekit-ot eval --quiet examples/merge/relative.yml examples/merge/work/relative-merge \
		--texts examples/merge/work/handbook-eval.txt --max-tokens 2048

journey: $(VENV)/.installed-dev ## merge, align, quantize and chat with small real models (minutes)
	$(VENV)/bin/python examples/journey/run.py

docs: $(VENV)/.installed-dev ## build the documentation as a site, strictly, into out/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

package: $(VENV)/.installed-dev ## build wheel and sdist and use each in a fresh environment
	$(VENV)/bin/python -m tools.package

test: quality ## install the development tools, check the style, run all tests
	$(if $(filter 0,$(WORKERS)),,OMP_NUM_THREADS=1) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quality: $(VENV)/.installed-dev ## style, format and types, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy optimum_freeact trl_mlc mergekit_ot

format: $(VENV)/.installed-dev ## apply the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

results: $(VENV)/.installed-dev ## every published claim, checked against its measurements
	$(VENV)/bin/python -m tools.results check
	$(VENV)/bin/python -m tools.results update --check

clean: ## remove environments, builds and caches (fetched assets stay)
	rm -rf $(VENV) .ci-venv build dist out runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp appears only after a whole installation, so an interrupted one is simply taken up again.
$(VENV)/.installed-torch: | $(VENV)/bin/python
	@echo "Installing into $(VENV) (once; torch is large) ..."
	$(PIP_INSTALL) '$(TORCH)'
	@touch $@

EXTRAS_run = gguf,plots
EXTRAS_align = align,peft,gguf
EXTRAS_merge = merge,plots,gguf
EXTRAS_dev = dev,docs
$(VENV)/.installed-%: pyproject.toml | $(VENV)/.installed-torch
	$(PIP_INSTALL) --editable '.[$(EXTRAS_$*)]'
	@touch $@
