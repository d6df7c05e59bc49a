PYTHON ?= python3
BIN := .venv/bin
BENCHMARKS = $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-name lock clean

help:  ## print the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.installed  ## create .venv and install the pinned dependencies

demo: setup  ## the main job: CMUdict to a pruned, verified, registered model
	$(BIN)/vinedresser retrain pipelines.demo $(ARGS)

test: setup  ## run the tests: make test ARGS="-k commit --random-order"
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: setup  ## lint, format, types and the arrows between modules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: bench-name setup  ## run one benchmark: make bench NAME=x
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

lock: setup  ## write the locks of the image in deploy/, after a change of constraints.txt
	$(BIN)/python deploy/lock.py

clean:  ## remove what tools and builds leave behind; keeps .venv and workspace
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

bench-name:
	@test -f 'benchmarks/$(NAME).py' || { echo 'make bench: no benchmark "$(NAME)"; NAME is one of: $(or $(BENCHMARKS),none yet)' >&2; exit 2; }

# torch first and pinned: unpinned it may bring gigabytes of CUDA packages of another version.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev,rouge,speech]'
	touch $@
