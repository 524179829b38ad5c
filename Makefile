# One environment, `.venv`, serves every target below. It is made once, and again when its inputs change.
#
#   PYTHON  the interpreter to make it with (3.10 or newer):  make demo PYTHON=python3.12
#   ARGS    passed on:                                        make demo ARGS=--help, make test ARGS="-k config"

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := test,quality,docs

.DEFAULT_GOAL := help
.PHONY: help install demo notebook test test-all coverage lint audit mutants bench docs dist installs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install everything that the other targets need

demo: $(STAMP) ## train, quantize, export and verify a small net on real images
	@$(BIN)/python -m hf_qat demo $(ARGS)

notebook: $(STAMP) ## run the notebooks on a local Hub and keep their outputs; ARGS=NAME for one
	$(BIN)/python -W ignore -m tests.notebook $(ARGS)

# Each worker begins with a half of the tests, in their order: what the tests of a file share is made in one of them.
test: $(STAMP) ## run the tests, without those that are marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

coverage: $(STAMP) ## lines and branches that the tests run, in all their processes; ARGS="-m slow" for others
	$(BIN)/python -m pip install --quiet "coverage[toml]>=7.10.1"
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

lint: $(STAMP) ## check style (ruff), types (mypy) and security (bandit)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive hf_qat

audit: $(STAMP) ## look for known holes in the pinned libraries (pip-audit; needs a connection)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip $(ARGS)

mutants: $(STAMP) ## change the code in small ways, and print what no test sees; takes an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.mutation $(ARGS)

bench: $(STAMP) ## compare the time of a QAT step with that of a float step
	$(BIN)/python -m tests.benchmarks.step_ratio $(ARGS)

docs: $(STAMP) ## write the API reference, from the docstrings, into build/docs
	$(BIN)/python -m tests.reference build/docs

dist: $(STAMP) ## build wheel and sdist into dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -c "import setuptools.build_meta as build; print(build.build_sdist('dist'))"

installs: $(STAMP) ## use the wheel in empty environments, with the newest and the oldest versions
	$(BIN)/python -m tests.benchmarks.installs $(ARGS)

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_qat tests -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch goes first and alone: it is by far the largest download, and everything else is resolved around it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "== Installing PyTorch ($$(grep '^torch==' constraints.txt))"
	@$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	@echo "== Installing hf_qat[$(EXTRAS)] with the versions of constraints.txt"
	@$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
	@echo "== $(VENV) is ready"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "hf_qat needs Python 3.10 or newer, and '$(PYTHON)' is not that." >&2; \
		echo "Name another interpreter: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "== Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv." >&2; \
		exit 1; }
