# Two commands on a fresh machine with python3 (3.11 to 3.13), python3-venv and make:
#   make sweep      the eight-model demo on the phantom, with its table
#   make test       the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A worker takes 2 GB; tests of one file share what is costly to make, and stay together.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(WORKERS)
MARK ?= not faults
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup sweep test test-faults check check-gpu ui report bench docs coverage clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(READY)  ## make .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

sweep: $(READY)  ## the demo; ARGS="experiment=report data=rsna data.root=FILE" runs another sweep
	$(BIN)/python -m ich.sweep experiment=demo $(ARGS)

test: $(READY)  ## the quick tests, without network and GPU; ARGS="-k name" picks some
	$(PYTEST) -m "$(MARK)" $(ARGS)

test-faults: $(READY)  ## the slow ones: sweeps in which jobs crash, hang and are killed
	$(PYTEST) -m faults $(ARGS)

check: $(READY)  ## what CI runs: ruff, mypy, all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test MARK=

# No .venv: a machine that is lent has its own torch, and no network. What it lacks comes by PYTHONPATH,
# as ich itself does; the report is copied to $OUT, if that is set.
GPU_BENCH := --parts gpu --image-size 224 --rounds 2 --seconds 1 --images 500 --minutes 9
check-gpu:  ## what there is to know of a machine with a GPU, in 9 minutes, by $(PYTHON)
	PYTHONPATH="$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 \
	$(PYTHON) -m ich.bench $(GPU_BENCH) --out multirun_reports/benchmarks $(OUT) $(ARGS)

ui: $(READY)  ## the MLflow UI on 127.0.0.1:5000
	@mkdir -p .ich-cache/tmp  # the server opens a lock of a foreseeable name in TMPDIR, and empties it
	TMPDIR=.ich-cache/tmp MLFLOW_DISABLE_TELEMETRY=true \
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 $(ARGS)

report: $(READY)  ## rebuild a table from its files; ARGS=multirun_reports/demo
	$(BIN)/python -m ich.report $(or $(ARGS),multirun_reports/demo)

bench: $(READY)  ## measure decoding and training steps against the plain way
	$(BIN)/python -m ich.bench $(ARGS)

docs: $(READY)  ## docs/ as a site, in site/: opens from a disk, without a network
	$(BIN)/python docs/scripts/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

coverage: $(READY)  ## every line that the tests run, child processes included; page in htmlcov/
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

clean:  ## remove the environment and build leftovers; never results, data or the MLflow database
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
