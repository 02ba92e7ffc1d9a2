# Everything that people and CI do with a clone. Needs Python 3.11+, git and make; the rest comes with `make venv`.
# PYTHON=/path/to/python3 chooses the interpreter, TESTS=tests/unit what `make test` runs.
.DEFAULT_GOAL := help
.PHONY: help venv test lint format bench demo clean
.SUFFIXES:

TESTS ?=
VENV := .venv/.made

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(VENV)  ## .venv with the program, its tests and their tools

$(VENV): requirements.lock pyproject.toml tools/bootstrap
	./tools/bootstrap
	@touch $@

# Four at a time, as most of them wait; the tests of a file stay together, and each worker has servers of its own. In the
# order of the directories: the long ones are in the first, and none of them is left for the end.
test: $(VENV)  ## all tests, against real servers
	.venv/bin/pytest -n 4 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)  ## style, types, and who may import whom
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

format: $(VENV)  ## write the code as `make lint` wants it
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

bench: $(VENV)  ## measure, beside a bare consumer
	.venv/bin/python -m bench

demo: $(VENV)  ## one experiment from queue to results, without a server
	@.venv/bin/python tools/demo.py

clean:  ## remove what the others made, the virtual environment too
	rm -rf .venv .test-venvs .demo dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
