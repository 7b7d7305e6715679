# `make demo` and `make test` set up what they need in .venv; nothing else is touched.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/dyndiag demo all

test: .venv/test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

# torch first and alone: whatever else asks for it then takes the one that is there.
.venv/torch: .venv/pip constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

.venv/test: .venv/torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@ .venv/demo

clean:
	rm -rf .venv build dist *.egg-info runs
