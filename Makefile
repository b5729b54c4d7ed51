# make train    trains a small LLaMA-2 through a pipeline of four CPU devices
# make test     everything that CI checks
# Tests of pages need a Chromium on PATH or in $CHROMIUM, and are skipped without.
# Both set up a virtual environment first, once. Another Python: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
python := $(VENV)/bin/python

.PHONY: train test lint types pytest wheel clean
.DELETE_ON_ERROR:

train: $(VENV)/.ready
	$(python) -m experiments.train --model=llama2 --size=tiny --num_devices=4 \
		--num_microbatches=8 --strategy=1f1b

test: lint types pytest wheel

lint: $(VENV)/.ready-to-test
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(VENV)/.ready-to-test
	$(python) -m mypy

# The quick ones run first: tests/conftest.py says which.
pytest: $(VENV)/.ready-to-test
	$(python) -m pytest -n 2 --dist worksteal

# The wheel holds all that it needs: imported from another folder, without this one.
wheel: $(VENV)/.ready-to-test
	rm -rf $(VENV)/wheel
	$(python) -m build --outdir $(VENV)/wheel/dist .
	$(python) -m pip install --no-deps --target $(VENV)/wheel/installed $(VENV)/wheel/dist/*.whl
	cd $(VENV)/wheel/installed && $(abspath $(python)) -c "import os, experiments.train, jaxptis, \
		models, passes; assert os.path.samefile(os.path.dirname(jaxptis.__file__), 'jaxptis')"

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python setup.cfg pyproject.toml
	$(python) -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-to-test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(python) -m pip install --quiet --editable '.[test,dev,foreign,torch,pictures]'
	@# A test trains one of flax's examples, which only its source distribution has.
	$(python) -m pip download --quiet --no-deps --no-binary flax --dest $(VENV)/sdist \
		flax==$$($(python) -c "import flax; print(flax.__version__)")
	touch $@
