# Every command of the project. The work is in book/build.py; here is only the set-up.
# Needs Python >= 3.11 (override with PYTHON=...), make and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
UV := $(shell sed -n 's/.*"\(uv==[^"]*\)".*/\1/p' pyproject.toml)
BUILD := $(BIN)/python book/build.py
CHAPTERS = $(wildcard notebooks/[0-9][0-9]_*.ipynb)
SIDE := --numprocesses=logical --dist=loadfile
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=300 --nbval-kernel-startup-timeout=120 $(SIDE)

.DEFAULT_GOAL := help
.PHONY: help venv book test test-long check nbval rows smoke pages bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

venv: $(STAMP)  ## install everything, pinned, into .venv

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)'
	@echo 'The set-up takes some minutes, the last of them in silence: every file is compiled once.'
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --editable '.[book]'  # else every first import compiles torch
	touch $@

book: venv  ## run every chapter from the rows and build the book
	$(BUILD) book

test: check nbval smoke book  ## everything: style, laws, chapters, smoke run, the book in a browser
	$(BIN)/python -m pytest $(SIDE)

test-long: check nbval smoke book  ## the same with the slow tests
	$(BIN)/python -m pytest $(SIDE) -m "long or not long"

check: venv  ## style of the code and of the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

nbval: venv  ## re-run the committed chapters and compare their text outputs
	$(BIN)/python -m pytest $(NBVAL) $(CHAPTERS)

rows: venv  ## train: CHAPTER=02 PROFILE=short [BUDGET=seconds] [CLUSTER=local]
	$(BUILD) rows --chapter '$(CHAPTER)' --profile '$(PROFILE)' --budget '$(BUDGET)' --cluster '$(CLUSTER)'

smoke: venv  ## train every chapter's smallest profile into a throw-away folder
	$(BUILD) smoke

pages: venv  ## run the committed chapters again from the rows, in place
	$(BUILD) pages

bench: venv  ## speed of the training engine
	$(BIN)/python tests/bench.py $(ARGS)

clean:  ## remove what the commands made; .venv (the set-up) and downloads stay
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
