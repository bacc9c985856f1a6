# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   ?= .venv
RUN    := $(VENV)/bin/python
JOBS   ?= 2

.PHONY: demo test lint bench clean

# The main job on embedded data: symmetric and plain nets in 4 bits, their table, and the page of their report.
demo: $(VENV)/.train
	$(RUN) -m train run configs/digits.py
	$(RUN) -m train report runs/digits

test: lint
	$(RUN) -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .

# One question per file; each prints ratios measured side by side in one process.
bench: $(VENV)/.bench
	for file in benchmarks/[a-z]*.py; do $(RUN) $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.train: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train,test]'
	touch $@ $(VENV)/.train

$(VENV)/.bench: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[train,test,bench]'
	touch $@
