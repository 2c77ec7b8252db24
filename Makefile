PYTHON ?= python3
BIN := .venv/bin
# torch first and by itself: on machines that keep its wheels on disk nothing is downloaded.
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Tests of one file run in one process, since some of them use a port.
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all bench lint docs

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH) || $(BIN)/pip install -q "torch>=2.9" torchvision
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/chameleon demo --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest $(WORKERS) --hypothesis-profile=other_examples

bench: .venv/installed
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/laboratory.py
	$(BIN)/python benchmarks/data.py

docs: .venv/installed
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy chameleon
