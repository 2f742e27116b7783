# The two commands: `make demo` and `make test`. Each makes what it needs; a second run skips the installation.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THALWEG := $(BIN)/thalweg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types floors tests bench results report wheel clean help

help:
	@echo "make demo     install, lay the gradient routes side by side on real digits, write the report"
	@echo "make test     install, lint, type-check, check the floors of the house, run the tests"
	@echo "make bench    time and count against peers and bounds"
	@echo "make results  rebuild the recorded results and the README's board"
	@echo "make wheel    build the package"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.recipes

demo: $(VENV)/.recipes
	$(THALWEG) compare classify --out runs/compare_classify
	$(THALWEG) report --runs runs --out site

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

types: $(VENV)/.dev
	$(BIN)/mypy

floors: $(VENV)/.dev
	$(BIN)/lint-imports

tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -q -m "not slow"

test: lint types floors tests

bench: $(VENV)/.dev
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

results: $(VENV)/.dev
	$(THALWEG) compare classify --out runs/compare_classify
	$(THALWEG) compare sampler --out runs/compare_sampler
	@for number in $$($(BIN)/python -c "from thalweg.recipes import find; print(*find())"); do \
	  $(THALWEG) run $$number || exit 1; done
	$(BIN)/python -m thalweg.report.readme

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs site
