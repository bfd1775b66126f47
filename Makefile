# Few words; `make` alone lists them. All but `help` make what they need, from nothing more than Python and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CODE := $(wildcard aioloader tests bench docs examples)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
FOLDERS := aioloader examples tests
.PHONY: help demo test check docs bench bench-quick release clean $(FOLDERS)

ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
$(error there is no $(PYTHON) here; install it, or name a Python from 3.11 on: make PYTHON=/path/to/python3.11 …)
endif

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo ## train on images behind a slow server, beside torch's DataLoader
	$(BIN)/python -m aioloader demo

test: check ## lint, format, types and tests
	$(BIN)/python -m pytest

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

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

# Else make finds the folder, and says that there is nothing to do.
$(FOLDERS):
	@echo "'$@' is a folder and not a word of this Makefile; the words are:" >&2
	@$(MAKE) --no-print-directory help >&2
	@exit 1

# A word that is mistyped.
.DEFAULT:
	@echo "'$@' is not a word of this Makefile; the words are:" >&2
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
