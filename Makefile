# Few words; `make` alone lists them. All but `help` make what they need, from nothing more than Python and pip.

PYTHON ?= python3
VENV ?= .venv
TRAINERS ?= build/venv-trainers
BIN := $(VENV)/bin
CODE := $(wildcard aioloader tests bench docs examples)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
FOLDERS := aioloader examples tests
.PHONY: help demo test check docs bench bench-quick trainers release clean $(FOLDERS)

ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
$(error there is no $(PYTHON) here; install it, or name a Python from 3.11 on: make PYTHON=/path/to/python3.11 …)
endif

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo ## train on images behind a slow server, beside torch's DataLoader
	$(BIN)/python -m aioloader demo

# Two processes, each with whole files: most tests wait more than they compute, and some need a core of their own.
test: check ## lint, format, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-dev ## lint, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed-dev ## make the site of docs/ in build/site
	$(BIN)/python docs/build_site.py build/site

bench: $(VENV)/.installed-dev ## measure against the rivals, in full, with plots in build/bench
	$(BIN)/python -m bench --plot build/bench

bench-quick: $(VENV)/.installed-dev ## the same in short: two to three minutes
	$(BIN)/python -m bench --quick

release: $(VENV)/.installed-dev ## make what would be published in dist/, and try it in fresh environments
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m release tests/test_release.py

trainers: $(TRAINERS)/.installed ## every trainer with every loader, in an environment of its own; writes docs/trainers.md
	$(TRAINERS)/bin/python -m tests.trainers.table

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) $(TRAINERS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# The word that is nearest, where one is near: `make tests`, `make chekc`.
MEANT = $(PYTHON) -c 'import difflib, sys; print(*(f"did you mean: make {word}" for word in difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1)))' $@ demo test check docs bench bench-quick trainers release clean >&2

# Else make finds the folder, and says that there is nothing to do.
$(FOLDERS):
	@echo "'$@' is a folder and not a word of this Makefile; the words are:" >&2
	@$(MEANT)
	@$(MAKE) --no-print-directory help >&2
	@exit 1

# A word that is mistyped.
.DEFAULT:
	@echo "'$@' is not a word of this Makefile; the words are:" >&2
	@$(MEANT)
	@$(MAKE) --no-print-directory help >&2
	@exit 1

# The stamps are made anew when a dependency may have changed. A running demo needs no test tools, hence two of them.
$(VENV)/.installed-demo: EXTRAS := demo,progress,uvloop
$(VENV)/.installed-dev: EXTRAS := bench,dev
$(VENV)/.installed-demo $(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Some Linux distributions ship venv without ensurepip: then the pip of $(PYTHON) brings pip in.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "aioloader needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=/path/to/python3.11 …" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

# composer and torchtnt ask for packages older than the torch that is tested here, so they come without what they ask for;
# fastai asks for torchvision, which does not load beside a CPU torch, and runs without.
$(TRAINERS)/.installed: pyproject.toml constraints.txt tests/trainers/requirements.txt
	$(PYTHON) -m venv $(TRAINERS) || { \
		$(PYTHON) -m venv --clear --without-pip $(TRAINERS) && $(PYTHON) -m pip --python $(TRAINERS)/bin/python install --quiet pip; }
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trainers]'
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/trainers/requirements.txt
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'mosaicml>=0.32' 'torchtnt>=0.2.4'
	$(TRAINERS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
