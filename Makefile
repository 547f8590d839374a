# Needs python3 (3.11 or later) and make. Each target makes .venv, or completes it with what that target needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# One stamp file for each set of extras that is installed; a newer pyproject.toml installs the set again.
STAMP  := $(VENV)/.stamp

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO = --ranks 8 --tokens 128 --hidden 7168 --experts 256 --topk 8 --dtype bf16 --quant int8

# PyPI's torch, for gloo, may bring several GB of CUDA: `make peers PEERS=peers` goes without.
PEERS ?= peers,gloo

# The documentation's theme prints a notice about its successor.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test bench peers lint types layers format coverage docs serve clean help

demo: $(STAMP)-base ## DeepSeek-R1's expert-parallel exchange on 8 emulated dies, checked
	$(BIN)/xccl bench moe $(DEMO)

test: $(STAMP)-test ## all tests, and the benchmarks as plain tests
	$(BIN)/python -m pytest tests bench --benchmark-disable

bench: $(STAMP)-bench ## benchmarks, saved under .benchmarks for --benchmark-compare
	$(BIN)/python -m pytest bench --benchmark-autosave

peers: $(STAMP)-$(PEERS) ## xccl beside Open MPI, MPICH, gloo and multiprocessing, 13 minutes
	$(BIN)/python -m bench.peers

lint: $(STAMP)-lint ## style, format, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict xccl
	$(BIN)/lint-imports --no-logo

types: $(STAMP)-lint ## of lint: mypy --strict
	$(BIN)/mypy --strict xccl

layers: $(STAMP)-lint ## of lint: the direction of imports
	$(BIN)/lint-imports --no-logo

format: $(STAMP)-lint ## format the sources, and apply the fixes that are safe
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

coverage: $(STAMP)-test ## tests with line and branch coverage
	$(BIN)/python -m pytest tests --cov --cov-report=term

docs: $(STAMP)-docs ## the documentation, into site/
	$(BIN)/mkdocs build --strict --quiet

serve: $(STAMP)-docs ## the documentation at http://127.0.0.1:8000, rebuilt on change
	$(BIN)/mkdocs serve

clean: ## remove .venv and everything generated
	rm -rf $(VENV) site build dist .benchmarks .coverage .coverage.* htmlcov
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit("xccl needs Python 3.11 or later, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(STAMP)-base: $(STAMP)-venv pyproject.toml
	$(PIP_INSTALL) --editable .
	@touch $@

$(STAMP)-%: $(STAMP)-venv pyproject.toml
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# Stamps are made by pattern rules, and make must not delete them as intermediate files.
.SECONDARY:
